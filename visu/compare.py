"""Several runs side by side, on one page and in one picture: OUT/compare.html and OUT/compare.png.

    python visu/compare.py runs/a runs/b runs/c [--out compare]

The curves over epochs, the figures of every evaluation in EXP/results.json (and in folders inside EXP) with
those of the random network and the published ones, and the settings that differ. Runs that differ by seed
alone are shown as one, by mean and range. The page needs no other file.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import Parser


def get_parser() -> Parser:
    """The flags of compare.py."""
    parser = Parser(__doc__)
    parser.add_argument("exps", metavar="EXP", nargs="+", help="folder of a run")
    parser.add_argument(
        "--out",
        default="compare",
        metavar="OUT",
        help="folder of the page and the picture; not that of a run",
    )
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import html
import re
import statistics
from collections.abc import Sequence

from util import Log, UserError, atomic_write, make_folder, run_main
from visu.figures import BASELINE, OWN, RANDOM, Evaluation, Row, architectures_of, compare_evaluations
from visu.pages import STYLE, fill, printable, table, wrap
from visu.published import METHODS, ROWS_OF, Published, published_for, read_published
from visu.run_groups import NOTHING, Entry, Rows, compare_settings, group, read_runs

TEMPLATE = Path(__file__).with_name("compare.html")
OF_A_RUN = ("log.jsonl", "config.json", "results.json", "checkpoint.pth.tar")
# Markers of charts as SVG, around (22, 7).
SHAPES = {
    "o": '<circle cx="22" cy="7" r="4"/>',
    "s": '<path d="M18 3h8v8h-8z"/>',
    "^": '<path d="M22 2l5 9h-10z"/>',
    "D": '<path d="M22 2l5 5l-5 5l-5-5z"/>',
    "v": '<path d="M22 12l5-9h-10z"/>',
    "P": '<path d="M20 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "X": '<path d="M19 2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3l-3-3z"/>',
    "*": '<path d="M22 1l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8-2.6l-3.8 2.6l1.3-4.3l-3.5-2.7h4.4z"/>',
}


def main(args: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files, and print the warnings and where they lie; returns (picture, page)."""
    log, out = Log(), Path(args.out)
    entries = group(read_runs(args.exps))
    refuse_inputs(out, entries)
    png, page = write_comparison(entries, out)
    for warning in warnings_of(entries):
        log(f"warning: {warning}")
    log(f"{headline(entries)}: {page}, {png}")
    return png, page


def refuse_inputs(out: Path, entries: Sequence[Entry]) -> None:
    """Raise UserError for an OUT that is one of the runs, or another one."""
    folders = {run.folder for entry in entries for run in entry.runs}
    if out.resolve() in folders or any((out / name).exists() for name in OF_A_RUN):
        raise UserError(f"--out {out}: is the folder of a run; choose another, in which nothing is lost")
    if out.resolve() == TEMPLATE.parent:
        raise UserError(f"--out {out}: holds the template of the page; choose another folder")


def write_comparison(entries: Sequence[Entry], out: Path) -> tuple[Path, Path]:
    """Write OUT/compare.png and OUT/compare.html; returns their paths. UserError without matplotlib."""
    try:
        from visu import curves
    except ImportError as error:
        raise UserError(f"compare.py needs matplotlib: pip install -r requirements.txt ({error})") from None
    evaluations, settings = compare_evaluations(entries), compare_settings(entries)
    make_folder(out)
    png, page = out / "compare.png", out / "compare.html"
    with atomic_write(png, "wb") as file:
        curves.to_png(file, entries, evaluations, headline(entries), text_of_picture(entries, settings[0]))
    parts = {
        "style": STYLE.read_text(encoding="utf-8"),
        "title": html.escape(headline(entries)),
        "warnings": box_of_warnings(warnings_of(entries)),
        "runs": table_of_runs(entries),
        "key": key_of(entries),
        "left_out": left_out(entries),
        "charts": "\n".join(f"<figure>{svg}</figure>" for svg in curves.svgs(entries))
        or "<p>No log.jsonl with an epoch in these folders.</p>",
        "evaluations": "\n".join(section(i, one, entries) for i, one in enumerate(evaluations))
        or "<p>No evaluation yet: no results.json in these folders.</p>",
        "settings": sections_of_settings(entries, *settings),
    }
    with atomic_write(page, "wb") as file:
        file.write(fill(TEMPLATE, parts).encode())
    return png, page


