"""Several runs side by side: what is read of each, their names, their seeds, the settings that differ.

Entries are what a comparison shows: a run, or several runs of the same settings under other seeds as one.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import results
from training import logs
from util import UserError
from visu.pages import printable, read_config
from visu.records import Records, value
from visu.report import unreadable
from visu.summary import ASKED, ASKED_NEXT, show, warnings_of

# Settings that say where things lie or how they are shown: no difference between runs.
PLACES = {"exp", "resume"}
# Settings that do not decide the result: runs that differ in them are still runs of the same settings.
MACHINE = {
    "workers", "device", "verbose", "no_report", "tensorboard", "checkpoints", "checkpoint_freq",
    "crop_cache",
}  # fmt: skip
A_FOLD = re.compile(r"fold\d+")  # of an evaluation, whose mean stands in EXP
NOTHING = "–"  # where a run has no such setting or figure


@dataclass(frozen=True)
class OneRun:
    """What was read of the folder of a run; what could not be read is told in warnings and is empty here."""

    folder: Path
    name: str
    records: Records
    config: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]  # results.json by its place: "" for EXP, else a folder in it
    warnings: list[str]

    @property
    def settings(self) -> dict[str, str]:
        """Name -> value in words of everything that a run was given, but where it lies."""
        args = self.config.get("args", {})
        found = {printable(name): show(x) for name, x in args.items() if name not in PLACES}
        method, images = self.config.get("method"), value(self.config, "images", "number")
        found |= {"method": printable(method)} if method else {}
        return found | ({} if images is None else {"images": f"{images:,.0f}"})

    @property
    def circumstances(self) -> dict[str, str]:
        """Name -> value in words of the machine that it ran on."""
        found = {f"{printable(n)} version": show(v) for n, v in self.config.get("versions", {}).items()}
        return ({"run on": show(self.config["device"])} if "device" in self.config else {}) | found


@dataclass(frozen=True)
class Entry:
    """Runs that are shown as one: a single one, or those that differ by seed alone."""

    name: str
    runs: tuple[OneRun, ...]

    @property
    def seeds(self) -> list[str]:
        """Of each run, where it is known."""
        return [run.settings["seed"] for run in self.runs if "seed" in run.settings]

    @property
    def label(self) -> str:
        """The name, and of how many seeds it is the mean."""
        return self.name if len(self.runs) == 1 else f"{self.name} (mean of {len(self.runs)} seeds)"

    def words(self, name: str, of: Callable[[OneRun], dict[str, str]]) -> str | None:
        """A setting of the runs in words, all values where they differ; None where none has it."""
        found = dict.fromkeys(of(run)[name] for run in self.runs if name in of(run))
        return ", ".join(found) if found else None


# ---------------------------------------------------------------------------------------- reading


def read_runs(folders: Sequence[str | Path]) -> list[OneRun]:
    """The runs in these folders, each once.

    Raises UserError, which names the folder, for one that is no run, and where nothing can be read of any.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [read_one(path, name) for path, name in zip(paths, short_names(paths))]
    if not any(run.records or run.evaluations for run in runs):
        said = [warning for run in runs for warning in run.warnings]
        raise UserError(said[0] if said else f"{paths[0]}: no epoch is complete yet and nothing is evaluated")
    return runs


def read_one(folder: Path, name: str) -> OneRun:
    """All that there is of a run in a folder; what is broken is named in its warnings."""
    log, warnings = folder / "log.jsonl", []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the EXP of runs")
    evaluations = read_evaluations(folder, name, warnings)
    if not log.is_file() and not (evaluations or warnings):
        raise UserError(f"{folder}: no run, it has neither log.jsonl nor results.json")
    try:
        config = read_config(folder) or {}
    except UserError as error:
        warnings.append(f"{relative(str(error), folder, name)}; its settings are left out.")
        config = {}
    records, broken = logs.check_lines(log) if log.is_file() else ([], [])
    if records:
        warnings += [f"{name}: {warning}" for warning in warnings_of(records, config)]
        warnings += unreadable(f"{name}/log.jsonl", broken)
    elif broken:
        warnings.append(f"{name}/log.jsonl: no line of it is an epoch.")
    elif log.is_file():
        warnings.append(f"{name}/log.jsonl: no epoch is complete yet.")
    return OneRun(folder, name, records, config, evaluations, warnings)


def relative(text: str, folder: Path, name: str) -> str:
    """A message about a file with the run's name in place of its folder."""
    return printable(text.replace(str(folder), name))


