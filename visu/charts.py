"""The charts of a run's log: matplotlib figures for the PNG, and SVG that goes dark with the page.

A panel is a function (axes, records): it draws one chart of the report and returns nothing. records are the
lines of log.jsonl in order; a number that an epoch lacks leaves a gap.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import IO, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Records = Sequence[dict[str, Any]]
Panel = Callable[[Axes, Records], None]

INK, SOFT, GRID, PAPER = "#1b1f24", "#55606b", "#d9dee3", "#ffffff"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY)
# In the page each of them is a variable of its style sheet, so that it can be another one in the dark.
VARIABLES = {
    INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper", BLUE: "blue", ORANGE: "orange", GREEN: "green",
    PURPLE: "purple", SKY: "sky",
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


def column(records: Records, *names: str) -> np.ndarray:
    """The value under names in each record, (E,) float64, NaN where an epoch lacks it."""

    def value(record: Any) -> float:
        for name in names:
            record = record.get(name) if isinstance(record, dict) else None
        return float("nan") if record is None else float(record)

    return np.array([value(record) for record in records])


def log_k(records: Records) -> np.ndarray:
    """The loss of a guess, log k, in each epoch (PIC finds another k each time)."""
    return np.log(np.maximum(column(records, "clusters", "number"), 2))


def line(axes: Axes, records: Records, values: np.ndarray, label: str, colour: str) -> None:
    """A line over the epochs; with dots where there are few, so that one epoch shows as well."""
    marker = "o" if len(records) <= 30 else None
    axes.plot(epochs_of(records), values, color=colour, label=label, marker=marker, markersize=5, linewidth=2)


def convnet_loss(axes: Axes, records: Records) -> None:
    axes.set_title("Convnet loss")
    line(axes, records, column(records, "loss"), "mean over the epoch", BLUE)
    dots = {"marker": "_", "markersize": 12} if len(records) == 1 else {}
    axes.plot(
        epochs_of(records),
        log_k(records),
        color=ORANGE,
        linestyle="--",
        label="log k (nothing learnt)",
        **dots,
    )
    axes.set_ylim(0, 1.35 * max(np.nanmax(log_k(records)), np.nanmax(column(records, "loss"), initial=0)))
    axes.set_ylabel("cross-entropy (nats)")
    axes.legend(loc="upper right")


def clustering_loss(axes: Axes, records: Records) -> None:
    axes.set_title("Clustering loss")
    line(axes, records, column(records, "clustering_loss"), "", BLUE)
    axes.set_ylabel("sum of squared distances")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def agreement(axes: Axes, records: Records, what: str) -> None:
    values = column(records, f"nmi_{what}")
    if np.isnan(values).all():
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        text = "needs two epochs" if what == "previous" else "the images are in no class folders"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=SOFT)
        return
    line(axes, records, values, "NMI", BLUE)
    line(axes, records, column(records, f"ami_{what}"), "AMI (0 by chance)", ORANGE)
    low = min(0, np.nanmin(column(records, f"ami_{what}"), initial=0))
    axes.set_ylim(low, 1.03)
    axes.legend()


def with_previous(axes: Axes, records: Records) -> None:
    axes.set_title("Agreement with the previous epoch")  # figure 2b of the paper
    agreement(axes, records, "previous")


def with_classes(axes: Axes, records: Records) -> None:
    axes.set_title("Agreement with the classes")  # figure 2a
    agreement(axes, records, "classes")


def cluster_sizes(axes: Axes, records: Records) -> None:
    axes.set_title("Sizes of the clusters")
    epochs = epochs_of(records)
    low, middle, high = (column(records, "clusters", name) for name in ("min", "median", "max"))
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
    axes.set_title("Time of an epoch")
    names = list(dict.fromkeys(n for r in records for n in r.get("seconds", {}) if n != "total"))
    parts = {name: np.nan_to_num(column(records, "seconds", name)) for name in names}
    longest = np.max(sum(parts.values())) if parts else 0
    unit, scale = next(
        (u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * s or s == 1
    )
    bottom = np.zeros(len(records))
    width = 0.3 if len(records) == 1 else 0.8 if len(records) <= 40 else 1.0
    for (name, values), colour in zip(parts.items(), SERIES * len(parts)):
        height = values / scale
        axes.bar(epochs_of(records), height, width, bottom, color=colour, label=PHASES.get(name, name))
        bottom += height
    axes.set_ylim(0, max(bottom.max(), 1e-3) * 1.3)  # the legend's room
    axes.set_ylabel(unit)
    if parts:
        axes.legend(ncols=2, loc="upper left")


PANELS: dict[str, Panel] = {
    "convnet-loss": convnet_loss,
    "clustering-loss": clustering_loss,
    "cluster-sizes": cluster_sizes,
    "previous": with_previous,
    "classes": with_classes,
    "seconds": seconds,
}


def draw(axes: Axes, panel: Panel, records: Records) -> None:
    """One panel, over the epochs as whole numbers."""
    panel(axes, records)
    epochs = epochs_of(records)
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    if len(axes.lines) or len(axes.patches):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")


# ---------------------------------------------------------------------------------------- as files


def to_png(file: IO[bytes], records: Records, title: str, text: str) -> None:
    """All panels as one PNG of 1600 x 1050 pixels into `file`, title and lines of text above them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10.5), dpi=100, facecolor=PAPER)
        rows = text.count("\n") + 1
        top = 1 - (1.15 + 0.28 * rows) / 10.5
        figure.text(0.03, 1 - 0.25 / 10.5, title, size=17, weight="bold", va="top", parse_math=False)
        figure.text(0.03, 1 - 0.65 / 10.5, text, size=12, va="top", linespacing=1.4, parse_math=False)
        grid = figure.add_gridspec(
            2, 3, left=0.055, right=0.98, bottom=0.06, top=top, hspace=0.32, wspace=0.24
        )
        for panel, cell in zip(PANELS.values(), grid):
            draw(figure.add_subplot(cell), panel, records)
        figure.savefig(file, format="png", metadata={"Software": None})


def to_svg(name: str, records: Records) -> str:
    """Panel `name` as an SVG element: its colours are variables of the page, its ids start with `name`."""
    style = STYLE | {"svg.hashsalt": name, "savefig.transparent": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        axes = figure.subplots()
        draw(axes, PANELS[name], records)
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
    return svg.replace("<svg", f'<svg role="img" aria-label="{axes.get_title(loc="left")}"', 1)
