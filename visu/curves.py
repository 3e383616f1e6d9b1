"""The charts of a comparison: one number of the logs of all runs over the epochs, and dots for figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from visu import charts
from visu.charts import AMBER, BLUE, GREEN, GREY, GRID, INK, ORANGE, PAPER, PURPLE, SKY, SOFT
from visu.figures import BASELINE, OWN, RANDOM, Evaluation
from visu.pages import printable
from visu.records import log_k, thinned, value
from visu.run_groups import Entry, OneRun

# Entries are told apart three ways: colour, dashes and marker, so that no one has to tell colours apart.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK, GREY)
DASHES = ("", "7 3", "2 2", "9 3 2 3", "12 2", "5 2 1 2 1 2", "4 4", "1 3")  # in widths of a line
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DOTS = 30  # epochs up to which each has its marker
MOST_OTHERS = 8


@dataclass(frozen=True)
class Look:
    """How an entry is drawn, everywhere the same."""

    colour: str
    dashes: str
    marker: str

    def line(self, label: str = "", **more: Any) -> dict[str, Any]:
        """What matplotlib calls it."""
        style = (0, [float(n) / 1.6 for n in self.dashes.split()]) if self.dashes else "-"
        return {"color": self.colour, "linestyle": style, "marker": self.marker, "label": label} | more


def look_of(number: int) -> Look:
    """The look of an entry by its place; from the ninth on colours come again, dashed otherwise."""
    shifted = number + number // len(COLOURS)
    return Look(
        COLOURS[number % len(COLOURS)], DASHES[shifted % len(DASHES)], MARKERS[shifted % len(MARKERS)]
    )


# ---------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One number over the epochs. get: of a record; share: it lies between 0 and 1; guess: a line at 1."""

    name: str
    title: str
    get: Callable[[dict[str, Any]], float | None]
    share: bool = False
    guess: bool = False


