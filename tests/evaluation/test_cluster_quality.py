"""Clusters against classes: scikit-learn's figures, tables worked out by hand, intervals that cover."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from algorithms.agreement import Contingency
from evaluation.cluster_quality import judge, table_lines


def drawn(n, k, c, seed, noise=0.5):
    """Labels and classes (n,) that agree in part."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return labels, np.where(rng.random(n) < noise, rng.integers(0, c, n), labels % c)


@pytest.mark.parametrize(
    "n, k, c", [(300, 7, 4), (300, 4, 9), (500, 90, 5), (40, 40, 3), (60, 3, 1), (1, 1, 1)]
)
def test_scores_equal_scikit_learns(n, k, c):
    labels, classes = drawn(n, k, c, seed=n + k)
    scores = Contingency.of(labels, classes).scores()
    expected = {
        "nmi": normalized_mutual_info_score(classes, labels, average_method="geometric"),
        "nmi_arithmetic": normalized_mutual_info_score(classes, labels),
        "ami": adjusted_mutual_info_score(classes, labels),
        "ari": adjusted_rand_score(classes, labels),
    }
    assert scores == pytest.approx(expected, abs=1e-9)


def test_a_table_worked_out_by_hand():
    # Cluster 0: three of class 0, one of 1; cluster 1: two of 0, one of 2; 2: nothing; 3: one of 1.
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 3])
    classes = np.array([0, 0, 0, 1, 0, 0, 2, 1])
    table = Contingency.of(labels, classes)
    assert table.most_frequent_class().tolist() == [0, 0, -1, 1]
    assert table.accuracy(table.most_frequent_class()) == 6 / 8
    assert table.accuracy(table.best_one_to_one()) == 5 / 8  # 0 -> 0, 1 -> 2, 3 -> 1
    val = Contingency.of(np.array([0, 1, 2, 4]), np.array([0, 2, 1, 0]))
    found = judge(val, table.most_frequent_class())
    assert found["many_to_one"] == 1 / 4  # clusters without an image of train stand for no class
    assert found["purity"] == 1.0


def test_of_equally_frequent_classes_the_first_counts():
    table = Contingency.of(np.array([0, 0, 0, 0]), np.array([5, 2, 5, 2]))
    assert table.most_frequent_class().tolist() == [2]


def test_figures_do_not_depend_on_the_numbering():
    labels, classes = drawn(400, 12, 5, seed=0)
    rng = np.random.default_rng(1)
    found = judge(Contingency.of(labels, classes))
    again = judge(Contingency.of(rng.permutation(30)[labels], rng.permutation(5)[classes]))
    assert again == pytest.approx(found, abs=1e-12)
    order = rng.permutation(400)
    assert judge(Contingency.of(labels[order], classes[order])) == found


def test_perfect_clusters_are_one_in_every_figure_and_interval():
    classes = np.repeat(np.arange(5), 20)
    found = judge(Contingency.of(4 - classes, classes), np.arange(5)[::-1], draws=50)
    spans = found.pop("intervals")
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert all(span == pytest.approx([1, 1]) for span in spans.values())


def test_same_seed_same_intervals():
    table = Contingency.of(*drawn(200, 6, 4, seed=3))
    one, two, other = (judge(table, draws=40, seed=seed)["intervals"] for seed in (1, 1, 2))
    assert one == two != other


def test_intervals_cover_what_sets_of_this_size_give():
    """Of 80 sets from one distribution, about 95 % have an interval around the mean figure of all sets."""
    sets = [Contingency.of(*drawn(300, 20, 4, seed)) for seed in range(80)]
    judged = [judge(table, np.arange(20) % 4, draws=60, seed=i) for i, table in enumerate(sets)]
    truth = {name: np.mean([found[name] for found in judged]) for name in judged[0]["intervals"]}
    assert truth["many_to_one"] == pytest.approx(0.625, abs=0.01)  # half + a quarter of the noise
    for name, true in truth.items():
        covered = [low <= true <= high for low, high in (found["intervals"][name] for found in judged)]
        assert 0.82 <= np.mean(covered) <= 1.0, (name, np.mean(covered))
    width = np.mean([np.diff(found["intervals"]["many_to_one"]) for found in judged])
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.625 * 0.375 / 300), rel=0.1)  # of a binomial


def test_a_figure_that_a_row_lacks_is_a_dash():
    lines = table_lines(
        ["a", "b"], [{"ami": 0.5}, {"ami": 0.25, "intervals": {"ami": [0.1, 0.4]}, "acc": 1.0}]
    )
    assert len(lines) == 4 and "-" in lines[1] and "0.100-0.400" in lines[3]
