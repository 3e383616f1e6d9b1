"""k-means over processes, each of which keeps its rows: against Faiss, start, splits and all."""

import pickle

import faiss
import numpy as np
import pytest
import torch

import clustering
import distributed
from algorithms.agreement import compare
from algorithms.lloyd import _split_clusters
from algorithms.pca import normalise_rows
from tests.ranks import error_of, own_rows, spawn

SEEDS = (0, 3, 7, 2**31 + 5)
UNEVEN = {2: (0, 401), 3: (380, 0, 21)}  # rows of each rank


def points_of(name):
    """(points (N, d) float32, k)."""
    rng = np.random.default_rng(8)
    if name == "blobs":
        centres = rng.standard_normal((12, 8)) * 10
        return (centres[rng.integers(12, size=401)] + rng.standard_normal((401, 8))).astype(np.float32), 12
    if name == "hard":
        return normalise_rows(rng.standard_normal((2001, 16)).astype(np.float32)), 40
    if name == "duplicates":  # fewer distinct points than clusters
        return np.repeat(rng.standard_normal((10, 6)), 9, axis=0).astype(np.float32), 25
    x = rng.standard_normal((51, 6)).astype(np.float32)  # as many clusters as points, or nearly
    return x, 51 if name == "all" else 48


def over_ranks(x, k, seed=7, niter=20):
    return clustering.kmeans(x, k, seed, niter=niter, ranks=True)


def on_rank(size):
    """What a rank finds."""
    found = {}
    for name in ("blobs", "duplicates", "near", "all"):
        x, k = points_of(name)
        found[name] = over_ranks(own_rows(x), k)
    x, k = points_of("hard")
    hard = own_rows(x)
    found |= {("hard", seed): over_ranks(hard, k, seed) for seed in SEEDS}
    found["repeated"] = over_ranks(hard, k)
    found["start"] = over_ranks(hard, k, niter=0)
    x, k = points_of("blobs")
    found["uneven"] = over_ranks(own_rows(x, UNEVEN[size]), k)
    bad = x.copy()
    bad[390] = np.nan  # on the last rank only
    errors = [error_of(over_ranks, own_rows(x), 402), error_of(over_ranks, own_rows(x), 0)]
    errors.append(error_of(over_ranks, own_rows(bad), 4))
    return {"kmeans": found, "errors": errors, "bytes sent": bytes_sent(size)}