# ---------------------------------------------------------------------------------------- in words


def headline(entries: Sequence[Entry]) -> str:
    """`3 runs`, or how many settings they are of."""
    number = sum(len(entry.runs) for entry in entries)
    if number == len(entries):
        return counted(number, "run")
    return f"{number} runs of " + ("the same settings" if len(entries) == 1 else f"{len(entries)} settings")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def warnings_of(entries: Sequence[Entry]) -> list[str]:
    """What went wrong in which run."""
    return [warning for entry in entries for run in entry.runs for warning in run.warnings]


def text_of_picture(entries: Sequence[Entry], differ: Rows) -> str:
    """Warnings, and the settings that differ, in the order of the legend."""
    differ = [(name, values) for name, values in differ if len({*values} - {NOTHING}) > 1][:12]
    order = "Settings that differ, in the order of the legend: "
    shown = order + "; ".join(f"{name} {' | '.join(values)}" for name, values in differ)
    several = [entry for entry in entries if len(entry.runs) > 1]
    seeds = "Lines: mean of the seeds; bands: lowest to highest." if several else ""
    warnings = warnings_of(entries)
    said = [f"Warning: {warning}" for warning in warnings[:5]]
    more = f"{counted(len(warnings) - 5, 'more warning')}: on the page." if len(warnings) > 5 else ""
    paragraphs = [*said, more, shown if differ else "", seeds]
    return wrap([p[:700] for p in paragraphs if p])


def box_of_warnings(warnings: Sequence[str]) -> str:
    """All of them in one box, folded where there are many."""
    if not warnings:
        return ""
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    many = "" if len(warnings) > 3 else " open"
    summary = counted(len(warnings), "warning")
    return f'<details class="warning"{many}><summary>{summary}</summary><ul>{items}</ul></details>'


def left_out(entries: Sequence[Entry]) -> str:
    """Which numbers of the logs have no chart."""
    from visu import curves

    names = [html.escape(printable(name)) for name in curves.other_names(entries)[1]]
    return f"<p><small>In each run's own report only: {', '.join(names[:30])}.</small></p>" if names else ""


def spread(values: Sequence[float], form: str) -> str:
    """The one value, or `mean (lowest to highest)`."""
    if len(values) == 1:
        return format(values[0], form)
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):{form}} ({low:{form}} to {high:{form}})"


# ---------------------------------------------------------------------------------------- runs


def key_of(entries: Sequence[Entry]) -> str:
    """The legend of all charts."""
    items = "".join(
        f"<li>{sample(i)}<span>{breakable(entry.label)}</span></li>" for i, entry in enumerate(entries)
    )
    return f'<ul class="key">{items}</ul>'


def breakable(name: str) -> str:
    """A name in HTML that may go on in a new line after its parts."""
    return re.sub(r"([_/.-])(?=\w)", r"\1<wbr>", html.escape(name))


def sample(number: int) -> str:
    """The line and the marker of an entry, as SVG."""
    from visu import charts, curves

    look = curves.look_of(number)
    colour = f"var(--{charts.VARIABLES[look.colour]})"
    return (
        f'<svg class="sample" viewBox="0 0 44 14" aria-hidden="true" style="fill:{colour};stroke:{colour}">'
        f'<path d="M1 7h42" fill="none" stroke-width="2" stroke-dasharray="{look.dashes}"/>'
        f'<g stroke="none">{SHAPES[look.marker]}</g></svg>'
    )


