"""What clusters know of classes: the figures of the field, with intervals by resampling the images.

judge(table) and judge(table_of_val, map_of_train) take a Contingency (algorithms/agreement.py), so that a
million images cost what their filled cells cost.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from algorithms.agreement import Contingency
from util import derive_seed

# In the order of tables: under what name results hold a figure, and its title.
TITLES = {
    "nmi_arithmetic": "NMI",
    "nmi": "NMI geom.",
    "ami": "AMI",
    "ari": "ARI",
    "acc": "ACC 1:1",
    "purity": "purity",
    "many_to_one": "ACC n:1",
}
MEANING = (
    "NMI over the arithmetic mean of the entropies, NMI geom. over the geometric one; ACC 1:1 the best "
    "one-to-one map from clusters to classes (Hungarian); purity the most frequent class of each cluster; "
    "ACC n:1 the most frequent class that each cluster has in train, on val"
)
COVERAGE = 0.95


def judge(
    table: Contingency,
    map_of_train: np.ndarray | None = None,
    draws: int = 0,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The figures of TITLES (many_to_one: with map_of_train alone) and, with draws, "intervals" of each.

    map_of_train: a class a cluster, learned on other images (Contingency.most_frequent_class). tick is called
    after each draw.
    """
    maps = {"acc": table.best_one_to_one(), "purity": table.most_frequent_class()}
    if map_of_train is not None:
        maps["many_to_one"] = map_of_train
    found = figures(table, maps)
    if draws:
        return found | {"intervals": intervals(table, maps, found, draws, seed, tick)}
    return found


def figures(table: Contingency, maps: dict[str, np.ndarray]) -> dict[str, float]:
    """The scores of the table, and the accuracy under each map."""
    return table.scores() | {name: table.accuracy(mapping) for name, mapping in maps.items()}


def intervals(
    table: Contingency,
    maps: dict[str, np.ndarray],
    found: dict[str, float],
    draws: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """A 95 % interval of each figure: how far it moves from one set of so many images to another.

    The bootstrap: as many images are drawn with replacement, which for a table is a multinomial draw over its
    cells; clusters and maps stay. Drawing again raises plug-in figures such as NMI by a bias of its own, so
    the percentiles are taken around the mean of the draws and laid around the figure.
    """
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    shares = table.counts / table.total
    drawn: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(draws):
        again = table.with_counts(rng.multinomial(table.total, shares))
        for name, value in figures(again, maps).items():
            drawn[name].append(value)
        tick()
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    least = {name: -1.0 if name in ("ami", "ari") else 0.0 for name in found}
    return {
        name: np.clip(found[name] + np.quantile(values, tails) - np.mean(values), least[name], 1.0).tolist()
        for name, values in drawn.items()
    }


def table_lines(names: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table, a row a name; intervals stand below their figures."""
    width = max(map(len, names))
    titles = {key: title for key, title in TITLES.items() if any(key in row for row in rows)}
    lines = [f"{'':<{width}}" + "".join(f"{title:>15}" for title in titles.values())]
    for name, row in zip(names, rows):
        lines.append(
            f"{name:<{width}}"
            + "".join(f"{row[key]:15.3f}" if key in row else f"{'-':>15}" for key in titles)
        )
        spans = {key: "{:.3f}-{:.3f}".format(*span) for key, span in row.get("intervals", {}).items()}
        if spans:
            lines.append(f"{'':<{width}}" + "".join(f"{spans.get(key, ''):>15}" for key in titles))
    return lines
