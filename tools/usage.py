"""Write docs/usage.md: what every script says to --help.

    python -m tools.usage            write it again, after flags have changed
    python -m tools.usage --check    is it what the scripts say? (exit code 2: no)

The scripts are those of the root, visu/, formats/ and tools/ whose `get_parser` gives a Parser.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commandline import Parser
from util import UserError, atomic_write, run_main, say

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "usage.md"
COLUMNS = 110  # characters of a line, whatever the terminal has
FOLDERS = (".", "visu", "formats", "tools")  # in this order; the methods stand first among those of the root
MARK = "\ndef get_parser() -> Parser:"
AS_MODULES = ("formats", "tools")
HEAD = """# Usage

What every script says to `--help`, written by `python -m tools.usage` under Python {python}. The `.sh`
scripts say what their variables are: `./main.sh --help`. How it goes: [running.md](running.md).

{contents}
"""


def get_parser() -> Parser:
    """The flags of usage.py."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()


def main(args: argparse.Namespace) -> None:
    """Write the page, or compare it."""
    page = usage_page()
    if not args.check:
        with atomic_write(PAGE) as file:
            file.write(page)
        say(f"written: {PAGE}")
    elif PAGE.read_text(encoding="utf-8") != page:
        raise UserError(f"{PAGE}: not what the scripts say; write it again by python -m tools.usage")


def scripts() -> list[Path]:
    """The scripts with a parser, as paths from the root: methods first, then by name."""
    found = []
    for folder in FOLDERS:
        paths = sorted(
            (ROOT / folder).glob("*.py"), key=lambda path: (not path.stem.startswith("main"), path.stem)
        )
        found += [p.relative_to(ROOT) for p in paths if MARK in p.read_text(encoding="utf-8")]
    return found


def usage_page() -> str:
    """The whole page."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    texts = {path.as_posix(): help_of(path) for path in scripts()}
    contents = " · ".join(f"[{name}](#{anchor(name)})" for name in texts)
    sections = [f"## {name}\n\n```\n{text}```\n" for name, text in texts.items()]
    return "\n".join([HEAD.format(python=python, contents=contents), *sections])


def call(path: Path) -> str:
    """How the script is called: visu/report.py, python -m formats.onnx."""
    if path.parts[0] in AS_MODULES:
        return f"python -m {module_of(path)}"
    return path.as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def anchor(heading: str) -> str:
    """What pages call a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def help_of(path: Path) -> str:
    """The script's help on lines of COLUMNS characters, without colours."""
    before = dict(os.environ)
    os.environ |= {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    try:
        parser = importlib.import_module(module_of(path)).get_parser()
        parser.prog = call(path)
        return parser.format_help()
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    run_main(main, ARGS)
