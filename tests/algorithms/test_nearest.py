"""Exact search by Faiss, against subtraction in float64."""

import numpy as np
import pytest

from algorithms.nearest import assign, check_points, nearest
from tests import reference
from tests.algorithms.points import blobs
from tests.helpers import refuses


@pytest.mark.parametrize("count", [1, 4])
def test_the_nearest_points_come_first(count):
    points, queries = blobs(300, 16, 10, 0.4), blobs(50, 16, 10, 0.4, seed=1)
    distances, indexes = nearest(queries, points, count, "cpu")
    expected = reference.squared_distances(queries, points)
    assert np.array_equal(indexes, np.argsort(expected, axis=1)[:, :count])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :count], atol=1e-5)
    assert distances.dtype == np.float32 and indexes.dtype == np.int64


def test_points_in_any_memory_order_and_themselves_at_distance_zero():
    points = np.asfortranarray(blobs(100, 8, 5, 0.3))
    labels, distances = assign(points[::2], points)
    assert labels.tolist() == list(range(0, 100, 2))
    assert (distances >= 0).all() and distances.max() < 1e-5


@pytest.mark.parametrize("x", [np.zeros((0, 3), np.float32), np.zeros((3, 3)), np.zeros(3, np.float32)])
def test_points_of_another_kind_are_refused(x):
    with pytest.raises(ValueError, match="float32 points"):
        check_points(x)
    with pytest.raises(ValueError, match="float32 points"):
        assign(x, blobs(4, 3, 2, 0.1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite_are_refused(bad):
    x = blobs(20, 4, 3, 0.5)
    x[3, 1] = bad
    with refuses("not finite"):
        assign(x, blobs(4, 4, 2, 0.1))
