"""What the HTML pages share."""

import json
import os
from pathlib import Path
from typing import Any

from util import UserError


def read_config(exp: str | Path) -> dict[str, Any] | None:
    """EXP/config.json as main.py wrote it; None if there is none. Raises UserError if it is damaged."""
    path = Path(exp) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        raise UserError(f"{path}: not valid JSON") from None


def printable(text: str) -> str:
    """Text for people: bytes of a file name that are no UTF-8, and control characters, as \\x.."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
