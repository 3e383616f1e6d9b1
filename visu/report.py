"""A run at a glance: EXP/report.png and EXP/report.html, from EXP/log.jsonl and EXP/config.json.

    python visu/report.py --exp exp        what main.py does at the end of a run

Both hold the charts (losses, NMI and AMI, cluster sizes, seconds), the last numbers in words, and warnings;
the page also holds the settings and all numbers as tables.
"""

import argparse
import html
import math
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import logs
from util import Log, UserError, atomic_write, run_main
from visu.pages import printable, read_config

TEMPLATE = Path(__file__).with_name("report.html")
Records = Sequence[dict[str, Any]]

# Columns of the table of epochs: heading, path in the record, format.
COLUMNS = (
    ("convnet loss", ("loss",), ".4f"),
    ("loss / log k", ("loss_over_log_k",), ".3f"),
    ("clustering loss", ("clustering_loss",), ",.6g"),
    ("NMI, previous", ("nmi_previous",), ".3f"),
    ("AMI, previous", ("ami_previous",), ".3f"),
    ("NMI, classes", ("nmi_classes",), ".3f"),
    ("AMI, classes", ("ami_classes",), ".3f"),
    ("clusters filled", ("clusters", "nonempty"), ",.0f"),
    ("smallest", ("clusters", "min"), ",.0f"),
    ("median", ("clusters", "median"), ",.6g"),
    ("largest", ("clusters", "max"), ",.0f"),
    ("seconds", ("seconds", "total"), ",.1f"),
    ("memory, GiB", ("peak_memory_gib",), ".2f"),
)

STUCK = 0.98  # of log k: the loss has learnt nothing
WARM_UP = 2  # epochs in which the loss may still be there


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description="The report of a run: EXP/report.png and EXP/report.html"
    )
    parser.add_argument("--exp", metavar="EXP", default="exp", help="folder of the run (default: exp)")
    return parser


