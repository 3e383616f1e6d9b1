import numpy as np
import torch
from torch.nn import functional as F

import main_deepclusterv2
from algorithms.lloyd import lloyd
from tests.helpers import refuses
from training.memory import Bank


def circle(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_spherical_kmeans_of_four_directions_by_hand():
    x = circle(0, 10, 90, 100)
    labels, distances, _, centroids = lloyd(x, 2, 0, 10, spherical=True, start=x[[0, 2]])
    assert labels.tolist() == [0, 0, 1, 1]
    assert np.allclose(centroids, circle(5, 95), atol=1e-6)
    assert np.allclose(distances, ((x - centroids[labels]) ** 2).sum(1), atol=1e-6)


def test_spherical_kmeans_keeps_unit_rows_and_its_objective_falls():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    objectives = []
    for niter in range(1, 8):
        _, _, objective, centroids = lloyd(x, 4, 1, niter, spherical=True)
        assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
        objectives.append(objective)
    assert (np.diff(objectives) <= 1e-4).all()


def test_fewer_distinct_rows_than_clusters_end_finite():
    x = np.repeat(circle(0, 90), 5, axis=0)
    labels, _, objective, centroids = lloyd(x, 4, 0, 10, spherical=True)
    assert np.isfinite(centroids).all() and np.isfinite(objective) and labels.max() < 4


def test_opposite_rows_leave_the_centroid_where_it_was():
    x = circle(0, 180, 90)
    _, _, _, centroids = lloyd(x, 2, 0, 1, spherical=True, start=circle(271, 90))
    assert np.isfinite(centroids).all() and np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)


def test_bank_holds_the_last_embedding_of_every_image_and_crop():
    bank = Bank(5, crops=2, dim=3)
    first = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3) + 1
    bank.put(torch.tensor([4, 0, 2, 1, 3]), first)
    bank.settle()
    bank.put(torch.tensor([2]), torch.full((2, 1, 3), 7.0))
    bank.settle()
    assert not bank.empty
    expected = F.normalize(first[1][[1, 3, 2, 4, 0]], dim=1)
    expected[2] = F.normalize(torch.full((3,), 7.0), dim=0)
    assert np.allclose(bank.crop(1), expected, atol=1e-6)
    assert np.allclose(bank.crop(3), bank.crop(1)) and not np.allclose(bank.crop(2), bank.crop(1))


def test_bank_goes_on_from_its_state():
    bank, other = Bank(4, 1, 2), Bank(4, 1, 2)
    bank.put(torch.arange(4), torch.randn(1, 4, 2))
    other.load_state_dict(bank.state_dict())
    assert np.array_equal(bank.crop(0), other.crop(0)) and not other.empty


def test_loss_is_cross_entropy_over_all_crops_with_the_images_label():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 4, generator=generator)  # three crops of two images, crop-major
    target = torch.tensor([3, 1])
    loss = main_deepclusterv2.prototype_loss(scores, target, crops=3, temperature=0.1)
    expected = F.cross_entropy(scores / 0.1, torch.tensor([3, 1, 3, 1, 3, 1]))
    assert torch.allclose(loss / 2, expected)


def test_images_without_a_label_do_not_count():
    scores = torch.randn(4, 3, requires_grad=True)
    main_deepclusterv2.prototype_loss(scores, torch.tensor([-100, 2]), 2, 0.1).backward()
    assert not scores.grad[[0, 2]].any() and scores.grad[[1, 3]].any()
    nothing = main_deepclusterv2.prototype_loss(scores, torch.tensor([-100, -100]), 2, 0.1)
    assert nothing.item() == 0


def spherical_by_loops(x, centroids, niter):
    """In float64, a row and a cluster at a time; no cluster may become empty."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for step in range(niter + 1):
        labels = [max(range(len(centroids)), key=lambda c: row @ centroids[c]) for row in x]
        if step == niter:
            return np.array(labels), centroids
        for c in range(len(centroids)):
            mean = sum(row for row, label in zip(x, labels) if label == c)
            centroids[c] = mean / np.linalg.norm(mean)


def test_spherical_kmeans_equals_loops_in_float64():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((90, 6)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    start = x[:5].copy()
    labels, distances, _, centroids = lloyd(x, 5, 0, 10, spherical=True, start=start)
    expected, of_loops = spherical_by_loops(x, start, 10)
    assert np.array_equal(labels, expected) and np.allclose(centroids, of_loops, atol=1e-5)
    assert np.allclose(distances, 2 - 2 * (x * of_loops[expected]).sum(1), atol=1e-4)


def test_more_clusters_than_images_are_refused():
    with refuses("--nmb_prototypes 9: more clusters than the 8 images"):
        main_deepclusterv2.check_enough(8, [3, 9])
