"""Sums over processes, PCA and k-means of rows that lie in several, against one process and against Faiss."""

import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

import clustering
import distributed
from util import UserError

SIZES = (2, 4)  # processes; one is this one
SEEDS = (0, 3, 7, 2**31 + 5)
NAMES = ("plain", "half", "few rows", "fewer rows", "low rank", "constant", "uneven")
UNEVEN = {2: (0, 201), 4: (0, 150, 50, 1)}  # rows of each rank


def features_of(name):
    """Features (N, D)."""
    rng = np.random.default_rng(5)
    if name == "few rows":  # fewer than columns
        return rng.standard_normal((21, 48)).astype(np.float32) + 3
    if name == "fewer rows":  # than dimensions asked for
        return rng.standard_normal((9, 48)).astype(np.float32) + 3
    if name == "low rank":
        return (rng.standard_normal((91, 4)) @ rng.standard_normal((4, 32))).astype(np.float32)
    if name == "constant":
        return np.full((31, 16), 2.5, np.float32)
    x = rng.standard_normal((201, 24)).astype(np.float32) * np.linspace(3, 0.1, 24, dtype=np.float32)
    return x.astype(np.float16) if name == "half" else x


def points_of(name):
    """(points (N, d) float32, k)."""
    rng = np.random.default_rng(8)
    if name == "blobs":
        centres = rng.standard_normal((12, 8)) * 10
        return (centres[rng.integers(12, size=401)] + rng.standard_normal((401, 8))).astype(np.float32), 12
    if name == "hard":
        return clustering.normalise_rows(rng.standard_normal((2001, 16)).astype(np.float32)), 40
    if name == "duplicates":  # fewer distinct points than clusters
        return np.repeat(rng.standard_normal((10, 6)), 9, axis=0).astype(np.float32), 25
    x = rng.standard_normal((51, 6)).astype(np.float32)  # as many clusters as points, or nearly
    return x, 51 if name == "all" else 48


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


