"""Power iteration clustering against the form that walks node by node."""

import numpy as np
import pytest
from sklearn.datasets import make_moons

from algorithms.pic import nearest_neighbours, pic_labels
from clustering import pic
from tests import reference
from tests.algorithms.points import blobs, same_partition


def two_moons() -> np.ndarray:
    return make_moons(600, noise=0.05, random_state=0)[0].astype(np.float32)


def with_duplicates() -> np.ndarray:
    """Blobs in which some points stand twice, and some more often than a point has neighbours."""
    x = blobs(500, 8, 12, 0.3)
    return np.concatenate([x, x[:60], np.repeat(x[100:104], 9, axis=0)])


PIC_DATA = {
    "blobs": lambda: blobs(1500, 8, 30, 0.2),
    "moons": two_moons,
    "duplicates": with_duplicates,
    "random": lambda: blobs(800, 32, 800, 1.0),  # far apart: most clusters are of one image at first
    "spread": lambda: np.random.default_rng(0).uniform(0, 3, (1000, 2)).astype(np.float32),
}


@pytest.mark.parametrize("name", PIC_DATA)
def test_pic_partition_is_that_of_the_slow_reference(name):
    x = PIC_DATA[name]()
    exact = nearest_neighbours if name == "duplicates" else reference.nearest_neighbours
    slow = reference.pic_labels(*exact(x, 5))
    labels = pic(x).labels
    assert same_partition(labels, slow)
    assert 1 < len(np.unique(slow)) < len(x)


@pytest.mark.parametrize("nnn, sigma, alpha", [(3, 0.2, 0.001), (5, 1.0, 0.001), (8, 0.5, 0.05)])
def test_pic_settings_reach_the_algorithm(nnn, sigma, alpha):
    x = two_moons()
    neighbours, distances = nearest_neighbours(x, nnn)
    slow = reference.pic_labels(neighbours, distances, sigma, alpha)
    assert same_partition(pic(x, nnn=nnn, sigma=sigma, alpha=alpha).labels, slow)


def test_pic_is_deterministic_and_numbers_clusters_by_their_first_row():
    x = PIC_DATA["blobs"]()
    result = pic(x, seed=1)
    _, first = np.unique(result.labels, return_index=True)
    assert np.array_equal(first, np.sort(first)) and result.labels[0] == 0
    assert result.num_clusters == len(first) == result.labels.max() + 1
    assert np.array_equal(result.labels, pic(x, seed=2).labels)


def test_pic_centroids_are_means():
    x = PIC_DATA["blobs"]()
    result = pic(x)
    means = np.stack([x[members].astype(np.float64).mean(axis=0) for members in result.lists()])
    np.testing.assert_allclose(result.centroids, means, atol=1e-6)
    distances = ((x - means[result.labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-4, atol=1e-6)
    assert result.objective == pytest.approx(distances.sum(), rel=1e-4)
    assert result.distances.dtype == result.centroids.dtype == np.float32


def test_single_images_join_the_nearest_neighbour_whose_cluster_is_larger():
    # the edges of 3, 4 and 5 weigh nothing, exp(-99 / 0.04) = 0, so that each begins alone
    neighbours = np.array([[1, 2], [0, 2], [0, 1], [4, 2], [3, 5], [3, 4]])
    distances = np.array([[0.01, 0.03], [0.01, 0.04], [0.03, 0.04], [99, 99], [99, 99], [99, 99]], np.float32)
    # 3 takes its second neighbour, 2; 4 and 5 see only single images, as 3 counts as one still
    assert pic_labels(neighbours, distances).tolist() == [0, 0, 0, 0, 1, 2]


def test_images_too_far_apart_for_any_weight_stay_alone():
    assert pic(100 * np.eye(10, dtype=np.float32)).labels.tolist() == list(range(10))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_pic_with_fewer_images_than_neighbours(n):
    result = pic(blobs(n, 4, 1, 0.05))
    assert result.labels.shape == (n,) and result.labels[0] == 0
    assert np.isfinite(result.objective)


def test_pic_of_identical_images_ends():
    result = pic(np.ones((40, 4), np.float32))
    assert result.labels.shape == (40,) and np.isfinite(result.objective)


@pytest.mark.parametrize("nnn", [1, 5])
def test_neighbours_are_exact_and_leave_out_the_row_itself(nnn):
    x = blobs(500, 8, 12, 0.3)
    x = np.concatenate([x, x[:60], x[30:90]])  # some stand three times: ties go by index
    neighbours, distances = nearest_neighbours(x, nnn)
    expected, squared = reference.nearest_neighbours(x, nnn)
    assert np.array_equal(neighbours, expected)
    np.testing.assert_allclose(distances, squared, rtol=1e-12)


def test_neighbours_of_a_row_that_stands_many_times():
    x = with_duplicates()
    neighbours, distances = nearest_neighbours(x)
    assert not (neighbours == np.arange(len(x))[:, None]).any()
    assert all(len(set(row)) == 5 for row in neighbours.tolist())
    np.testing.assert_allclose(distances, reference.nearest_neighbours(x, 5)[1], rtol=1e-12)
