"""What the evaluations of several runs say, row by row: from results.json of whatever evaluator.

A figure is a number somewhere in an evaluator's results; its name is the way to it. The figures of random
networks and other baselines stand apart from the run's own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.cluster_quality import TITLES
from visu.pages import printable
from visu.records import value
from visu.run_groups import Entry, OneRun, Rows, split_rows
from visu.summary import show

OWN, RANDOM, BASELINE = "run", "random", "baseline"  # whose figure it is
NAMING = ("layer", "head", "split", "name")  # what names an item of a list of results
# No figures: places, sizes, lists of what a mean is of.
DROPPED = {"epoch", "steps", "values", "size", "images", "intervals", "draws", "queries", "network"}
# Folded: figures of a part, such as of one class, by what holds them, and what is no measure of quality.
PARTS = {"train", "classes", "by class", "trainings", "AP", "AP_11point", "IoU"}
ASIDE = {"loss", "classes", "clusters", "std", "deviation", "lowest", "highest"}
SILENT = {"val", "mean"}  # words that say nothing in a name
MOST = 40  # rows of a table that are not folded
MOST_DRAWN = 8  # rows of a chart
# What a chart shows first, by words in the names.
TOLD_FIRST = ("best prec@1", "prec@1", "mAP", "AP50", "mIoU", "kNN@", "AMI", "ACC 1:1")
LAST = re.compile(r"\blast prec@")  # of a probe, where its best epoch is told


@dataclass
class Row:
    """One figure of all entries: entry -> whose -> the values of its runs."""

    name: str
    first: bool  # not folded
    cells: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def values(self, whose: str | None = None) -> list[float]:
        """Those of all entries, of anybody or of one."""
        return [x for cell in self.cells.values() for w, xs in cell.items() if whose in (w, None) for x in xs]

    @property
    def largest(self) -> float:
        return max(map(abs, self.values()), default=0.0)


@dataclass
class Evaluation:
    """The figures of one evaluator for all entries, and the protocols that they were made by."""

    kind: str
    rows: list[Row]
    there: list[int]  # entries that have it, by their place
    differ: Rows  # of the protocols of these
    equal: Rows

    @property
    def first(self) -> list[Row]:
        return [row for row in self.rows if row.first][:MOST]

    def form(self, row: Row) -> str:
        """How a row's values are written: percents with two digits, where all are shares with three."""
        shares = all(other.largest <= 1 for other in (self.first or self.rows))
        return ".3f" if shares and row.largest <= 1 else ".2f" if row.largest < 1000 else ",.4g"

    @property
    def drawn(self) -> list[Row]:
        """The rows for a chart: shares or percents, and of TOLD_FIRST where there are any of them."""
        rows = [row for row in self.first if row.largest <= 100]
        rows = [row for row in rows if rank(row.name) < len(TOLD_FIRST)] or rows
        chosen = sorted(rows, key=lambda row: rank(row.name))[:MOST_DRAWN]
        return [row for row in rows if any(row is other for other in chosen)]

    @property
    def folded(self) -> list[Row]:
        shown = {id(row) for row in self.first}
        return [row for row in self.rows if id(row) not in shown]


def compare_evaluations(entries: Sequence[Entry]) -> list[Evaluation]:
    """An Evaluation for each evaluator that some run has."""
    by_run = {id(run): evaluations_of(run) for entry in entries for run in entry.runs}
    kinds = dict.fromkeys(kind for found in by_run.values() for kind in found)
    return [one_evaluation(kind, entries, by_run) for kind in kinds]


def one_evaluation(kind: str, entries: Sequence[Entry], by_run: dict[int, dict[str, list]]) -> Evaluation:
    """The rows of one evaluator."""
    rows: dict[str, Row] = {}
    protocols: dict[int, dict[str, str]] = {}
    for number, entry in enumerate(entries):
        for run in entry.runs:
            for content in by_run[id(run)].get(kind, []):
                protocol = protocol_of(content)
                if of_a_random_network(protocol) is False or id(run) not in protocols:
                    protocols[id(run)] = in_words(protocol, run)
                for path, whose, number_found in numbers(content["results"], protocol):
                    name = title(path)
                    row = rows.setdefault(name, Row(name, is_told_first(path)))
                    row.cells.setdefault(number, {}).setdefault(whose, []).append(number_found)
    there = [i for i, entry in enumerate(entries) if any(id(run) in protocols for run in entry.runs)]
    differ, some, equal = split_rows([entries[i] for i in there], lambda run: protocols.get(id(run), {}))
    return Evaluation(kind, list(rows.values()), there, differ + some, equal)


