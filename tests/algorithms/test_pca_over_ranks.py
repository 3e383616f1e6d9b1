"""One PCA for rows that lie in several processes, against that of one."""

import numpy as np
import pytest

import clustering
from algorithms.pca import fit_pca
from tests import reference
from tests.algorithms.points import cosine_errors
from tests.ranks import error_of, own_rows, spawn

NAMES = ("plain", "half", "few rows", "fewer rows", "low rank", "constant", "uneven")
UNEVEN = {1: (201,), 2: (0, 201), 3: (200, 0, 1)}  # rows of each rank


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


def on_rank(size):
    def preprocess(name, counts=None):
        return clustering.preprocess(own_rows(features_of(name), counts), 12)

    found = {name: preprocess(name, UNEVEN[size] if name == "uneven" else None) for name in NAMES}
    bad = features_of("plain")
    bad[190] = np.nan  # on the last rank only
    return {"pca": found, "again": preprocess("plain"), "error": error_of(fit_pca, own_rows(bad), 4)}


@pytest.fixture(scope="module", params=UNEVEN)
def ranks(request):
    return spawn(on_rank, request.param, request.param)


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


@pytest.mark.parametrize("name", ["plain", "half", "uneven"])
def test_directions_are_those_of_the_float64_reference(ranks, name):
    rows = np.concatenate([found["pca"][name][1] for found in ranks])
    assert cosine_errors(rows, reference.pca_whiten_normalise(features_of(name), 12)).max() < 1e-5


def test_the_same_processes_give_the_same_bits(ranks):
    for found in ranks:
        np.testing.assert_array_equal(found["again"][0].matrix, found["pca"]["plain"][0].matrix)
        np.testing.assert_array_equal(found["again"][1], found["pca"]["plain"][1])


def test_a_feature_that_is_not_finite_is_named_on_every_rank(ranks):
    for found in ranks:
        assert "image 190 is not finite" in found["error"]
