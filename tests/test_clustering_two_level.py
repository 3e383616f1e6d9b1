"""k-means at two levels: what it equals, over ranks, and where new rows go."""

import numpy as np
import pytest
import torch

import clustering
from algorithms.pca import PCAWhitening
from clustering import Assignment, kmeans, kmeans_two_level
from evaluation.clusters import Clusters, squared_distances
from features import ToPoints
from tests.algorithms.points import blobs
from tests.ranks import own_rows, spawn
from util import derive_seed

N = 211  # a prime


def points():
    """In three heaps, whose rows follow one another, so that ranks lack some of them."""
    x = blobs(N, 5, 3, 0.3)
    return x[np.argsort(kmeans(x, 3, derive_seed(7, "coarse"), niter=10).labels, kind="stable")]


def test_both_levels_are_kmeans_bit_for_bit():
    x = points()
    found = kmeans_two_level(x, 3, 4, seed=7)
    first = kmeans(x, 3, derive_seed(7, "coarse"), niter=10)
    assert np.array_equal(found.labels // 4, first.labels) and np.array_equal(found.coarse, first.centroids)
    assert found.fine == 4 and found.num_clusters == 12 and found.sizes().sum() == N
    for c in range(3):
        rows = first.labels == c
        part = kmeans(x[rows], 4, derive_seed(7, "fine", c), niter=10)
        assert np.array_equal(found.labels[rows] % 4, part.labels)
        assert np.array_equal(found.centroids[4 * c : 4 * c + 4], part.centroids)
        assert np.array_equal(found.distances[rows], part.distances)


def test_one_super_cluster_is_flat_kmeans():
    x = points()
    found, flat = kmeans_two_level(x, 1, 6, seed=3), kmeans(x, 6, derive_seed(3, "fine", 0), niter=10)
    assert np.array_equal(found.labels, flat.labels) and np.array_equal(found.centroids, flat.centroids)


def test_a_super_cluster_of_few_rows_makes_as_many_clusters():
    x = np.concatenate([points()[:40], np.full((2, 5), 50, np.float32) + np.eye(2, 5, dtype=np.float32)])
    found = kmeans_two_level(x, 2, 5, seed=1)
    (few,) = set(found.labels[40:] // 5)
    assert set(found.labels[found.labels // 5 == few] % 5) == {0, 1}
    assert found.distances[40:].max() == 0  # every row is a cluster
    near_nothing, _ = clustering.nearest_within(np.zeros((1, 5), np.float32), found, np.array([few]))
    assert near_nothing[0] % 5 < 2  # not one of the three that were never made, which stand at 0


def test_a_state_keeps_both_levels():
    found = kmeans_two_level(points(), 2, 3, seed=1)
    again = Assignment.from_state_dict(found.state_dict())
    assert np.array_equal(again.coarse, found.coarse) and again.fine == 3
    assert Assignment.from_state_dict(kmeans(points(), 3, 1).state_dict()).coarse is None


def over_ranks(x, counts):
    found = [kmeans_two_level(own_rows(x, counts), 3, 4, seed=7) for _ in range(2)]
    same = all(np.array_equal(getattr(found[0], f), getattr(found[1], f)) for f in ("labels", "centroids"))
    return found[0], same


def objectives(x, found):
    """Of both levels, by the centroids."""
    coarse = squared_distances(x, found.coarse[found.labels // 4]).sum()
    return np.array([coarse, squared_distances(x, found.centroids[found.labels]).sum()])


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(106, 105), (20, 1, 190)])  # the second rank lacks super-clusters
def test_ranks_find_as_good_clusters_and_cut_nothing_off(counts):
    x = points()
    one = kmeans_two_level(x, 3, 4, seed=7)
    several = spawn(over_ranks, len(counts), x, counts)
    for found, same in several:
        assert same and np.array_equal(found.labels, several[0][0].labels)  # on every rank
        assert found.sizes().sum() == len(found.labels) == N
        assert np.allclose(objectives(x, found), objectives(x, one), rtol=1e-3)


def two_levels():
    """Super-clusters at 0 and 10, of clusters at -4 and 1, and at 6 and 14; five images of a run."""
    x = np.array([[-4], [1], [6], [14], [5.05]], np.float32)
    labels = np.array([0, 1, 2, 3, 1])  # the run put the last one, a near tie of both levels, to 1
    centroids = np.array([[-4], [1], [6], [14]], np.float32)
    distances = squared_distances(x, centroids[labels]).astype(np.float32)
    found = Assignment(labels, 4, 0.0, distances, centroids, coarse=np.array([[0], [10]], np.float32))
    pca = PCAWhitening(np.zeros(1), np.eye(1))
    return x, Clusters(ToPoints(pca), found, None, {}, None, 2e-6, torch.device("cpu"))


def test_new_rows_go_to_the_nearest_cluster_in_the_nearest_super_cluster():
    _, clusters = two_levels()
    new = np.array([[4], [6], [20], [-9]], np.float32)
    labels, distances = clusters.assign(new, np.full(4, 1e-3), np.full(4, -1))
    assert labels.tolist() == [1, 2, 3, 0]  # 4 is nearer to 6 than to 1
    assert distances.tolist() == [9, 0, 36, 25]


def test_images_of_the_run_keep_their_clusters_within_the_noise_of_both_levels():
    x, clusters = two_levels()
    labels, _ = clusters.assign(x, np.full(5, 1.1), np.arange(5))
    assert labels.tolist() == [0, 1, 2, 3, 1]  # squared distances of the last one differ by 1 at level 1
    labels, _ = clusters.assign(x, np.full(5, 0.9), np.arange(5))
    assert labels.tolist() == [0, 1, 2, 3, 2]