def bytes_sent(size):
    """What comes and goes in whitening and two iterations."""
    sent = []
    count_bytes(sent.append)
    x = np.random.default_rng(distributed.rank()).standard_normal((4000 // size, 64)).astype(np.float32)
    over_ranks(clustering.preprocess(x, 64)[1], 4, niter=2)
    return sum(sent)


def count_bytes(count):
    """Call count(bytes) for whatever this process sends or receives from now on."""

    def counted(function, size):
        def call(value, *args):
            result = function(value, *args)
            count(size(value, result))
            return result

        return call

    for name in ("all_reduce", "broadcast", "send", "recv"):
        function = getattr(torch.distributed, name)
        setattr(torch.distributed, name, counted(function, lambda tensor, _: tensor.nbytes))
    for name in ("broadcast_object", "gather_objects"):
        function = getattr(distributed, name)
        setattr(distributed, name, counted(function, lambda _, result: len(pickle.dumps(result))))


@pytest.fixture(scope="module", params=UNEVEN)
def ranks(request):
    return spawn(on_rank, request.param, request.param)


def check_same_everywhere(ranks, name):
    first = ranks[0]["kmeans"][name]
    for found in ranks:
        a = found["kmeans"][name]
        assert a.objective == first.objective
        np.testing.assert_array_equal(a.centroids, first.centroids)
        np.testing.assert_array_equal(a.labels, first.labels)
        np.testing.assert_array_equal(a.distances, first.distances)
    return first


@pytest.mark.parametrize("name", ["blobs", "near", "all"])
def test_kmeans_is_faisss_from_the_same_seed(ranks, name):
    x, k = points_of(name)
    expected, a = clustering.kmeans(x, k, seed=7), check_same_everywhere(ranks, name)
    np.testing.assert_allclose(a.centroids, expected.centroids, atol=1e-5)
    np.testing.assert_array_equal(a.labels, expected.labels)
    assert a.objective == pytest.approx(expected.objective, rel=1e-5)
    np.testing.assert_allclose(a.distances, ((x - a.centroids[a.labels]) ** 2).sum(1), atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_hard_points_are_clustered_as_well_as_by_faiss(ranks, seed):
    x, k = points_of("hard")
    expected, a = clustering.kmeans(x, k, seed=seed), check_same_everywhere(ranks, ("hard", seed))
    assert a.objective == pytest.approx(expected.objective, rel=1e-3)
    assert compare(a.labels, expected.labels)["nmi"] >= 0.95


def faiss_after(x, k, niter):
    """faiss.Clustering's centroids from seed 7, and how many clusters it split in the last iteration."""
    kmeans = faiss.Clustering(x.shape[1], k)
    kmeans.niter, kmeans.seed, kmeans.max_points_per_centroid = niter, 7, 10**6
    kmeans.min_points_per_centroid = 1
    kmeans.train(x, faiss.IndexFlatL2(x.shape[1]))
    splits = [kmeans.iteration_stats.at(i).nsplit for i in range(kmeans.iteration_stats.size())]
    return faiss.vector_to_array(kmeans.centroids).reshape(k, -1), splits[-1] if splits else 0


def test_the_start_is_faisss(ranks):
    x, k = points_of("hard")
    start, _ = faiss_after(x, k, niter=0)
    np.testing.assert_array_equal(over_ranks(x, k, niter=0).centroids, start)
    for found in ranks:
        np.testing.assert_array_equal(found["kmeans"]["start"].centroids, start)


def test_fewer_distinct_points_than_clusters_leave_some_empty(ranks):
    a = check_same_everywhere(ranks, "duplicates")
    assert np.isfinite(a.centroids).all() and a.num_clusters == 25
    assert np.count_nonzero(a.sizes()) == 10 and a.distances.max() < 1e-2


def test_empty_clusters_are_split_as_faiss_splits_them():
    x, k = points_of("duplicates")
    expected, splits = faiss_after(x, k, niter=1)  # later, rounding decides between equal points
    assert splits > 10
    a = over_ranks(x, k, niter=1)
    np.testing.assert_allclose(a.centroids, expected, atol=1e-5)


@pytest.mark.parametrize("k, empty", [(3, 1), (40, 35), (300, 200)])
def test_splitting_follows_the_rule_draw_for_draw(k, empty):
    rng = np.random.default_rng(k)
    filled = rng.integers(1, 20, k - empty) + k // (k - empty)  # small: a rounded half shows
    sizes = rng.permutation(np.r_[np.zeros(empty, np.int64), filled])
    centroids = rng.standard_normal((k, 5)).astype(np.float32)
    expected, left, n = centroids.copy(), sizes.astype(float), sizes.sum()
    random = faiss.RandomGenerator(1234)
    for i in np.flatnonzero(sizes == 0):
        j = 0
        while random.rand_float() >= np.float32((left[j] - 1) / (n - k)):
            j = (j + 1) % k
        left[i] = left[j] = left[j] / 2
        expected[i] = expected[j]
        expected[i, ::2] *= np.float32(1 + 1 / 1024)
        expected[i, 1::2] *= np.float32(1 - 1 / 1024)
        expected[j, ::2] *= np.float32(1 - 1 / 1024)
        expected[j, 1::2] *= np.float32(1 + 1 / 1024)
    _split_clusters(centroids, sizes, int(n))
    np.testing.assert_array_equal(centroids, expected)


def test_ranks_may_hold_any_number_of_rows(ranks):
    x, k = points_of("blobs")
    expected, a = clustering.kmeans(x, k, seed=7), check_same_everywhere(ranks, "uneven")
    np.testing.assert_array_equal(a.labels, expected.labels)
    np.testing.assert_allclose(a.centroids, expected.centroids, atol=1e-5)


def test_no_rank_is_sent_all_rows(ranks):
    for found in ranks:  # 4000 x 64 float32 are a megabyte; all that came and went is far less
        assert 0 < found["bytes sent"] < 4000 * 64 * 4 / 4


def test_the_same_processes_give_the_same_bits(ranks):
    for found in ranks:
        a, b = found["kmeans"]["repeated"], found["kmeans"]["hard", 7]
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.centroids, b.centroids)


def test_errors_are_raised_on_every_rank(ranks):
    for found in ranks:
        too_many, none, nan = found["errors"]
        assert "402 clusters of 401 images" in too_many and "0 clusters of 401 images" in none
        assert "not finite" in nan


def test_one_process_finds_what_faiss_finds():
    x, k = points_of("blobs")
    np.testing.assert_array_equal(over_ranks(x, k).labels, clustering.kmeans(x, k, seed=7).labels)
