"""algorithms/agreement.py: accuracy under the best one-to-one map from clusters to classes."""

import numpy as np

from algorithms.agreement import hungarian_accuracy


def test_hungarian_accuracy_of_a_permutation_is_one():
    classes = np.array([0, 0, 1, 1, 2, 2, 2])
    assert hungarian_accuracy(np.array([2, 1, 0])[classes], classes) == 1.0


def test_hungarian_accuracy_worked_out_by_hand():
    classes = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    # Cluster 0 holds classes 0 0 1, cluster 1 holds 0 1 1 2, cluster 2 holds 2: 2 + 2 + 1 of 8.
    assert hungarian_accuracy(np.array([0, 0, 1, 1, 1, 0, 1, 2]), classes) == 5 / 8
    # Both clusters prefer class 0 (3 + 2 by majority), but only one may have it: 3 + 1, not 3 + 2.
    classes, labels = np.array([0, 0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    assert hungarian_accuracy(labels, classes) == 4 / 6


def test_hungarian_accuracy_leaves_surplus_clusters_without_a_class():
    assert hungarian_accuracy(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])) == 2 / 4