def main(args: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files, and print the warnings and where they lie."""
    png, page = write_report(args.exp)
    log = Log()
    for warning in warnings_of(read_records(args.exp), read_config(args.exp) or {}):
        log(f"warning: {warning}")
    log(f"report: {page}, {png}")
    return png, page


def write_report(exp: str | Path) -> tuple[Path, Path]:
    """Write EXP/report.png (1600 x 1050) and EXP/report.html, which needs no other file; returns their paths.

    From EXP/log.jsonl and, where there is one, EXP/config.json. Raises UserError if no epoch is complete yet
    or matplotlib is missing.
    """
    exp = Path(exp)
    records, config = read_records(exp), read_config(exp) or {}
    try:
        from visu import charts
    except ImportError as error:
        raise UserError(f"the report needs matplotlib: pip install -r requirements.txt ({error})") from None
    png, page = exp / "report.png", exp / "report.html"
    title = f"DeepCluster run {printable(exp.resolve().name)}"
    sentences, warnings = words(records, config), warnings_of(records, config)
    text = wrap([*(f"Warning: {w}" for w in warnings), " ".join(sentences), settings_line(config)])
    with atomic_write(png, "wb") as file:
        charts.to_png(file, records, title, text)
    figures = {name: charts.to_svg(name, records) for name in charts.PANELS}
    with atomic_write(page, "wb") as file:
        file.write(fill_template(exp, title, sentences, warnings, figures, records, config).encode())
    return png, page


# ---------------------------------------------------------------------------------------- reading


def read_records(exp: str | Path) -> list[dict[str, Any]]:
    """The epochs in EXP/log.jsonl. Raises UserError if there is none."""
    path = Path(exp) / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: {exp} is not the folder of a run, or its first epoch is not over"
        )
    records = logs.read_lines(path)
    if not records:
        raise UserError(f"{path}: no epoch is complete yet")
    return records


def value(record: dict[str, Any], *names: str) -> float | None:
    """The number under names, or None."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record


# ---------------------------------------------------------------------------------------- in words


def words(records: Records, config: dict[str, Any]) -> list[str]:
    """The last numbers as sentences."""
    last, n = records[-1], value(config, "images", "number")
    k, filled = value(last, "clusters", "number"), value(last, "clusters", "nonempty")
    sentences = [progress_so_far(records, config)]
    loss, log_k = value(last, "loss"), math.log(max(k or 2, 2))
    if loss is not None:
        sentences.append(
            f"The convnet loss is {loss:.3f}, {loss / log_k:.0%} of log k = {log_k:.3f}, what guessing gives."
        )
    if k is not None:
        low, middle, high = (value(last, "clusters", name) for name in ("min", "median", "max"))
        share = f" ({high / n:.1%} of the images)" if n else ""
        sentences.append(
            f"{filled:,} of {k:,} clusters are filled, with {low:,} to {high:,} images{share}, median "
            f"{middle:,g}."
        )
    for what, name in (("previous", "the previous epoch"), ("classes", "the classes")):
        if value(last, f"nmi_{what}") is not None:
            sentences.append(
                f"Agreement with {name}: NMI {last[f'nmi_{what}']:.3f}, AMI {last[f'ami_{what}']:.3f}."
            )
    total = value(last, "seconds", "total")
    if total:
        parts = {name: s for name, s in last["seconds"].items() if name != "total"}
        longest = max(parts, key=parts.get)
        sentences.append(
            f"The epoch took {duration(total)}, {parts[longest] / total:.0%} of it "
            f"{'training' if longest == 'train' else longest}."
        )
    return sentences


def progress_so_far(records: Records, config: dict[str, Any]) -> str:
    """How many epochs there are, of how many, on what."""
    args, n = config.get("args", {}), value(config, "images", "number")
    planned = args.get("epochs", 0) - args.get("start_epoch", 0)
    done = f"{len(records)} epoch{'' if len(records) == 1 else 's'}"
    done += f" of {planned}" if planned > len(records) else ""
    images = f" on {n:,} images" if n else ""
    return f"{done} done{images}; the last is epoch {records[-1]['epoch']}."


def warnings_of(records: Records, config: dict[str, Any]) -> list[str]:
    """What went wrong, plainly: collapse, empty clusters, a loss at log k."""
    n, last = value(config, "images", "number"), records[-1]
    largest, number = value(last, "clusters", "max"), value(last, "clusters", "number")
    found = []
    if number == 1:
        found.append("there is only one cluster: all images have the same label, nothing can be learnt.")
    elif n and largest and largest > n / 2:
        found.append(
            f"collapse: the largest cluster holds {largest:,} of {n:,} images. Try a lower --lr, another "
            "--k, or colour instead of --sobel."
        )
    elif n and any((value(record, "clusters", "max") or 0) > n / 2 for record in records):
        found.append("in an earlier epoch one cluster held more than half of the images (collapse).")
    filled = value(last, "clusters", "nonempty")
    if number and filled is not None and filled < 0.9 * number:
        found.append(
            f"{number - filled:,} of {number:,} clusters are empty: --k is too large for these images."
        )
    over = value(last, "loss_over_log_k")
    if last["epoch"] >= WARM_UP and over is not None and over > STUCK:
        found.append(
            f"the loss is {over:.0%} of log k, what guessing gives: the cluster ids are not being "
            "learnt. Try another --lr or a smaller --k."
        )
    return found


def settings_line(config: dict[str, Any]) -> str:
    """The settings that one asks for first, for the picture."""
    args = config.get("args", {})
    names = [
        "arch", "sobel", "clustering", "nmb_cluster", "lr", "wd", "batch", "image_size", "reassign", "seed"
    ]  # fmt: skip
    if args.get("clustering") == "PIC":
        names.remove("nmb_cluster")  # not used
    shown = [f"{name} {show(args[name])}" for name in names if name in args]
    return "Settings: " + ", ".join(shown) if shown else ""


def wrap(paragraphs: Sequence[str], width: int = 170) -> str:
    return "\n".join(line for text in paragraphs for line in textwrap.wrap(text, width))


def duration(seconds: float) -> str:
    """`49.7 s`, `12.4 min`, `3.1 h`."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 2 * s or s == 1)
    return f"{seconds / size:.1f} {unit}"


# ---------------------------------------------------------------------------------------- the page


def fill_template(
    exp: Path,
    title: str,
    sentences: list[str],
    warnings: list[str],
    figures: dict[str, str],
    records: Records,
    config: dict[str, Any],
) -> str:
    """report.html with its parts; everything that comes from the run is escaped."""
    links = [(name, label) for name, label in (("clusters.html", "the clusters"),) if (exp / name).exists()]
    parts = {
        "title": html.escape(title),
        "warnings": "".join(f'<p class="warning">Warning: {html.escape(w)}</p>' for w in warnings),
        "words": html.escape(" ".join(sentences)),
        "links": "".join(f'<p><a href="{name}">See {label}</a></p>' for name, label in links),
        "charts": "\n".join(f'<figure id="chart-{name}">{svg}</figure>' for name, svg in figures.items()),
        "settings": table(("setting", "value"), settings(config)) if config else "<p>No config.json.</p>",
        "epochs": epoch_table(records),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    before, *pieces = page.split("{{")  # not str.replace: a part may itself hold {{...}}
    for piece in pieces:
        name, after = piece.split("}}", 1)
        before += parts[name] + after
    return before


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything in config.json as (name, value)."""
    rows = [(name, show(setting)) for name, setting in config.get("args", {}).items()]
    images = config.get("images", {})
    classes = images.get("classes")
    rows += [
        ("images", f"{images.get('number', 0):,}"),
        ("classes", f"{len(classes):,}" if classes else "none"),
    ]
    rows += [("device", show(config["device"]))] if "device" in config else []
    rows += [(f"{name} version", show(version)) for name, version in config.get("versions", {}).items()]
    if config.get("command"):
        rows.append(("command", printable(shlex.join(config["command"]))))
    return rows


def show(setting: Any) -> str:
    """A setting as people write it."""
    if setting is None or isinstance(setting, bool):
        return {None: "-", True: "yes", False: "no"}[setting]
    return printable(str(setting))


def epoch_table(records: Records) -> str:
    """The numbers of all epochs; columns that no epoch has are left out."""
    columns = [c for c in COLUMNS if any(value(record, *c[1]) is not None for record in records)]
    rows = []
    for record in records:
        numbers = [(value(record, *path), form) for _, path, form in columns]
        rows.append([str(record["epoch"]), *("" if x is None else format(x, form) for x, form in numbers)])
    return table(["epoch", *(heading for heading, _, _ in columns)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first cell of each row is its heading."""
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
