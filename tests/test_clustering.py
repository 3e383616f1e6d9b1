"""PCA-whitening, k-means, power iteration clustering and the measures, against plain implementations."""

import subprocess
import sys
import warnings
from pathlib import Path

import faiss
import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

import clustering
from clustering import (
    CLUSTERINGS,
    Assignment,
    PCAWhitening,
    assign,
    cluster_sizes,
    compare,
    fit_pca,
    kmeans,
    nearest_neighbours,
    normalise_rows,
    pic,
    pic_labels,
    preprocess,
)
from tests import reference
from util import UserError


def decaying_features(n: int, d: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Correlated columns with a mean of their own and a spectrum that falls like that of real features."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) / np.arange(1, d + 1)[:, None] ** 0.7
    return (rng.standard_normal((n, d)) @ mixing + 3 * rng.standard_normal(d)).astype(dtype)


def blobs(n: int, d: int, centres: int, spread: float, seed: int = 0) -> np.ndarray:
    """Unit vectors around `centres` random directions, (n, d) float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((centres, d))[rng.integers(0, centres, n)] + spread * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cosine_errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the inner products of rows differ: free of signs and rotations."""
    x, y = x[:1000].astype(np.float64), y[:1000].astype(np.float64)
    return np.abs(x @ x.T - y @ y.T)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings differ by names only."""
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))


# ---------------------------------------------------------------------------------------- PCA


@pytest.mark.parametrize("n, d, dim", [(3000, 600, 64), (300, 40, 40), (200, 500, 64), (257, 256, 100)])
def test_pca_gives_the_directions_of_the_float64_reference(n, d, dim):
    features = decaying_features(n, d)
    pca, x = preprocess(features, dim)
    assert x.shape == (n, dim) and x.dtype == np.float32 and pca.dim == dim
    assert cosine_errors(x, reference.pca_whiten_normalise(features, dim)).mean() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_pca_gives_the_directions_of_faiss():
    features = decaying_features(2000, 300)
    matrix = faiss.PCAMatrix(300, 64, -0.5)
    matrix.train(features)
    theirs = matrix.apply(features)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    errors = cosine_errors(preprocess(features, 64)[1], theirs)
    assert errors.mean() < 2e-5 and errors.max() < 1e-3  # the larger part of it is faiss's own


def test_whitened_features_are_uncorrelated_with_variance_one():
    features = decaying_features(4000, 200)
    whitened = fit_pca(features, 32).apply(features)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(whitened.T @ whitened / 4000, np.eye(32), atol=1e-4)


def test_float16_features_take_the_iterative_solver_to_the_same_directions(monkeypatch):
    features = decaying_features(2000, 600, np.float16)
    iterative = clustering._eigen_iterative
    calls = []
    monkeypatch.setattr(clustering, "_eigen_iterative", lambda *args: calls.append(1) or iterative(*args))
    x = preprocess(features, 64)[1]
    assert calls == [1]
    assert cosine_errors(x, reference.pca_whiten_normalise(features, 64)).mean() < 1e-6


def test_chunks_do_not_change_the_result(monkeypatch):
    features = decaying_features(500, 60)
    whole = preprocess(features, 16)[1]
    monkeypatch.setattr(clustering, "CHUNK_BYTES", 8 * 60 * 7)  # 7 rows at a time, the last chunk shorter
    monkeypatch.setattr(clustering, "STRIPE_ROWS", 25)
    assert cosine_errors(preprocess(features, 16)[1], whole).max() < 1e-5


@pytest.mark.parametrize("n, d, rank", [(400, 100, 7), (80, 100, 7), (30, 100, 60), (30, 20, 60)])
def test_pca_keeps_no_more_than_the_rank(n, d, rank):
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + 5).astype(np.float32)
    pca, x = preprocess(features, 256)
    assert pca.dim == min(rank, n - 1, d)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n, d", [(50, 20), (20, 50), (1, 5)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_constant_features_give_zeros(value, n, d, dtype):
    pca, x = preprocess(np.full((n, d), value, dtype), 8)
    assert x.shape == (n, 1) and pca.dim == 1
    assert not x.any()


def test_constant_columns_and_zero_rows_give_finite_numbers():
    features = decaying_features(300, 50)
    features[:, ::3] = 0.7
    features[10:20] = 0
    _, x = preprocess(features, 256)
    assert np.isfinite(x).all() and x.shape[1] == 33 + 1  # the zero rows differ from 0.7
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_normalisation_is_in_place_and_leaves_zero_rows():
    x = np.array([[3, 4], [0, 0], [1e-30, 0]], np.float32)
    assert normalise_rows(x) is x
    np.testing.assert_allclose(x, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_not_finite_is_named(bad):
    features = decaying_features(60, 10)
    features[37, 4] = bad
    with pytest.raises(UserError, match="image 37 "):
        fit_pca(features, 4)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5,)])
def test_features_of_no_size_are_refused(shape):
    with pytest.raises(ValueError, match="PCA"):
        fit_pca(np.zeros(shape, np.float32), 4)


def test_features_are_only_read_and_may_be_a_memory_map(tmp_path):
    features = decaying_features(200, 30)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = preprocess(mapped, 8)[1]
    before = features.copy()
    assert np.array_equal(preprocess(features, 8)[1], x)
    assert np.array_equal(features, before)


def test_pca_survives_its_state_and_refuses_other_widths():
    features = decaying_features(200, 30)
    pca = fit_pca(features, 8)
    again = PCAWhitening.from_state_dict(pca.state_dict())
    assert np.array_equal(again.apply(features), pca.apply(features))
    with pytest.raises(ValueError, match="30"):
        pca.apply(features[:, :20])


MEMORY_PROBE = """
import resource, sys
import numpy as np
from clustering import preprocess
n, d, dtype = 40000, 1024, np.dtype(sys.argv[1])
preprocess(np.random.default_rng(0).standard_normal((300, 64)).astype(dtype), 8)  # load the libraries
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
features = np.empty((n, d), dtype)
block = np.random.default_rng(0).standard_normal((1000, d)).astype(dtype)
for start in range(0, n, 1000):
    features[start:start + 1000] = np.roll(block, start // 1000, axis=1)
preprocess(features, 32)
print((peak() - before) / (n * d * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units")
@pytest.mark.parametrize("dtype, limit", [("float32", 1.25), ("float16", 0.65)])
def test_features_are_held_once(dtype, limit):
    probe = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(clustering.__file__).parent,
    )
    assert float(probe.stdout) < limit


# ---------------------------------------------------------------------------------------- k-means


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


def test_kmeans_labels_are_the_nearest_centroids():
    x = blobs(500, 16, 10, 0.4)
    result = kmeans(x, 12, seed=1)
    distances = reference.squared_distances(x, result.centroids)
    assert np.array_equal(result.labels, distances.argmin(axis=1))
    np.testing.assert_allclose(result.distances, distances.min(axis=1), atol=1e-5)
    assert result.labels.dtype == np.int64 and result.distances.dtype == np.float32
    labels, squared = assign(x, result.centroids)
    assert np.array_equal(labels, result.labels) and np.array_equal(squared, result.distances)


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


def test_cluster_sizes_are_those_of_the_non_empty_clusters():
    labels = np.array([0, 0, 0, 0, 2, 2, 4, 4])
    found = cluster_sizes(Assignment(labels, 6, 0.0, np.zeros(8, np.float32), np.zeros((6, 2), np.float32)))
    assert (found["nonempty"], found["min"], found["median"], found["max"]) == (3, 2, 2, 4)
    assert found["entropy"] == pytest.approx(1.5 * np.log(2))


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


# ---------------------------------------------------------------------------------------- PIC


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


# ---------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    "n, ka, kb", [(40, 3, 5), (1000, 30, 7), (1000, 400, 300), (3000, 2, 3), (50, 50, 1)]
)
def test_nmi_and_ami_equal_scikit_learn(n, ka, kb):
    rng = np.random.default_rng(n + ka)
    a = rng.integers(0, ka, n)
    for b in (rng.integers(0, kb, n), np.where(rng.random(n) < 0.6, a % kb, rng.integers(0, kb, n))):
        ours = compare(a + 3, b)  # ids need not begin at 0
        assert ours["nmi"] == pytest.approx(
            normalized_mutual_info_score(a, b, average_method="geometric"), abs=1e-9
        )
        assert ours["ami"] == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-9)


def test_ami_of_large_clusters_equals_scikit_learn():
    # large clusters: the sum over shared rows is cut to a window around its mean
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 60000) ** 2 // 3, rng.integers(0, 300, 60000)
    assert compare(a, b)["ami"] == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-9)


def test_comparison_of_equal_and_of_trivial_labels():
    labels = np.array([0, 0, 1, 1, 2])
    assert compare(labels, 5 - labels) == pytest.approx({"nmi": 1.0, "ami": 1.0})
    assert compare(np.zeros(5, int), np.zeros(5, int)) == {"nmi": 1.0, "ami": 1.0}
    assert compare(np.zeros(5, int), labels) == pytest.approx({"nmi": 0.0, "ami": 0.0})
    with pytest.raises(ValueError, match="cannot compare"):
        compare(labels, labels[:3])
