"""The report of a run: EXP/report.png and EXP/report.html, from EXP/log.jsonl and EXP/config.json.

    python visu/report.py --exp exp        what main.py does at the end of a run

Both hold a chart of whatever the log holds (losses, NMI and AMI, cluster sizes, seconds, ...), the last
numbers in words, and warnings; the page also holds the settings and the numbers as tables.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import Parser, add_exp


def get_parser() -> Parser:
    """The flags of report.py."""
    parser = Parser(__doc__)
    add_exp(parser, "the run")
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import html
from typing import Any

from training import logs
from util import Log, UserError, atomic_write, run_main
from visu.pages import STYLE, fill, printable, read_config, table, wrap
from visu.records import Records, thinned, value
from visu.summary import given_settings, other_settings, settings_line, warnings_of, words

TEMPLATE = Path(__file__).with_name("report.html")

# Columns of the table of epochs: heading, path in the record, format. Other numbers follow under their names.
COLUMNS = (
    ("training loss", ("loss",), ".4f"),
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


def main(args: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files, and print the warnings and where they lie."""
    png, page = write_report(args.exp)
    log = Log()
    for warning in all_warnings(Path(args.exp), *read_run(args.exp)):
        log(f"warning: {warning}")
    log(f"report: {page}, {png}")
    return png, page


def write_report(exp: str | Path) -> tuple[Path, Path]:
    """Write EXP/report.png and EXP/report.html, which needs no other file; returns their paths.

    From EXP/log.jsonl and, where there is one, EXP/config.json. Raises UserError if no epoch is complete yet
    or matplotlib is missing.
    """
    exp = Path(exp)
    records, broken, config = read_run(exp)
    try:
        from visu import charts
    except ImportError as error:
        raise UserError(f"the report needs matplotlib: pip install -r requirements.txt ({error})") from None
    png, page = exp / "report.png", exp / "report.html"
    method = config.get("method") or value_of(config, "method")
    title = f"Run {printable(exp.resolve().name)}" + (f": {printable(str(method))}" if method else "")
    sentences, warnings = words(records, config), all_warnings(exp, records, broken, config)
    paragraphs = [
        *(f"Warning: {w}" for w in warnings), " ".join(sentences), settings_line(records, config)
    ]  # fmt: skip
    drawn = thinned(records)
    with atomic_write(png, "wb") as file:
        charts.to_png(file, drawn, title, wrap(paragraphs))
    figures = {panel.name: charts.to_svg(panel, drawn) for panel in charts.panels_of(drawn)}
    with atomic_write(page, "wb") as file:
        file.write(fill_page(exp, title, sentences, warnings, figures, records, config).encode())
    return png, page


def value_of(config: dict[str, Any], name: str) -> Any:
    """A setting of the run, or None."""
    return config.get("args", {}).get(name)


# ---------------------------------------------------------------------------------------- reading


def read_run(exp: str | Path) -> tuple[Records, list[int], dict[str, Any]]:
    """(the epochs in EXP/log.jsonl, the numbers of its broken lines, config.json); UserError if no epoch."""
    path = Path(exp) / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: {exp} is not the folder of a run, or its first epoch is not over"
        )
    records, broken = logs.check_lines(path)
    if not records:
        raise UserError(
            f"{path}: no line of it is an epoch" if broken else f"{path}: no epoch is complete yet"
        )
    return records, broken, read_config(exp) or {}


def all_warnings(exp: Path, records: Records, broken: list[int], config: dict[str, Any]) -> list[str]:
    """What went wrong in the run, and which lines of its log are not readable."""
    return warnings_of(records, config) + unreadable(f"{exp.name}/log.jsonl", broken)


def unreadable(log: str, broken: list[int]) -> list[str]:
    """The sentence on the broken lines of a log, [] where there are none."""
    if not broken:
        return []
    which = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
    lines = f"line {which}" if len(broken) == 1 else f"lines {which} ({len(broken)})"
    return [f"{lines} of {log} cannot be read; the others count."]


# ---------------------------------------------------------------------------------------- the page


def fill_page(
    exp: Path,
    title: str,
    sentences: list[str],
    warnings: list[str],
    figures: dict[str, str],
    records: Records,
    config: dict[str, Any],
) -> str:
    """The page; everything that comes from files is escaped."""
    links = [(name, label) for name, label in (("clusters.html", "the clusters"),) if (exp / name).exists()]
    given, others = given_settings(config), other_settings(config)
    shown = thinned(records)
    note = f" ({len(shown):,} of {len(records):,})" if len(shown) < len(records) else ""
    parts = {
        "style": STYLE.read_text(encoding="utf-8"),
        "title": html.escape(title),
        "warnings": "".join(f'<p class="warning">Warning: {html.escape(w)}</p>' for w in warnings),
        "words": html.escape(" ".join(sentences)),
        "links": "".join(f'<p><a href="{name}">See {label}</a></p>' for name, label in links),
        "charts": "\n".join(f'<figure id="chart-{name}">{svg}</figure>' for name, svg in figures.items()),
        "settings": table(("setting", "value"), given) if given else "<p>No config.json.</p>",
        "others": table(("setting", "value"), others) if others else "",
        "note": note,
        "epochs": epoch_table(shown),
    }
    return fill(TEMPLATE, parts)


def epoch_table(records: Records) -> str:
    """The numbers of all epochs; columns that no epoch has are left out."""
    known = {path[0] for _, path, _ in COLUMNS} | {"epoch", "iteration", "pca_dims"}
    names = dict.fromkeys(name for record in records for name in record if name not in known)
    columns = [*COLUMNS, *((printable(name).replace("_", " "), (name,), ",.6g") for name in names)]
    columns = [c for c in columns if any(value(record, *c[1]) is not None for record in records)]
    rows = []
    for record in records:
        numbers = [(value(record, *path), form) for _, path, form in columns]
        rows.append([str(record["epoch"]), *("" if x is None else format(x, form) for x, form in numbers)])
    return table(["epoch", *(heading for heading, _, _ in columns)], rows)


if __name__ == "__main__":
    run_main(main, ARGS)
