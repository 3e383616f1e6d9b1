"""The charts of a run's log: matplotlib figures for the PNG, and SVG that goes dark with the page.

PANELS is the table of what is drawn where the log holds it; other numbers of a log get a plain line each. A
number that an epoch lacks leaves a gap.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from visu.pages import printable
from visu.records import Records, column, log_k, value

INK, SOFT, GRID, PAPER = "#1b1f24", "#55606b", "#d9dee3", "#ffffff"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9"
AMBER, GREY = "#c98500", "#7d8791"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY)
# In the page each of them is a variable of its style sheet, so that it can be another one in the dark.
VARIABLES = {
    INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper", BLUE: "blue", ORANGE: "orange", GREEN: "green",
    PURPLE: "purple", SKY: "sky", AMBER: "amber", GREY: "grey",
}  # fmt: skip

STYLE = {
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text: readers, search and screen readers find it
}

PHASES = {
    "features": "features",
    "pca": "PCA-whitening",
    "clustering": "clustering",
    "train": "training",
}


# ---------------------------------------------------------------------------------------- the panels


def epochs_of(records: Records) -> np.ndarray:
    return np.array([record["epoch"] for record in records])


def line(axes: Axes, records: Records, values: np.ndarray, label: str, colour: str) -> None:
    """A line over the epochs; with dots where there are few, so that one epoch shows as well."""
    marker = "o" if len(records) <= 30 else None
    axes.plot(epochs_of(records), values, color=colour, label=label, marker=marker, markersize=5, linewidth=2)


def training_loss(axes: Axes, records: Records) -> None:
    loss = column(records, "loss")
    line(axes, records, loss, "mean over the epoch", BLUE)
    guess = np.array([math.nan if k is None else k for k in map(log_k, records)])
    axes.set_ylabel("cross-entropy (nats)")
    if not np.isnan(guess).all():
        dots = {"marker": "_", "markersize": 12} if len(records) == 1 else {}
        axes.plot(
            epochs_of(records), guess, color=ORANGE, linestyle="--", label="log k (nothing learnt)", **dots
        )
        axes.legend(loc="upper right")
    highest = max(np.nanmax(guess, initial=0), np.nanmax(loss, initial=0))
    lowest = np.nanmin(loss, initial=0)
    axes.set_ylim(1.35 * lowest, 1.35 * highest if highest > 0 else None)


def clustering_loss(axes: Axes, records: Records) -> None:
    line(axes, records, column(records, "clustering_loss"), "", BLUE)
    axes.set_ylabel("sum of squared distances")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def agreement(axes: Axes, records: Records, what: str) -> None:
    line(axes, records, column(records, f"nmi_{what}"), "NMI", BLUE)
    ami = column(records, f"ami_{what}")
    line(axes, records, ami, "AMI (0 by chance)", ORANGE)
    axes.set_ylim(min(0, np.nanmin(ami, initial=0)), 1.03)
    axes.legend()


def share(axes: Axes, records: Records, name: str) -> None:
    line(axes, records, column(records, name), "", BLUE)
    axes.set_ylim(0, 1.03)


def plain(axes: Axes, records: Records, name: str) -> None:
    line(axes, records, column(records, name), "", BLUE)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def cluster_sizes(axes: Axes, records: Records) -> None:
    epochs = epochs_of(records)
    low, middle, high = (
        np.maximum(column(records, "clusters", name), 1) for name in ("min", "median", "max")
    )
    if len(records) == 1:
        axes.bar(
            epochs, high - low, bottom=low, width=0.25, color=SKY, alpha=0.45, label="smallest to largest"
        )
    else:
        axes.fill_between(epochs, low, high, color=SKY, alpha=0.45, linewidth=0, label="smallest to largest")
    line(axes, records, middle, "median", BLUE)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    bottom, top = np.nanmin(low, initial=np.inf), np.nanmax(high, initial=1)
    if top < 100 * bottom:  # less than two decades have few labelled ticks or none
        axes.yaxis.set_minor_formatter(FuncFormatter(minor_label))
        axes.tick_params(axis="y", which="minor", labelsize=9)
    axes.set_ylim(bottom=None, top=top * max(top / min(bottom, top), 20) ** 0.3)  # the legend's room
    axes.set_ylabel("images (log scale)")
    axes.legend(loc="upper right", ncols=2)


def minor_label(value: float, _: int | None = None) -> str:
    """Labels at 2 and 5 between the powers of ten."""
    digit = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:,.6g}" if digit in (2, 5) else ""


def seconds(axes: Axes, records: Records) -> None:
    parts = {name: np.nan_to_num(column(records, "seconds", name)) for name in phases(records)}
    longest = np.max(sum(parts.values()))
    unit, scale = next(
        (u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * s or s == 1
    )
    bottom = np.zeros(len(records))
    width = 0.3 if len(records) == 1 else 0.8
    for (name, values), colour in zip(parts.items(), SERIES * len(parts)):
        top, label = bottom + values / scale, PHASES.get(name, printable(name))
        if len(records) <= 40:
            axes.bar(epochs_of(records), top - bottom, width, bottom, color=colour, label=label)
        else:
            axes.fill_between(epochs_of(records), bottom, top, step="mid", color=colour, label=label, lw=0)
        bottom = top
    axes.set_ylim(0, max(bottom.max(), 1e-3) * 1.3)  # the legend's room
    axes.set_ylabel(unit)
    axes.legend(ncols=2, loc="upper left")


def phases(records: Records) -> list[str]:
    """What of an epoch has its seconds, in the order in which it first comes."""
    found = [record["seconds"] for record in records if isinstance(record.get("seconds"), dict)]
    names = dict.fromkeys(name for parts in found for name in parts if name != "total")
    return [name for name in names if any(value(parts, name) is not None for parts in found)]


@dataclass(frozen=True)
class Panel:
    """One chart. needs: paths of the numbers of which a record has to have one, so that it is drawn."""

    name: str
    title: str
    draw: Callable[[Axes, Records], None]
    needs: tuple[str, ...]

    def is_in(self, records: Records) -> bool:
        """Whether some epoch has what this panel shows."""
        paths = [path.split("/") for path in self.needs]
        return any(value(record, *path) is not None for record in records for path in paths)


PANELS = (
    Panel("loss", "Training loss", training_loss, ("loss",)),
    Panel("clustering-loss", "Clustering loss", clustering_loss, ("clustering_loss",)),
    Panel("cluster-sizes", "Sizes of the clusters", cluster_sizes, ("clusters/max",)),
    # Figures 2b and 2a of the DeepCluster paper.
    Panel(
        "previous",
        "Agreement with the previous epoch",
        partial(agreement, what="previous"),
        ("nmi_previous",),
    ),
    Panel("classes", "Agreement with the classes", partial(agreement, what="classes"), ("nmi_classes",)),
    Panel(
        "rotation",
        "Accuracy of the rotation",
        partial(share, name="accuracy_rotation"),
        ("accuracy_rotation",),
    ),
    Panel("lr", "Learning rate", partial(plain, name="lr"), ("lr",)),
)
# Numbers that no panel of their own shows: places, ratios and figures that stand in the table.
NOT_DRAWN = {
    "epoch", "iteration", "loss_over_log_k", "pca_dims", "peak_memory_gib", "peak_gpu_memory_gib",
    "ami_previous", "ami_classes",
}  # fmt: skip
MOST_OTHERS = 6


def panels_of(records: Records) -> list[Panel]:
    """The panels of which the log holds the numbers, those of other numbers, and the time at the end."""
    found = [panel for panel in PANELS if panel.is_in(records)]
    taken = NOT_DRAWN | {path.split("/")[0] for panel in PANELS for path in panel.needs}
    names = dict.fromkeys(name for record in records for name in record if name not in taken)
    others = [name for name in names if any(value(record, name) is not None for record in records)]
    for i, name in enumerate(others[:MOST_OTHERS]):
        title = printable(name).replace("_", " ").capitalize()
        found.append(Panel(f"other-{i}", title, partial(plain, name=name), (name,)))
    if phases(records):
        found.append(Panel("seconds", "Time of an epoch", seconds, ()))
    return found


def draw(axes: Axes, panel: Panel, records: Records) -> None:
    """One panel, over the epochs as whole numbers."""
    axes.set_title(panel.title, parse_math=False)
    panel.draw(axes, records)
    epochs = epochs_of(records)
    over_epochs(axes, epochs.min(), epochs.max())


def over_epochs(axes: Axes, first: int, last: int) -> None:
    """The horizontal axis, from the first to the last epoch."""
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


# ---------------------------------------------------------------------------------------- as files


def to_png(file: IO[bytes], records: Records, title: str, text: str) -> None:
    """All panels of a run as one PNG into `file`, title and lines of text above them."""
    sheet(file, [partial(draw, panel=panel, records=records) for panel in panels_of(records)], title, text)


def sheet(
    file: IO[bytes],
    panels: Sequence[Callable[[Axes], None]],
    title: str,
    text: str,
    handles: Sequence[Artist] = (),
    legend_columns: int = 1,
) -> None:
    """Panels as one PNG of 1600 pixels' width into `file`: title, text, legend of the handles, panels."""
    columns = 2 if len(panels) in (1, 2, 4) else 3
    rows = max(math.ceil(len(panels) / columns), 1)
    legend = 0.3 * math.ceil(len(handles) / legend_columns)  # inches
    height = {1: 6.5, 2: 10.5}.get(rows, 1.9 + 4.3 * rows) + legend
    above = 1.15 + 0.28 * (text.count("\n") + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, height), dpi=100, facecolor=PAPER)
        figure.text(0.03, 1 - 0.25 / height, title, size=17, weight="bold", va="top", parse_math=False)
        figure.text(0.03, 1 - 0.65 / height, text, size=12, va="top", linespacing=1.4, parse_math=False)
        if handles:
            place = (0.026, 1 - (above - 0.5) / height)
            figure.legend(
                handles=handles, loc="upper left", bbox_to_anchor=place, ncols=legend_columns, fontsize=12,
                handlelength=4, borderaxespad=0,
            )  # fmt: skip
        grid = figure.add_gridspec(
            rows, columns, left=0.055, right=0.98, bottom=0.63 / height,
            top=max(1 - (above + legend) / height, 0.5), hspace=0.32, wspace=0.24,
        )  # fmt: skip
        for panel, cell in zip(panels, grid):
            panel(figure.add_subplot(cell))
        figure.savefig(file, format="png", metadata={"Software": None})


def to_svg(panel: Panel, records: Records) -> str:
    """A panel as an SVG element."""
    return as_svg(partial(draw, panel=panel, records=records), panel.name, panel.title)


def as_svg(panel: Callable[[Axes], None], name: str, title: str, height: float = 3.3) -> str:
    """What `panel` draws as an SVG element: colours are variables of the page, ids start with `name`."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name, "savefig.transparent": True}):
        figure = Figure(figsize=(5, height), layout="constrained")
        panel(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
