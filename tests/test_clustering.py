"""The one interface of clusterings: k-means by Faiss, and what all of them promise."""

import faiss
import numpy as np
import pytest

from algorithms.nearest import assign
from clustering import CLUSTERINGS, Assignment, kmeans
from tests import reference
from tests.algorithms.points import blobs
from util import UserError


def test_kmeans_continues_as_lloyd_does():
    x = blobs(1500, 8, 20, 0.5)
    early, late = kmeans(x, 20, seed=3, niter=5), kmeans(x, 20, seed=3, niter=8)
    centroids, labels, objective = reference.lloyd(x, early.centroids, 3)
    np.testing.assert_allclose(late.centroids, centroids, atol=1e-5)
    assert (late.labels == labels).mean() > 0.999
    assert late.objective == pytest.approx(objective, rel=1e-4)


def test_kmeans_uses_all_points_and_all_iterations():
    # 2 x 2000 points in two places, but 256 x k points would be a sample; and k-means converges at once here
    x = np.repeat(np.array([[0, 0], [1, 0]], np.float32), 2000, axis=0)
    x += np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) * 0.1
    result = kmeans(x, 2, seed=0)
    order = np.argsort(result.centroids[:, 0])
    np.testing.assert_allclose(result.centroids[order], [x[:2000].mean(0), x[2000:].mean(0)], atol=1e-5)
    assert result.sizes().tolist() == [2000, 2000]


def test_kmeans_runs_every_iteration(monkeypatch):
    made = []
    original = faiss.Kmeans
    monkeypatch.setattr(faiss, "Kmeans", lambda *a, **kw: made.append(original(*a, **kw)) or made[-1])
    kmeans(blobs(300, 4, 3, 0.1), 3, seed=0)  # converges after a few
    assert len(made[0].obj) == 20


def test_two_runs_of_kmeans_are_equal_and_the_seed_matters():
    x = blobs(3000, 16, 50, 0.5)
    seed = 2**62 + 11  # as derive_seed makes them
    first, second = kmeans(x, 60, seed), kmeans(x, 60, seed)
    assert np.array_equal(first.labels, second.labels) and first.objective == second.objective
    assert np.array_equal(first.centroids, second.centroids)
    assert not np.array_equal(first.labels, kmeans(x, 60, seed + 1).labels)


def test_empty_clusters_keep_their_ids():
    x = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    result = kmeans(x, 8, seed=0)
    sizes = result.sizes()
    assert result.num_clusters == 8 and len(sizes) == 8 and (sizes == 0).any() and sizes.sum() == 60
    lists = result.lists()
    assert [len(members) for members in lists] == sizes.tolist()
    for cluster, members in enumerate(lists):
        assert members == np.flatnonzero(result.labels == cluster).tolist()
        assert all(type(member) is int for member in members)


def test_an_assignment_survives_its_state():
    result = kmeans(blobs(60, 4, 3, 0.5), 5, seed=0)
    again = Assignment.from_state_dict(result.state_dict())
    assert (again.num_clusters, again.objective) == (5, result.objective)
    for field in ("labels", "distances", "centroids"):
        ours, theirs = getattr(result, field), getattr(again, field)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("k", [1, 10])
def test_kmeans_at_the_ends_of_k(k):
    x = blobs(10, 4, 3, 0.5)
    result = kmeans(x, k, seed=0)
    assert result.sizes().tolist() == [10 // k] * k
    assert result.objective == pytest.approx(float(((x - x.mean(0)) ** 2).sum()) if k == 1 else 0, abs=1e-4)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_kmeans_refuses_k_outside_the_number_of_images(k):
    with pytest.raises(UserError, match=rf"{k} clusters of 10 "):
        kmeans(blobs(10, 4, 3, 0.5), k, seed=0)


@pytest.mark.parametrize("name", CLUSTERINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite_are_refused(name, bad):
    x = blobs(20, 4, 3, 0.5)
    x[3, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        CLUSTERINGS[name](x, k=2, seed=0)


@pytest.mark.parametrize("x", [np.zeros((0, 3), np.float32), np.zeros((3, 3)), np.zeros(3, np.float32)])
def test_points_of_another_kind_are_refused(x):
    with pytest.raises(ValueError, match="float32 points"):
        kmeans(x, 1, seed=0)


def test_kmeans_labels_are_the_nearest_centroids():
    x = blobs(500, 16, 10, 0.4)
    result = kmeans(x, 12, seed=1)
    distances = reference.squared_distances(x, result.centroids)
    assert np.array_equal(result.labels, distances.argmin(axis=1))
    np.testing.assert_allclose(result.distances, distances.min(axis=1), atol=1e-5)
    assert result.labels.dtype == np.int64 and result.distances.dtype == np.float32
    labels, squared = assign(x, result.centroids)
    assert np.array_equal(labels, result.labels) and np.array_equal(squared, result.distances)
