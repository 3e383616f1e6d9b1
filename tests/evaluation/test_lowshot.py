"""evaluation/lowshot.py: what is drawn, the SVM's problem, how its cost is chosen, processes."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from algorithms.pca import normalise_rows
from evaluation import lowshot
from evaluation.lowshot import ALL, Journal, draw_images, judge_class, tasks_of


def points(n=60, dim=8, seed=0):
    """Unit rows, and labels (n, 3) of which the first column is told by the first coordinates."""
    rng = np.random.default_rng(seed)
    x = normalise_rows(rng.standard_normal((n, dim)).astype(np.float32))
    noise = rng.normal(0, 0.2, (n, 3))
    return x, np.where(x[:, :3] + noise > 0.25, 1, -1).astype(np.int8)


def test_k_positives_and_their_negatives_are_drawn():
    labels = np.array([1] * 10 + [-1] * 50 + [0] * 7, np.int8)
    rows = draw_images(labels, 4, 3, seed=1)
    assert (labels[rows] == 1).sum() == 4 and (labels[rows] == -1).sum() == 12 and len(set(rows)) == 16
    assert np.array_equal(rows, draw_images(labels, 4, 3, seed=1))
    assert not np.array_equal(rows, draw_images(labels, 4, 3, seed=2))
    assert (labels[draw_images(labels, 10, 19, 1)] == -1).sum() == 50  # all there are
    assert draw_images(labels, ALL, 3, 1).tolist() == list(range(60))


def test_svm_solves_the_weighted_problem():
    """1/2 |w|^2 + C sum of weight * max(0, 1 - y (w x + b))^2, b among w, weight 2 for positives."""
    x, labels = points()
    present = labels[:, 0] == 1
    sign, weight = np.where(present, 1.0, -1.0), np.where(present, 2.0, 1.0)
    rows = np.hstack([x.astype(np.float64), np.ones((60, 1))])

    def objective(w):
        hinge = np.maximum(0, 1 - sign * (rows @ w))
        return w @ w / 2 + 0.5 * (weight * hinge**2).sum(), w - rows.T @ (weight * hinge * sign)

    best = minimize(objective, np.zeros(9), jac=True, tol=1e-10).x
    svm = lowshot.train_svm(x.astype(np.float64), present, 0.5, seed=0)
    np.testing.assert_allclose([*svm.coef_[0], svm.intercept_[0]], best, atol=2e-3)


def test_cost_is_that_of_scikit_learns_cross_validation():
    x, labels = points()
    x, present = x.astype(np.float64), labels[:, 0] == 1
    costs = [1e-3, 1e-1, 1.0, 10.0]
    means = [
        cross_val_score(
            LinearSVC(C=c, class_weight={True: 2.0, False: 1.0}, dual=True, max_iter=2000, random_state=0),
            x,
            present,
            cv=3,
            scoring="average_precision",
        ).mean()
        for c in costs
    ]
    assert len(set(means)) > 1
    assert lowshot.choose_cost(x, present, costs, 0) == (costs[int(np.argmax(means))], 3)


def test_of_one_positive_there_are_no_folds_and_of_two_there_are_two():
    x = np.eye(6)
    present = np.array([1, 0, 0, 0, 0, 0], bool)
    assert lowshot.choose_cost(x, present, [0.1, 10.0], 0) == (lowshot.ONE_SHOT_COST, 0)
    assert lowshot.choose_cost(x, present, [0.1], 0) == (0.1, 0)
    present[1] = True
    assert lowshot.choose_cost(x, present, [0.1, 10.0], 0)[1] == 2


def test_ignored_images_count_neither_in_training_nor_in_testing():
    x, labels = points()
    test_x, test_labels = points(seed=1)
    labels[:5, 0], test_labels[:9, 0] = 0, 0
    rows = draw_images(labels[:, 0], ALL, 2, 0)
    found = judge_class(x, labels[:, 0], test_x, test_labels[:, 0], rows, [1.0], 0)
    svm = lowshot.train_svm(x[5:].astype(np.float64), labels[5:, 0] == 1, 1.0, 0)
    expected = average_precision_score(test_labels[9:, 0] == 1, svm.decision_function(test_x[9:]))
    assert found["ap"] == pytest.approx(100 * expected) and found["ap"] > 60
    nothing = judge_class(x, labels[:, 0], test_x, -abs(test_labels[:, 0]), rows, [1.0], 0)
    assert nothing["ap"] is None


def test_processes_give_what_one_gives_and_draws_are_the_same_for_every_layer(tmp_path):
    x, labels = points()
    test_x, test_labels = points(seed=1)
    names, found = ["a", "b", "c"], {}
    for layer, processes in (("one", 1), ("two", 2)):
        journal = Journal(tmp_path / layer, {}, False)
        tasks = tasks_of([layer], [2, ALL], 2, names)
        assert len(tasks) == 3 * (2 + 1)
        lowshot.run_tasks(
            tasks, journal, (x, test_x), (labels, test_labels), names, [0.1, 1.0], 31, processes, lambda: None
        )
        found[layer] = lowshot.summarise(journal, layer, [2, ALL], 2, names)
    assert found["one"] == found["two"]
    assert len(set(found["one"]["2"]["draws"])) == 2  # two draws differ
