"""evaluation/ranking.py: average precision by hand, the protocols, the search with its expansions."""

import numpy as np
import pytest

from evaluation.ground_truth import Query
from evaluation.ranking import augment_database, average_precision, precision_at, rank, score
from util import UserError

# -------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("ranking", "positives", "junk", "expected"),
    [
        ("abcd", "ab", "", 1.0),
        # a at place 2: recall 0 -> 1, precision 0 -> 1/2, mean 1/4
        ("xa", "a", "", 0.25),
        # hits at 1 and 3: 1/2 * (1 + 1) / 2 + 1/2 * (1/2 + 2/3) / 2
        ("axb", "ab", "", 0.5 + 0.5 * (1 / 2 + 2 / 3) / 2),
        # junk in front, between and behind is as if it were not there
        ("jxjajj", "a", "j", 0.25),
        ("jabj", "ab", "j", 1.0),
        # a positive that is never found
        ("a", "ab", "", 0.5),
        ("xyz", "a", "", 0.0),
        # hits at 2, 3, 6 of what is not junk: a trapeze each, a third wide
        ("xajbyzjc", "abc", "j", ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3),
    ],
)
def test_average_precision_of_rankings_by_hand(ranking, positives, junk, expected):
    assert average_precision(ranking, positives, junk) == pytest.approx(expected, abs=1e-12)


def test_average_precision_equals_the_sum_over_hits_on_random_rankings():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranking = rng.permutation(60).tolist()
        chosen = rng.permutation(60).tolist()
        positives, junk = set(chosen[: rng.integers(1, 20)]), set(chosen[20 : 20 + rng.integers(0, 20)])
        places = [i for i, item in enumerate(x for x in ranking if x not in junk) if item in positives]
        area = 0.0
        for hit, place in enumerate(places):  # trapezes between consecutive hits, recall step 1 / positives
            before = hit / place if place else 1.0
            area += (before + (hit + 1) / (place + 1)) / 2 / len(positives)
        assert average_precision(ranking, positives, junk) == pytest.approx(area, abs=1e-12)


def test_precision_at_ten_shrinks_to_the_last_positive():
    assert precision_at("abxc", "abc", "") == 3 / 4  # the last positive is at place 4
    assert precision_at("jajb", "ab", "j") == 1.0
    assert precision_at("x" * 12 + "a", "a", "") == 0.0
    assert precision_at("axxxxxxxxxxb", "ab", "") == 1 / 10


def test_revisited_protocols_choose_the_right_lists():
    query = Query("q", "q", (0, 0, 1, 1), {"easy": ["e"], "hard": ["h"], "junk": ["j"]})
    ranking = [["j", "h", "x", "e"]]
    # easy: junk and hard are passed over, x, e: 1/4. hard: h first. medium: h, x, e: both are right
    assert score([query], ranking, "easy")["mAP"] == pytest.approx(25.0)
    assert score([query], ranking, "hard")["mAP"] == pytest.approx(100.0)
    medium = score([query], ranking, "medium")
    assert medium["mAP"] == pytest.approx(100 * (0.5 + 0.5 * (1 / 2 + 2 / 3) / 2))
    assert medium["mP@10"] == pytest.approx(200 / 3)


def test_queries_without_a_right_answer_are_left_out_of_the_mean():
    queries = [
        Query("a", "a", (0, 0, 1, 1), {"easy": ["e"], "hard": [], "junk": []}),
        Query("b", "b", (0, 0, 1, 1), {"easy": [], "hard": ["e"], "junk": []}),
    ]
    easy = score(queries, [["e"], ["e"]], "easy")
    assert easy["queries"] == 1 and easy["AP"] == {"a": 100.0} and easy["mAP"] == 100.0


# -------------------------------------------------------------------------------- search


def unit(*rows: list[float]) -> np.ndarray:
    x = np.array(rows, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_ranking_is_by_dot_product_and_ties_keep_their_order():
    database = unit([0, 1], [1, 0], [1, 0], [1, 1])
    assert rank(unit([1, 0]), database).tolist() == [[1, 2, 3, 0]]


def test_query_expansion_searches_again_with_the_mean():
    # plain: a, b, d, c. Expanded by a, the mean points half way to a, and c passes b and d.
    database = unit([10, 7], [1, -0.75], [1, 3], [1, -1.6])
    assert rank(unit([1, 0]), database).tolist() == [[0, 1, 3, 2]]
    assert rank(unit([1, 0]), database, aqe=1).tolist() == [[0, 2, 1, 3]]
    query = unit([1, 0]) + database[:1]
    assert rank(unit([1, 0]), database, aqe=1).tolist() == np.argsort(-query @ database.T).tolist()


def test_database_side_augmentation_adds_the_nearest_others():
    rng = np.random.default_rng(0)
    database = unit(*rng.standard_normal((30, 5)).tolist())
    database[7] = database[3]  # a duplicate is a neighbour, the row itself is not
    augmented = augment_database(database, 2)
    for i, row in enumerate(database):
        others = sorted((j for j in range(30) if j != i), key=lambda j: -float(database[j] @ row))
        expected = row + database[others[0]] + database[others[1]]
        np.testing.assert_allclose(augmented[i], expected / np.linalg.norm(expected), atol=1e-6)
    assert 7 in np.argsort(-database @ database[3])[:2]
    expected = np.argsort(-unit([1, 0, 0, 0, 0]) @ augmented.T, kind="stable")
    assert rank(unit([1, 0, 0, 0, 0]), database, dbe=2).tolist() == expected.tolist()
    with pytest.raises(UserError, match="only 30 images"):
        rank(database[:1], database, dbe=30)
