"""What the HTML pages share: a run's settings, text for people, tables, templates."""

import html
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util import UserError

STYLE = Path(__file__).with_name("page.css")  # of the report and the comparison

# What config.json holds, where it holds it.
SHAPE = {"method": str, "args": dict, "images": dict, "device": str, "versions": dict, "command": list}


def read_config(exp: str | Path) -> dict[str, Any] | None:
    """EXP/config.json as a run wrote it; None if there is none.

    Raises UserError if it is damaged, or is not what a run writes.
    """
    path = Path(exp) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the settings of a run")
    for name, kind in SHAPE.items():
        if name in config and not isinstance(config[name], kind):
            raise UserError(f"{path}: not the settings of a run ({name} is of another kind)")
    return config


def printable(text: str) -> str:
    """Text for people: bytes of a file name that are no UTF-8, and control characters, as \\x.."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair that no file name has
        raw = text.encode("utf-8", "surrogatepass")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fill(template: Path, parts: dict[str, str]) -> str:
    """The template with each {{name}} replaced; a part may itself hold {{...}}."""
    page, *pieces = template.read_text(encoding="utf-8").split("{{")
    for piece in pieces:
        name, after = piece.split("}}", 1)
        page += parts[name] + after
    return page


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


def wrap(paragraphs: Sequence[str], width: int = 170) -> str:
    """Text in lines of at most so many characters."""
    return "\n".join(line for text in paragraphs for line in textwrap.wrap(text, width))
