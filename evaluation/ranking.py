"""Search and scores of image retrieval: ranking by descriptors, average precision.

Average precision is that of the program of the Oxford group (Philbin et al., CVPR 2007); the protocols easy,
medium and hard and the precision at 10 are those of Radenovic et al., CVPR 2018.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from evaluation.ground_truth import Query
from util import UserError

# Which lists of a query are right answers, and which are passed over as if they were not there.
PROTOCOLS = {
    "classic": (("ok", "good"), ("junk",)),
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
REVISITED = ("easy", "medium", "hard")


def rank(queries: np.ndarray, database: np.ndarray, aqe: int = 0, dbe: int = 0) -> np.ndarray:
    """Database indexes for each query, best first: (Q, N) int64. Rows (Q, d) and (N, d) have norm 1.

    dbe first adds to each image its dbe nearest neighbours; aqe searches twice, the second time with the mean
    of the query and its aqe best images. Equal scores keep the order of the database.
    """
    for name, k in (("aqe", aqe), ("dbe", dbe)):
        if k >= len(database):
            raise UserError(f"--{name} {k}: the database has only {len(database)} images")
    if dbe:
        database = augment_database(database, dbe)
    if aqe:
        best = _by_score(queries @ database.T)[:, :aqe]
        queries = _unit(queries + database[best].sum(axis=1))
    return _by_score(queries @ database.T)


def augment_database(database: np.ndarray, k: int) -> np.ndarray:
    """Each row (d,) of norm 1 becomes the normalised sum of itself and its k nearest other rows."""
    augmented = np.empty_like(database)
    for start in range(0, len(database), 1000):
        rows = np.arange(start, min(start + 1000, len(database)))
        scores = database[rows] @ database.T
        scores[np.arange(len(rows)), rows] = -np.inf  # not its own neighbour
        augmented[rows] = database[rows] + database[_by_score(scores)[:, :k]].sum(axis=1)
    return _unit(augmented)


def _by_score(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def average_precision(ranking: Iterable[Any], positives: Iterable[Any], junk: Iterable[Any]) -> float:
    """Average precision as the Oxford group's program computes it: the area under the precision-recall curve.

    Junk is passed over as if it were not in the ranking. Between two points the curve is a straight line; it
    starts at recall 0, precision 1. Positives that the ranking lacks count as not found. 0 without positives.
    """
    positives, junk = set(positives), set(junk)
    area, hits, seen = 0.0, 0, 0
    last_recall, last_precision = 0.0, 1.0
    for item in ranking:
        if item in junk:
            continue
        seen += 1
        hits += item in positives
        recall, precision = hits / max(len(positives), 1), hits / seen
        area += (recall - last_recall) * (last_precision + precision) / 2
        last_recall, last_precision = recall, precision
    return area


def precision_at(ranking: Iterable[Any], positives: Iterable[Any], junk: Iterable[Any], k: int = 10) -> float:
    """Precision among the first k that are not junk; k shrinks to the place of the last positive.

    As in the revisited protocol, so that a query with fewer than k positives can reach 1.
    """
    positives, junk = set(positives), set(junk)
    hits = [item in positives for item in ranking if item not in junk]
    places = np.flatnonzero(hits) + 1
    if len(places) == 0:
        return 0.0
    k = min(k, int(places[-1]))
    return float((places <= k).sum() / k)


def score(queries: list[Query], rankings: list[list[str]], protocol: str) -> dict[str, Any]:
    """mAP, mP@10 and the average precision of each query, in percent, under one of PROTOCOLS.

    A query without a right answer under the protocol is left out of the means, as in the revisited benchmark.
    """
    right, passed_over = PROTOCOLS[protocol]
    precisions, at_10 = {}, []
    for query, ranking in zip(queries, rankings, strict=True):
        positives = [name for kind in right for name in query.lists[kind]]
        junk = [name for kind in passed_over for name in query.lists[kind]]
        if positives:
            precisions[query.name] = 100 * average_precision(ranking, positives, junk)
            at_10.append(100 * precision_at(ranking, positives, junk))
    if not at_10:
        raise UserError(f"no query has a right answer under the protocol '{protocol}'")
    mean = float(np.mean(list(precisions.values())))
    return {"mAP": mean, "mP@10": float(np.mean(at_10)), "queries": len(at_10), "AP": precisions}