def in_words(protocol: dict[str, Any], run: OneRun) -> dict[str, str]:
    """The entries of a protocol; the run's own folder is EXP in them, so that those of several compare."""
    names = {f"{run.folder}/", f"{run.config.get('args', {}).get('exp')}/"}
    found = {}
    for name, entry in protocol.items():
        text = show(entry)
        for folder in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<!\S){re.escape(folder)}", "EXP/", text)
        found[printable(str(name))] = text
    return found


def evaluations_of(run: OneRun) -> dict[str, list[dict[str, Any]]]:
    """Evaluator -> what it found, in EXP and in the folders inside; but for the first place they are named.

    The same evaluator's figures of a random network belong beside those of the run, wherever they lie.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    own: set[str] = set()
    for place, content in run.evaluations.items():
        for kind, evaluation in content.items():
            name = printable(str(kind))
            if of_a_random_network(protocol_of(evaluation)):
                found.setdefault(name, []).append(evaluation)
                continue
            if name in own:
                name = f"{name} ({place})"
            own.add(name)
            found.setdefault(name, []).append(evaluation)
    return found


def protocol_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The protocol beside the results, {} where there is none."""
    protocol = evaluation.get("protocol")
    return protocol if isinstance(protocol, dict) else {}


def architectures_of(run: OneRun, kind: str) -> set[str]:
    """Of the run; where it is not known, what the protocols of an evaluator say of the network."""
    if "arch" in run.settings:
        return {run.settings["arch"]}
    protocols = [protocol_of(evaluation) for evaluation in evaluations_of(run).get(kind, [])]
    said = [str(p.get(name, "")) for p in protocols for name in ("arch", "network", "model")]
    found = [re.search(r"\((\w+)|^random:(\w+)|^(\w+)$", text) for text in said]
    return {next(filter(None, match.groups())) for match in found if match}


def of_a_random_network(protocol: dict[str, Any]) -> bool:
    """Whether the evaluated network is a random one."""
    models = (protocol.get("network"), protocol.get("model"))
    return any(isinstance(model, str) and is_random(model) for model in models)


def is_random(model: str) -> bool:
    """random:ARCH, or what a run started from."""
    return model.startswith("random:") or Path(model.split(" (")[0]).name == "checkpoint_0.pth.tar"


def numbers(results: Any, protocol: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """(way, whose, value) of each number in results."""
    whose = RANDOM if of_a_random_network(protocol) else OWN
    if isinstance(results, list) and any(isinstance(item, dict) and "network" in item for item in results):
        for item in results:
            name = item.get("network") if isinstance(item, dict) else None
            owner = whose
            if name == "baseline":
                owner = RANDOM if is_random(str(protocol.get("baseline"))) else BASELINE
            yield from ((way, owner, number) for way, number in walk([item]))
        return
    yield from ((way, whose, number) for way, number in walk(results))


def walk(node: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers in nested dicts and lists of dicts, each with the names on the way to it."""
    if len(way) > 20:
        return
    if isinstance(node, list):
        for i, item in enumerate(node):
            if isinstance(item, dict):
                yield from walk(without_names(item), (*way, *(names_of(item) or [str(i)] * (len(node) > 1))))
    elif isinstance(node, dict):
        for name, item in node.items():
            if name not in DROPPED:
                yield from walk(item, (*way, str(name)))
    elif (number := value({"x": node}, "x")) is not None:
        yield way, float(number)


def names_of(item: dict[str, Any]) -> list[str]:
    """What tells an item of a list from the others."""
    words = {"head": "head {}", "split": "of {}"}
    return [words.get(n, "{}").format(item[n]) for n in NAMING if n in item]


def without_names(item: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in item.items() if name not in NAMING}


def is_told_first(way: Sequence[str]) -> bool:
    """Whether a figure is none of a part and none aside of quality."""
    return not (PARTS.intersection(way[:-1]) or ASIDE.intersection(way[-1:]))


def rank(name: str) -> int:
    """The place of a figure among those that are told first."""
    if LAST.search(name):
        return len(TOLD_FIRST)
    return next((i for i, words in enumerate(TOLD_FIRST) if words in name), len(TOLD_FIRST))


def title(way: Sequence[str]) -> str:
    """A figure's name: `conv5 kNN@10`, `conv5 best prec@1`, `head 0 of train NMI`."""
    words: list[str] = []
    for i, word in enumerate(way):
        if word in SILENT and 0 < i < len(way):
            continue
        if i and way[i - 1] == "knn":
            words[-1] = f"kNN@{word}"
        else:
            words.append(TITLES.get(word, word))
    return printable(" ".join(words))