def number(*path: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: value(record, *path)


def loss_over_log_k(record: dict[str, Any]) -> float | None:
    """What the run says, else by the number of clusters."""
    loss, guess = value(record, "loss"), log_k(record)
    return loss / guess if loss is not None and guess else value(record, "loss_over_log_k")


CURVES = (
    Curve("nmi-classes", "NMI to the classes", number("nmi_classes"), share=True),
    Curve("ami-classes", "AMI to the classes (0 by chance)", number("ami_classes"), share=True),
    Curve("nmi-previous", "NMI to the previous epoch", number("nmi_previous"), share=True),
    Curve("ami-previous", "AMI to the previous epoch (0 by chance)", number("ami_previous"), share=True),
    Curve("loss-over-log-k", "Loss / log k (1: nothing learnt)", loss_over_log_k, guess=True),
    Curve("loss", "Training loss", number("loss")),
    Curve("clustering-loss", "Clustering loss", number("clustering_loss")),
)
DRAWN = {"nmi_classes", "nmi_previous", "loss", "clustering_loss"}
OTHER_TITLES = {"lr": "Learning rate"}
TIME = Curve("seconds", "Seconds of an epoch", number("seconds", "total"))


def curves_of(entries: Sequence[Entry]) -> list[Curve]:
    """Those of which some log holds the number: the table's, others that compare, and the time."""
    more = [
        Curve(
            f"other-{i}", OTHER_TITLES.get(name, printable(name).replace("_", " ").capitalize()), number(name)
        )
        for i, name in enumerate(other_names(entries)[0])
    ]
    return [curve for curve in (*CURVES, *more, TIME) if have(entries, curve.get)]


def other_names(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """(drawn, left out): numbers of logs that no curve shows; those of one entry do not compare."""
    known = DRAWN | charts.NOT_DRAWN
    names = dict.fromkeys(n for entry in entries for r in entry.runs for record in r.records for n in record)
    names = [name for name in names if name not in known and have(entries, number(name))]
    drawn = [name for name in names if have(entries, number(name)) >= min(2, len(entries))][:MOST_OTHERS]
    return drawn, [name for name in names if name not in drawn]


def have(entries: Sequence[Entry], get: Callable[[dict[str, Any]], float | None]) -> int:
    """In how many entries some record has the number."""
    return sum(any(get(record) is not None for r in entry.runs for record in r.records) for entry in entries)


def series(entry: Entry, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(epochs (E,), values (R, E)) of the R runs of an entry that have the number, where all of them do."""
    by_run = [points(run, curve) for run in entry.runs]
    by_run = [found for found in by_run if found]
    common = thinned(sorted(set.intersection(*map(set, by_run))) if by_run else [])
    return np.array(common, int), np.array([[found[epoch] for epoch in common] for found in by_run])


def points(run: OneRun, curve: Curve) -> dict[int, float]:
    """Epoch -> number of a run."""
    found = {record["epoch"]: curve.get(record) for record in run.records}
    return {epoch: float(x) for epoch, x in found.items() if x is not None}


def draw_curve(axes: Axes, entries: Sequence[Entry], curve: Curve) -> None:
    """The number of all entries; of several seeds the mean, and the range as a band."""
    axes.set_title(curve.title, parse_math=False)
    drawn = [(look_of(i), *series(entry, curve)) for i, entry in enumerate(entries)]
    if curve.guess:
        axes.axhline(1, color=SOFT, linewidth=1)
    for look, epochs, values in drawn:
        if not len(epochs):
            continue
        every = max(len(epochs) // 12, 1)
        start = (int(every * drawn_share(look)), every) if len(epochs) > DOTS else None
        axes.plot(epochs, values.mean(axis=0), **look.line(linewidth=2, markersize=5.5, markevery=start))
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(epochs, low, high, color=look.colour, alpha=0.18, linewidth=0)
            if len(epochs) == 1:
                axes.vlines(epochs, low, high, color=look.colour, alpha=0.5, linewidth=4)
    if curve.share:
        lowest = min((values.min() for _, _, values in drawn if values.size), default=0)
        axes.set_ylim(min(0, 1.05 * lowest), 1.03)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    every_epoch = [record["epoch"] for entry in entries for run in entry.runs for record in run.records]
    charts.over_epochs(axes, min(every_epoch), max(every_epoch))


def drawn_share(look: Look) -> float:
    """Where the first marker of long lines stands, so that those of several do not cover each other."""
    return MARKERS.index(look.marker) / len(MARKERS)


# ---------------------------------------------------------------------------------------- figures


def draw_figures(axes: Axes, evaluation: Evaluation, entries: Sequence[Entry], title: str = "") -> None:
    """Figures of an evaluation, a row a figure: a marker an entry, hollow for random networks."""
    rows = evaluation.drawn
    axes.set_title(title, parse_math=False)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    for place, row in enumerate(rows):
        axes.text(
            0.005, place - 0.3, row.name, size=10, va="center", color=SOFT, parse_math=False, clip_on=True,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        axes.axhline(place + 0.58, color=GRID, linewidth=0.8)
        for i, cell in row.cells.items():
            draw_cell(axes, cell, look_of(i), place + 0.02 + 0.4 * (i + 0.5) / len(entries))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    found = [x for row in rows for x in row.values()]
    room = 0.06 * (max(found) - min(found)) or 0.05 * abs(max(found)) or 0.1
    axes.set_xlim(min(found) - room, max(found) + room)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    if any(row.values(whose) for row in rows for whose in (RANDOM, BASELINE)):
        axes.set_xlabel("hollow: the random network, or another baseline")


def draw_cell(axes: Axes, cell: dict[str, list[float]], look: Look, height: float) -> None:
    """What an entry has of one figure: the mean of its seeds, and a line from the lowest to the highest."""
    for whose, values in cell.items():
        fill = look.colour if whose == OWN else PAPER
        more = {
            "markerfacecolor": fill,
            "linestyle": "-",
            "markersize": 6.5,
            "zorder": 3 if whose == OWN else 2,
        }
        if len(values) > 1:
            axes.plot([min(values), max(values)], [height] * 2, color=look.colour, alpha=0.5, linewidth=3)
        axes.plot([np.mean(values)], [height], **look.line(**more))


# ---------------------------------------------------------------------------------------- as files


def svgs(entries: Sequence[Entry]) -> list[str]:
    """The curves as SVG elements for the page."""
    return [
        charts.as_svg(partial(draw_curve, entries=entries, curve=c), c.name, c.title)
        for c in curves_of(entries)
    ]


def svg_of_figures(name: str, evaluation: Evaluation, entries: Sequence[Entry]) -> str:
    """The figures of an evaluation as an SVG element; name: begins its ids."""
    draw = partial(draw_figures, evaluation=evaluation, entries=entries)
    height = 1 + len(evaluation.drawn) * max(0.4, 0.25 + 0.07 * len(entries))
    return charts.as_svg(draw, name, f"{evaluation.kind}: figures", height)


def to_png(
    file: IO[bytes], entries: Sequence[Entry], evaluations: Sequence[Evaluation], title: str, text: str
) -> None:
    """Everything as one PNG into `file`."""
    panels = [partial(draw_curve, entries=entries, curve=curve) for curve in curves_of(entries)]
    panels += [
        partial(draw_figures, evaluation=one, entries=entries, title=one.kind)
        for one in evaluations
        if one.drawn
    ]
    labels = [shortened(entry.label, 60) for entry in entries]
    columns = max(1, min(len(labels), 170 // (max(map(len, labels)) + 10)))
    charts.sheet(file, panels, title, text, handles(labels), columns)


def handles(labels: Sequence[str]) -> list[Artist]:
    """The legend. A first `_` or a `$` in a name has no meaning there."""
    found = []
    for i, label in enumerate(labels):
        line = Line2D([], [], **look_of(i).line(linewidth=2, markersize=7))
        line.set_label(label.replace("$", r"\$") if not label.startswith("_") else f"\u200b{label}")
        found.append(line)
    return found


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters, its middle left out."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
