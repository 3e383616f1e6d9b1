"""PCA-whitening against the float64 reference and Faiss."""

import subprocess
import sys
import warnings

import faiss
import numpy as np
import pytest

from algorithms import pca
from algorithms.pca import PCAWhitening, fit_pca, normalise_rows
from tests import reference
from tests.algorithms.points import cosine_errors, decaying_features
from tests.helpers import ROOT
from util import UserError


def whitened(features, dim):
    """The PCA and the rows of norm 1, as clustering.preprocess without its limit for few images."""
    fitted = fit_pca(features, dim)
    return fitted, normalise_rows(fitted.apply(features))


@pytest.mark.parametrize("n, d, dim", [(3000, 600, 64), (300, 40, 40), (200, 500, 64), (257, 256, 100)])
def test_pca_gives_the_directions_of_the_float64_reference(n, d, dim):
    features = decaying_features(n, d)
    fitted, x = whitened(features, dim)
    assert x.shape == (n, dim) and x.dtype == np.float32 and fitted.dim == dim
    assert cosine_errors(x, reference.pca_whiten_normalise(features, dim)).mean() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_pca_gives_the_directions_of_faiss():
    features = decaying_features(2000, 300)
    matrix = faiss.PCAMatrix(300, 64, -0.5)
    matrix.train(features)
    theirs = matrix.apply(features)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    errors = cosine_errors(whitened(features, 64)[1], theirs)
    assert errors.mean() < 2e-5 and errors.max() < 1e-3  # the larger part of it is faiss's own


def test_whitened_features_are_uncorrelated_with_variance_one():
    features = decaying_features(4000, 200)
    whitened = fit_pca(features, 32).apply(features)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(whitened.T @ whitened / 4000, np.eye(32), atol=1e-4)


@pytest.mark.parametrize(
    "n, d, dim", [(2000, 600, 64), pytest.param(2100, 4096, 256, marks=pytest.mark.slow)]
)
def test_float16_features_give_the_directions_of_float64(n, d, dim):
    features = decaying_features(n, d, np.float16)
    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    _, left = np.linalg.eigh(x @ x.T)  # left singular vectors are the whitened rows, up to one factor
    expected = left[:, -dim:] / np.linalg.norm(left[:, -dim:], axis=1, keepdims=True)
    assert cosine_errors(whitened(features, dim)[1], expected).max() < 1e-5


def test_chunks_do_not_change_the_result(monkeypatch):
    features = decaying_features(500, 60)
    whole = whitened(features, 16)[1]
    monkeypatch.setattr(pca, "CHUNK_BYTES", 8 * 60 * 7)  # 7 rows at a time, the last chunk shorter
    monkeypatch.setattr(pca, "STRIPE_ROWS", 25)
    assert cosine_errors(whitened(features, 16)[1], whole).max() < 1e-5


@pytest.mark.parametrize("n, d, rank", [(400, 100, 7), (80, 100, 7), (30, 100, 60), (30, 20, 60)])
def test_pca_keeps_no_more_than_the_rank(n, d, rank):
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + 5).astype(np.float32)
    fitted, x = whitened(features, 256)
    assert fitted.dim == min(rank, n - 1, d)
    assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n, d", [(50, 20), (20, 50), (1, 5)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_constant_features_give_zeros(value, n, d, dtype):
    fitted, x = whitened(np.full((n, d), value, dtype), 8)
    assert x.shape == (n, 1) and fitted.dim == 1
    assert not x.any()


def test_constant_columns_and_zero_rows_give_finite_numbers():
    features = decaying_features(300, 50)
    features[:, ::3] = 0.7
    features[10:20] = 0
    _, x = whitened(features, 256)
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
        x = whitened(mapped, 8)[1]
    before = features.copy()
    assert np.array_equal(whitened(features, 8)[1], x)
    assert np.array_equal(features, before)


def test_pca_survives_its_state_and_refuses_other_widths():
    features = decaying_features(200, 30)
    fitted = fit_pca(features, 8)
    again = PCAWhitening.from_state_dict(fitted.state_dict())
    assert np.array_equal(again.apply(features), fitted.apply(features))
    with pytest.raises(ValueError, match="30"):
        fitted.apply(features[:, :20])


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
        cwd=ROOT,
    )
    assert float(probe.stdout) < limit


@pytest.mark.parametrize("dim, kept", [(40, True), (39, False)])
def test_with_overwrite_all_dimensions_take_the_place_of_the_features(dim, kept):
    features = decaying_features(900, 40)
    fitted = fit_pca(features, dim)
    expected = fitted.apply(features)
    own = features.copy()
    found = fitted.apply(own, overwrite=True)
    np.testing.assert_array_equal(found, expected)
    assert np.shares_memory(found, own) == kept
    if not kept:
        np.testing.assert_array_equal(own, features)