def read_evaluations(folder: Path, name: str, warnings: list[str]) -> dict[str, dict[str, Any]]:
    """Evaluations by place: of EXP under "", and of EXP/<place>, runs and folds left out."""
    inside = [path for path in sorted(folder.iterdir()) if not (path / "log.jsonl").exists()]
    inside = [path for path in inside if not A_FOLD.fullmatch(path.name)]
    found = {}
    for place in [folder, *inside]:
        try:
            content = results.read(place)
        except (UserError, OSError) as error:
            warnings.append(f"{relative(str(error), folder, name)}; its figures are left out.")
            continue
        content = {n: e for n, e in content.items() if isinstance(e, dict) and "results" in e}
        if content:
            found["" if place == folder else printable(place.name)] = content
    return found


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest parts of the paths that tell them apart: a/x/exp and a/y/exp are x and y."""
    parts = [list(path.parts) for path in paths]
    if len(parts) > 1:
        while len({p[-1] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
            parts = [p[:-1] for p in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name.replace("//", "/")) for name in names]


# ---------------------------------------------------------------------------------------- seeds


def group(runs: Sequence[OneRun]) -> list[Entry]:
    """Entries in the order of their first runs; runs that differ by seed alone are one of them."""
    groups: dict[str, list[OneRun]] = {}
    for run in runs:
        key = json.dumps(what_decides(run), sort_keys=True)
        seeds = {other.settings["seed"] for other in groups.get(key, [])}
        if "seed" not in run.settings or run.settings["seed"] in seeds:
            key = f"{run.folder}"  # without settings, or the same seed again: a run of its own
        groups.setdefault(key, []).append(run)
    names = [name_of(members) for members in groups.values()]
    twice = {name for name, n in Counter(names).items() if n > 1}
    names = [first_of(m) if name in twice else name for name, m in zip(names, groups.values())]
    return [Entry(name, tuple(members)) for name, members in zip(names, groups.values())]


def what_decides(run: OneRun) -> dict[str, str]:
    """The settings on which the result depends, but for the seed."""
    return {name: x for name, x in run.settings.items() if name not in MACHINE | {"seed"}}


def name_of(runs: Sequence[OneRun]) -> str:
    """What the names of runs begin with in common, in whole words; else the first and how many more."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names))
    common = "".join(column[0] for column in letters)
    if any(name[len(common) : len(common) + 1].isalpha() for name in names):  # in the middle of a word
        common = re.sub(r"[^-_./ =,]*$", "", common)
    common = re.sub(r"((^|[-_./ =,])(seed|s))?[-_./ =,]*\d*$", "", common).rstrip("-_./ =,")
    return common or first_of(runs)


def first_of(runs: Sequence[OneRun]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


# ---------------------------------------------------------------------------------------- settings

Rows = list[tuple[str, list[str]]]  # name, and a value of each entry


def compare_settings(entries: Sequence[Entry]) -> tuple[Rows, Rows, Rows]:
    """(those that differ, those that do not compare, those that are equal): names and values.

    Those that only some runs have do not compare, unless one asks for them first, nor do those that do not
    decide the result.
    """
    given = split_rows(entries, lambda run: run.settings)
    machines = split_rows(entries, lambda run: run.circumstances)
    differ, some, equal = ([*a, *b] for a, b in zip(given, machines))
    order = {name: i for i, name in enumerate(("method", "images", *ASKED, *ASKED_NEXT))}
    asked = [row for row in some if row[0] in order]
    more = [row for row in differ if row[0] in MACHINE] + [row for row in some if row[0] not in order]
    differ = [row for row in differ if row[0] not in MACHINE] + asked
    differ, equal = (sorted(rows, key=lambda row: order.get(row[0], len(order))) for rows in (differ, equal))
    return differ, more, equal


def split_rows(entries: Sequence[Entry], of: Callable[[OneRun], dict[str, str]]) -> tuple[Rows, Rows, Rows]:
    """Rows of what differs among the entries that have it, of what only some have, of what is the same."""
    names = dict.fromkeys(name for entry in entries for run in entry.runs for name in of(run))
    differ, some, equal = [], [], []
    for name in names:
        values = [entry.words(name, of) for entry in entries]
        there = {x for x in values if x is not None}
        rows = differ if len(there) > 1 else equal if None not in values else some
        rows.append((name, [NOTHING if x is None else x for x in values]))
    return differ, some, equal
