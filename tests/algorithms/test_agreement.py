"""NMI, AMI and cluster sizes against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from algorithms.agreement import compare, describe_sizes


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


def test_cluster_sizes_are_those_of_the_non_empty_clusters():
    labels = np.array([0, 0, 0, 0, 2, 2, 4, 4])
    found = describe_sizes(np.bincount(labels, minlength=6))
    assert found["number"] == 6
    assert (found["nonempty"], found["min"], found["median"], found["max"]) == (3, 2, 2, 4)
    assert found["entropy"] == pytest.approx(1.5 * np.log(2))