def on_rank(rank, size, port, folder):
    """Everything that a rank finds, into a file, for the parent to look at."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=60)
    device = distributed.init("cpu")
    found = find_pca(device) | find_kmeans(size) | find_errors() | find_rows(size, rank)
    sent = []
    count_bytes(sent.append)
    x = np.random.default_rng(rank).standard_normal((4000 // size, 64)).astype(np.float32)
    clustering.kmeans_distributed(clustering.preprocess(x, 64, device, sharded=True)[1], 4, seed=7, niter=2)
    found["bytes sent"] = sum(sent)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    distributed.shutdown()


def find_pca(device):
    def preprocess(name, counts=None):
        return clustering.preprocess(own_rows(features_of(name), counts), 12, device, sharded=True)

    uneven = UNEVEN[distributed.world_size()]
    found = {name: preprocess(name, uneven if name == "uneven" else None) for name in NAMES}
    return {"pca": found, "pca again": preprocess("plain")}


def find_kmeans(size):
    found = {}
    for name in ("blobs", "duplicates", "near", "all"):
        x, k = points_of(name)
        found[name] = clustering.kmeans_distributed(own_rows(x), k, seed=7)
    x, k = points_of("hard")
    hard = own_rows(x)
    found |= {("hard", seed): clustering.kmeans_distributed(hard, k, seed=seed) for seed in SEEDS}
    found["repeated"] = clustering.kmeans_distributed(hard, k, seed=7)
    found["start"] = clustering.kmeans_distributed(hard, k, seed=7, niter=0)
    x, k = points_of("blobs")
    counts = {2: (0, 401), 4: (0, 380, 0, 21)}[size]
    found["uneven"] = clustering.kmeans_distributed(own_rows(x, counts), k, seed=7)
    return {"kmeans": found}


def find_errors():
    x, _ = points_of("blobs")
    bad = x.copy()
    bad[390] = np.nan  # on the last rank only
    return {
        "too many": error_of(clustering.kmeans_distributed, own_rows(x), 402, seed=7),
        "none": error_of(clustering.kmeans_distributed, own_rows(x), 0, seed=7),
        "nan": error_of(clustering.fit_pca, own_rows(bad), 4, sharded=True),
        "nan points": error_of(clustering.kmeans_distributed, own_rows(bad), 4, seed=7),
        "error": error_of(distributed.on_main, fail),
    }


def find_rows(size, rank):
    """Rows gathered in pieces of a few."""
    distributed.CHUNK_BYTES, chunk_bytes = 100, distributed.CHUNK_BYTES
    found = {}
    for name, (whole, counts) in rows_of(size).items():
        mine = own_rows(whole, counts)
        mine.flags.writeable = False  # as a memory map may be
        found[name] = distributed.gather_rows(mine), distributed.all_gather_rows(mine)
    distributed.CHUNK_BYTES = chunk_bytes
    objects = distributed.gather_objects(rank), distributed.broadcast_object(f"of {rank}")
    tensor = torch.full((3,), rank + 1.0)
    distributed.broadcast_tensors([tensor])
    reduced = torch.full((2,), rank + 1.0)
    same = distributed.all_reduce(reduced) is reduced
    distributed.barrier()
    return {
        "rows": found,
        "objects": objects,
        "reduced": (same, reduced.tolist()),
        "tensor": tensor.tolist(),
        "shard": distributed.shard(35),
        "main": (distributed.on_main(os.getpid), os.getpid(), distributed.is_main()),
    }


def rows_of(size):
    """{name: (all rows, how many each rank holds)}."""
    whole = np.arange(105).reshape(35, 3)
    first_empty = (0, 35) if size == 2 else (0, 10, 0, 25)
    return {
        "even": (whole, None),
        "last empty": (whole, first_empty[::-1]),
        "first empty": (whole, first_empty),
        "labels": (whole[:, 0].copy(), first_empty),
        "cubes": (np.arange(35 * 8).reshape(35, 2, 2, 2).astype(np.float16), first_empty),
        "truth": (whole % 3 == 0, None),
        "columns": (np.asfortranarray(whole.astype(np.uint16)), None),
        "nothing": (whole[:0], None),
    }


def fail():
    raise UserError("the disk is full")


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (request.param, port, str(folder)), nprocs=request.param)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_whitened_rows_are_those_of_one_process(ranks, name):
    pca, whole = clustering.preprocess(features_of(name), 12)
    rows = np.concatenate([found["pca"][name][1] for found in ranks])
    assert rows.shape == whole.shape
    np.testing.assert_allclose(rows @ rows.T, whole @ whole.T, atol=1e-5)  # pairwise cosines
    for found in ranks:
        np.testing.assert_array_equal(found["pca"][name][0].matrix, ranks[0]["pca"][name][0].matrix)
        np.testing.assert_array_equal(found["pca"][name][0].mean, ranks[0]["pca"][name][0].mean)
        np.testing.assert_allclose(found["pca"][name][0].mean, pca.mean, atol=1e-12)


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
    assert clustering.compare(a.labels, expected.labels)["nmi"] >= 0.95


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
    np.testing.assert_array_equal(clustering.kmeans_distributed(x, k, seed=7, niter=0).centroids, start)
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
    a = clustering.kmeans_distributed(x, k, seed=7, niter=1)
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
    clustering._split_clusters(centroids, sizes, int(n))
    np.testing.assert_array_equal(centroids, expected)


def test_the_same_processes_give_the_same_bits(ranks):
    for found in ranks:
        a, b = found["kmeans"]["repeated"], found["kmeans"]["hard", 7]
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.centroids, b.centroids)
        np.testing.assert_array_equal(found["pca again"][0].matrix, found["pca"]["plain"][0].matrix)
        np.testing.assert_array_equal(found["pca again"][1], found["pca"]["plain"][1])


def test_ranks_may_hold_any_number_of_rows(ranks):
    x, k = points_of("blobs")
    expected, a = clustering.kmeans(x, k, seed=7), check_same_everywhere(ranks, "uneven")
    np.testing.assert_array_equal(a.labels, expected.labels)
    np.testing.assert_allclose(a.centroids, expected.centroids, atol=1e-5)


def test_no_rank_is_sent_all_rows(ranks):
    for found in ranks:  # 4000 x 64 float32 are a megabyte; all that came and went is far less
        assert 0 < found["bytes sent"] < 4000 * 64 * 4 / 4


def test_errors_are_raised_on_every_rank(ranks):
    for found in ranks:
        assert "402 clusters of 401 images" in found["too many"]
        assert "0 clusters of 401 images" in found["none"]
        assert "image 390 is not finite" in found["nan"]
        assert "not finite" in found["nan points"]
        assert found["error"] == "the disk is full"


def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    for name, (whole, _) in rows_of(len(ranks)).items():
        np.testing.assert_array_equal(ranks[0]["rows"][name][0], whole)
        assert all(found["rows"][name][0] is None for found in ranks[1:])
        for found in ranks:
            np.testing.assert_array_equal(found["rows"][name][1], whole)
            assert found["rows"][name][1].dtype == whole.dtype


def test_values_come_to_every_rank(ranks):
    size = len(ranks)
    assert [i for found in ranks for i in found["shard"]] == list(range(35))
    for rank, found in enumerate(ranks):
        assert found["objects"] == (list(range(size)), "of 0")
        assert found["reduced"] == (True, [size * (size + 1) / 2] * 2)
        assert found["tensor"] == [1, 1, 1]
        assert found["main"][0] == ranks[0]["main"][1] and found["main"][2] == (rank == 0)


def set_launcher(monkeypatch, **values):
    for name in distributed.LAUNCHER_SETS:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_all_that_a_launcher_sets_there_is_no_group(monkeypatch):
    set_launcher(monkeypatch, WORLD_SIZE="4")
    assert distributed.init("cpu") == torch.device("cpu") and distributed.world_size() == 1
    set_launcher(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    assert distributed.init("cpu") == torch.device("cpu") and distributed.world_size() == 1
    with pytest.raises(UserError, match="--device tpu"):
        distributed.init("tpu")


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
    distributed.barrier()
    distributed.shutdown()
    assert distributed.shard(5) == range(5) and distributed.on_main(len, "abc") == 3
    a, b = clustering.fit_pca(x, 4), clustering.fit_pca(x, 4, sharded=True)
    np.testing.assert_array_equal(a.matrix, b.matrix)
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(
        clustering.kmeans_distributed(x, k, seed=7).labels, clustering.kmeans(x, k, seed=7).labels
    )