def table_of_runs(entries: Sequence[Entry]) -> str:
    """What each entry is: method, network, how far, which seeds, where."""
    rows = []
    for entry in entries:
        epochs = dict.fromkeys(f"{len(run.records)}" for run in entry.runs)
        settings = [entry.words(name, lambda run: run.settings) or NOTHING for name in ("method", "arch")]
        seeds = ", ".join(entry.seeds) or NOTHING
        where = "\n".join(printable(str(run.folder)) for run in entry.runs)
        rows.append([entry.name, *settings, ", ".join(epochs), seeds, where])
    head = ("run", "method", "network", "epochs", "seed", "folder")
    return scrolling("Runs", entry_rows(head, rows), "folders")


def entry_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with an entry a row, its sample before its name."""
    text = table(head, rows)
    for i, row in enumerate(rows):
        plain = f'<tr><th scope="row">{html.escape(row[0])}<'
        text = text.replace(plain, f'<tr><th scope="row" class="run">{sample(i)} {breakable(row[0])}<', 1)
    return text


def scrolling(label: str, content: str, kind: str = "") -> str:
    """A table that scrolls within the page."""
    name = html.escape(label)
    return f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{name}">{content}</div>'


def entry_columns(
    first: str,
    entries: Sequence[Entry],
    rows: Sequence[tuple[str, Sequence[str]]],
    places: Sequence[int] | None = None,
) -> str:
    """A table with an entry a column (those at places, else all); rows: a name and the cells, in HTML."""
    names = "".join(
        f'<th scope="col">{sample(i)}<br>{breakable(entries[i].label)}</th>'
        for i in (range(len(entries)) if places is None else places)
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    head = f'<tr><th scope="col">{html.escape(first)}</th>{names}</tr>'
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


# ---------------------------------------------------------------------------------------- evaluations


def section(number: int, evaluation: Evaluation, entries: Sequence[Entry]) -> str:
    """Everything about an evaluation: chart, figures, protocols, what was published."""
    from visu import curves

    kind = evaluation.kind
    parts = [f"<h3>{html.escape(kind)}</h3>"]
    if evaluation.drawn:
        svg = curves.svg_of_figures(f"figures-{number}", evaluation, entries)
        parts.append(f'<figure class="figures">{svg}</figure>')
    if evaluation.first:
        parts.append(figure_table(f"{kind}: figures", entries, evaluation, evaluation.first))
    if evaluation.folded:
        more = figure_table(f"{kind}: other figures", entries, evaluation, evaluation.folded)
        parts.append(folded(counted(len(evaluation.folded), "more figure"), more))
    parts.append(published_part(evaluation, entries))
    if evaluation.differ:
        text = settings_table(f"{kind}: protocol", entries, evaluation.differ, evaluation.there)
        parts.append(f"<h4>Where their protocols differ</h4>{text}")
    if evaluation.equal:
        text = settings_table(f"{kind}: the same protocol", entries, evaluation.equal, evaluation.there)
        shared = "The protocol that they share" if len(evaluation.there) > 1 else "The protocol"
        parts.append(folded(shared, text))
    return f'<section class="evaluation">{"".join(parts)}</section>'


def figure_table(label: str, entries: Sequence[Entry], evaluation: Evaluation, rows: Sequence[Row]) -> str:
    """Figures, an entry a column; the random network's and other baselines' below them."""
    there, lines = evaluation.there, []
    for row in rows:
        form = evaluation.form(row)
        lines.append(
            (row.name, [figure_cell(row.cells.get(i, {}), form, len(entries[i].runs)) for i in there])
        )
    without = [entry.name for i, entry in enumerate(entries) if i not in there]
    note = f"<p><small>Not evaluated so: {html.escape(', '.join(without))}.</small></p>" if without else ""
    return scrolling(label, entry_columns("figure", entries, lines, there), "numbers") + note


def figure_cell(cell: dict[str, list[float]], form: str, runs: int) -> str:
    """`0.630 (0.615 to 0.645)`, and small `random 0.528`; how many of the runs have it, where not all."""
    own = cell.get(OWN, [])
    few = f" <small>{len(own)} of {runs} runs</small>" if own and len(own) < runs else ""
    text = spread(own, form) + few if own else NOTHING
    for whose in (RANDOM, BASELINE):
        if whose in cell:
            text += f'<small class="below">{whose} {spread(cell[whose], form)}</small>'
    return text


def published_part(evaluation: Evaluation, entries: Sequence[Entry]) -> str:
    """The published figures for the networks and methods that are compared."""
    if not evaluation.kind.startswith(tuple(ROWS_OF)):
        return ""
    runs = [run for i in evaluation.there for run in entries[i].runs]
    archs = sorted({arch for run in runs for arch in architectures_of(run, evaluation.kind)})
    known = [run.config.get("method", "deepcluster") for run in runs if run.config]  # 0.1.0 had no other
    methods = set(map(str, known)) or set(METHODS)
    rows = published_for(evaluation.kind, archs, methods, read_published())
    if not rows:
        which = html.escape(", ".join(archs) or "these networks")
        return f"<p>docs/results.md has no published figure of it for {which}.</p>"
    head = ("published: evaluation", "network, training", "setting", "figure", "source")
    lines = [[r.evaluation, r.network, r.setting, r.figure, source_of(r)] for r in rows]
    note = (
        "Published, not measured here; they compare only where images and protocol are the same. "
        "Source: the table in docs/results.md."
    ) + of_other_classes(evaluation, rows)
    text = scrolling(f"{evaluation.kind}: published", table(head, lines), "published")
    return f"<h4>Published</h4><p>{note}</p>{text}"


def of_other_classes(evaluation: Evaluation, rows: Sequence[Published]) -> str:
    """A sentence where the figures are of other classes than the published ones."""
    values = dict([*evaluation.differ, *evaluation.equal]).get("classes", [])
    others = [x for x in dict.fromkeys(values) if x not in ("1000", "1,000", NOTHING)]
    if not others or not any(row.evaluation.startswith("ImageNet") for row in rows):
        return ""
    return f" ImageNet has 1,000 classes, the images of these runs have {html.escape(', '.join(others))}."


def source_of(row: Published) -> str:
    return "mem (quoted from memory, unverified: do not cite)" if row.from_memory else row.source


# ---------------------------------------------------------------------------------------- settings


def sections_of_settings(entries: Sequence[Entry], differ: Rows, some: Rows, equal: Rows) -> str:
    """Those that differ, and folded those that only some methods have and those that are the same."""
    if len(entries) == 1:
        shown = settings_table("Settings", entries, equal) if equal else "<p>No config.json.</p>"
        return f"<h2>Settings</h2>{folded(counted(len(equal), 'setting'), shown) if equal else shown}"
    text = "<h2>Settings that differ</h2>"
    text += (
        settings_table("Settings that differ", entries, differ) if differ else "<p>None that is known.</p>"
    )
    if some:
        lines = settings_table("More settings", entries, some)
        summary = counted(len(some), "setting") + " that not all have, or that do not decide the result"
        text += folded(summary, lines)
    if equal:
        lines = settings_table("Equal settings", entries, equal)
        text += folded(counted(len(equal), "equal setting"), lines)
    return text


def settings_table(
    label: str, entries: Sequence[Entry], rows: Rows, places: Sequence[int] | None = None
) -> str:
    """Names and values of the entries (those at places, else all); one column where they are the same."""
    same = all(len(set(values)) == 1 for _, values in rows)
    if same:
        return scrolling(label, table(("setting", "value"), [[name, values[0]] for name, values in rows]))
    lines = [(name, [html.escape(x) for x in values]) for name, values in rows]
    return scrolling(label, entry_columns("setting", entries, lines, places))


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


if __name__ == "__main__":
    run_main(main, ARGS)
