"""Sums over processes, PCA and k-means of rows that lie in several, against one process and against Faiss."""

import os
import pickle
import socket
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

import clustering
import distributed
from util import UserError

RANKS = 3
NAMES = ("plain", "few rows", "low rank", "constant", "uneven")


def features_of(name):
    """(features (N, D) float32, how many rows each rank holds)."""
    rng = np.random.default_rng(5)
    if name == "few rows":  # fewer than columns
        return rng.standard_normal((20, 48)).astype(np.float32) + 3, None
    if name == "low rank":
        return (rng.standard_normal((90, 4)) @ rng.standard_normal((4, 32))).astype(np.float32), None
    if name == "constant":
        return np.full((30, 16), 2.5, np.float32), None
    x = rng.standard_normal((200, 24)).astype(np.float32) * np.linspace(3, 0.1, 24, dtype=np.float32)
    return x, (0, 150, 50) if name == "uneven" else None


def points_of(name):
    """(points (N, d) float32, k)."""
    rng = np.random.default_rng(8)
    if name == "blobs":
        centres = rng.standard_normal((12, 8)) * 10
        return (centres[rng.integers(12, size=401)] + rng.standard_normal((401, 8))).astype(np.float32), 12
    if name == "hard":
        return clustering.normalise_rows(rng.standard_normal((2000, 16)).astype(np.float32)), 40
    if name == "duplicates":  # fewer distinct points than clusters
        return np.repeat(rng.standard_normal((10, 6)), 9, axis=0).astype(np.float32), 25
    return rng.standard_normal((50, 6)).astype(np.float32), 48  # nearly as many clusters as points


def own_rows(x, counts=None):
    if counts is None:
        rows = distributed.shard(len(x))
        return x[rows.start : rows.stop]
    first = sum(counts[: distributed.rank()])
    return x[first : first + counts[distributed.rank()]]


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except UserError as error:
        return str(error)
    return None


def on_rank(rank, port, folder):
    """Everything that a rank finds, into a file, for the parent to look at."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    distributed.CHUNK_BYTES = 100  # so that rows go in several pieces
    device = distributed.init("cpu")
    found = {"pca": {}, "kmeans": {}}
    for name in NAMES:
        x, counts = features_of(name)
        whitening, rows = clustering.preprocess(own_rows(x, counts), 12, device, sharded=True)
        found["pca"][name] = whitening, rows
    for name in ("blobs", "hard", "duplicates", "near"):
        x, k = points_of(name)
        found["kmeans"][name] = clustering.kmeans_distributed(own_rows(x), k, seed=7)
    x, k = points_of("blobs")
    found["repeated"] = clustering.kmeans_distributed(own_rows(points_of("hard")[0]), 40, seed=7)
    found["uneven"] = clustering.kmeans_distributed(own_rows(x, (0, 400, 1)), k, seed=7)
    found["too many"] = error_of(clustering.kmeans_distributed, own_rows(x), 402, seed=7)
    bad = x.copy()
    bad[390] = np.nan  # on the last rank only
    found["nan"] = error_of(clustering.fit_pca, own_rows(bad), 4, sharded=True)
    found["nan points"] = error_of(clustering.kmeans_distributed, own_rows(bad), 4, seed=7)
    mine = own_rows(np.arange(70).reshape(35, 2), (10, 0, 25))
    found["gathered"], found["all"] = distributed.gather_rows(mine), distributed.all_gather_rows(mine)
    found["objects"] = distributed.gather_objects(rank)
    found["main"] = distributed.on_main(os.getpid), os.getpid()
    found["error"] = error_of(distributed.on_main, fail)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    distributed.shutdown()


def fail():
    raise UserError("the disk is full")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, str(folder)), nprocs=RANKS)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_whitened_rows_are_those_of_one_process(ranks, name):
    x, _ = features_of(name)
    pca, whole = clustering.preprocess(x, 12)
    rows = np.concatenate([found["pca"][name][1] for found in ranks])
    assert rows.shape == whole.shape
    np.testing.assert_allclose(rows @ rows.T, whole @ whole.T, atol=1e-5)  # pairwise cosines
    for found in ranks:
        np.testing.assert_array_equal(found["pca"][name][0].matrix, ranks[0]["pca"][name][0].matrix)
        np.testing.assert_allclose(found["pca"][name][0].mean, pca.mean, atol=1e-12)


@pytest.mark.parametrize("name", ["blobs", "hard", "near"])
def test_kmeans_is_faisss_from_the_same_seed(ranks, name):
    x, k = points_of(name)
    expected = clustering.kmeans(x, k, seed=7)
    for found in ranks:
        a = found["kmeans"][name]
        assert a.objective == pytest.approx(expected.objective, rel=1e-3)
        np.testing.assert_allclose(a.centroids, expected.centroids, atol=1e-4)
        assert clustering.compare(a.labels, expected.labels)["nmi"] >= 0.95
        np.testing.assert_array_equal(a.centroids, ranks[0]["kmeans"][name].centroids)
        np.testing.assert_array_equal(a.labels, ranks[0]["kmeans"][name].labels)
        distances = ((x - a.centroids[a.labels]) ** 2).sum(1)
        np.testing.assert_allclose(a.distances, distances, atol=1e-4)


def test_the_start_is_faisss():
    x, k = points_of("hard")
    start = clustering._faiss_start(x, 0, len(x), k, seed=7)
    kmeans = faiss.Clustering(x.shape[1], k)
    kmeans.niter, kmeans.seed, kmeans.max_points_per_centroid = 0, 7, 10**6
    index = faiss.IndexFlatL2(x.shape[1])
    kmeans.train(x, index)
    np.testing.assert_array_equal(start, faiss.vector_to_array(kmeans.centroids).reshape(k, -1))


def test_fewer_distinct_points_than_clusters_leave_some_empty(ranks):
    a = ranks[0]["kmeans"]["duplicates"]
    assert np.isfinite(a.centroids).all() and a.num_clusters == 25
    assert np.count_nonzero(a.sizes()) == 10 and a.distances.max() < 1e-2


def test_empty_clusters_are_split_off_large_ones():
    centroids = np.array([[4.0, 8.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    sizes = np.array([9, 0, 1])
    clustering._split_clusters(centroids, sizes, n=10)
    assert sizes.tolist() == [5, 4, 1]
    np.testing.assert_allclose(centroids[1], [4 * (1 + 1 / 1024), 8 * (1 - 1 / 1024)])
    np.testing.assert_allclose(centroids[0], [4 * (1 - 1 / 1024), 8 * (1 + 1 / 1024)])
    np.testing.assert_array_equal(centroids[2], [1, 1])


def test_the_same_processes_give_the_same_bits(ranks):
    for found in ranks:
        np.testing.assert_array_equal(found["repeated"].labels, found["kmeans"]["hard"].labels)
        np.testing.assert_array_equal(found["repeated"].centroids, found["kmeans"]["hard"].centroids)


def test_ranks_may_hold_any_number_of_rows(ranks):
    x, k = points_of("blobs")
    expected = clustering.kmeans(x, k, seed=7)
    np.testing.assert_array_equal(ranks[0]["uneven"].labels, expected.labels)


def test_errors_are_raised_on_every_rank(ranks):
    for found in ranks:
        assert "402 clusters of 401 images" in found["too many"]
        assert "image 390 is not finite" in found["nan"]
        assert "not finite" in found["nan points"]
        assert found["error"] == "the disk is full"


def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    whole = np.arange(70).reshape(35, 2)
    np.testing.assert_array_equal(ranks[0]["gathered"], whole)
    assert ranks[1]["gathered"] is None and ranks[2]["gathered"] is None
    for found in ranks:
        np.testing.assert_array_equal(found["all"], whole)
        assert found["objects"] == [0, 1, 2]
        assert found["main"][0] == ranks[0]["main"][1]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 101])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_shards_are_consecutive_and_whole(n, size):
    parts = [distributed.shard(n, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_the_identity():
    x, k = points_of("blobs")
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [1, 2]
    assert distributed.gather_rows(x) is x and distributed.all_gather_rows(x) is x
    assert distributed.gather_objects("a") == ["a"] and distributed.broadcast_object("a") == "a"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    a, b = clustering.fit_pca(x, 4), clustering.fit_pca(x, 4, sharded=True)
    np.testing.assert_array_equal(a.matrix, b.matrix)
    np.testing.assert_array_equal(
        clustering.kmeans_distributed(x, k, seed=7).labels, clustering.kmeans(x, k, seed=7).labels
    )
