"""Parsers: a mistake is one line and exit code 2, and neither it nor --help waits for torch."""

import ast
import subprocess
import sys

import pytest

import commandline
from commandline import Parser, at_least, positive, power_of_ten, within
from tests.helpers import ROOT, refuses


@pytest.fixture
def parser():
    parser = Parser("What it does.\n\n    python x.py DIR\n", prog="x.py")
    parser.add_argument("--k", type=at_least(2), default=10, help="how many")
    parser.add_argument("--lr", type=positive, default=0.05, help="rate")
    parser.add_argument("--momentum", type=within(0, 1, "high"), default=0.9, help="momentum")
    parser.add_argument("--share", type=within(0, 1, "low"), default=1.0, help="share")
    parser.add_argument("--wd", type=power_of_ten, default=-5, help="decay")
    parser.add_argument("--mode", choices=("a", "b"), default="a", help="mode")
    parser.add_argument("--name", help="no default")
    parser.add_argument("--on", action="store_true", help="a switch")
    return parser


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--k 1", "x.py: --k: 1: must be at least 2"),
        ("--k 2.5", "x.py: --k: 2.5: must be a whole number"),
        ("--lr 0", "x.py: --lr: 0: must be a positive number"),
        ("--lr nan", "positive number"),
        ("--lr inf", "positive number"),
        ("--lr x", "positive number"),
        ("--momentum 1", r"must lie in \[0, 1\)"),
        ("--momentum=-0.1", r"must lie in \[0, 1\)"),
        ("--momentum nan", r"must lie in \[0, 1\)"),
        ("--share 0", r"must lie in \(0, 1\]"),
        ("--share x", "must be a number"),
        ("--wd x", "must be a power of ten such as -5"),
        ("--wd 400", "must be a power of ten"),
        ("--mode c", "--mode: invalid choice: .*a.*b"),
        ("--kk 3", "unrecognized arguments: --kk"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(parser, flags, line):
    with refuses(line):
        parser.parse_args(flags.split())


def test_good_values_come_through(parser):
    args = parser.parse_args("--k 2 --lr 1e-3 --momentum 0 --share 1 --wd -4.5 --mode b".split())
    assert (args.k, args.lr, args.momentum, args.share, args.wd, args.mode) == (2, 1e-3, 0, 1, -4.5, "b")


def test_help_shows_each_default_and_the_docstring_as_it_stands(parser):
    text = parser.format_help()
    assert "    python x.py DIR\n" in text
    for line in ("how many (default: 10)", "decay (default: -5)", "mode (default: a)"):
        assert line in text
    assert "None" not in text and "False" not in text


def test_shared_flags_stand_in_one_file():
    parser = Parser("doc")
    commandline.add_data(parser)
    commandline.add_run(parser)
    commandline.add_machine(parser)
    commandline.add_image_size(parser)
    args = parser.parse_args(["DIR", "--resume"])
    assert (args.dir, args.resume, args.exp, args.seed, args.image_size) == ("DIR", "auto", "exp", 31, 224)
    assert parser.parse_args(["--resume", "x.pth.tar", "--shards", "a.tar"]).resume == "x.pth.tar"
    for flags, line in (
        ("--seed -1", "at least 0"),
        ("--image-size 15", "at least 16"),
        ("--workers -1", "0"),
    ):
        with refuses(f"{flags.split()[0]}: .*{line}"):
            parser.parse_args(flags.split())


# ---------------------------------------------------------------------------------------- every script


def scripts() -> list[str]:
    """The files of the repository that have a get_parser and are run as scripts."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("visu/*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("formats/*.py"),
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "get_parser" in names:
            found.append(path.relative_to(ROOT).as_posix())
    return sorted(found)


def command(script: str) -> list[str]:
    """How it is called: files of formats/ as modules, the others as files."""
    if script.startswith("formats/"):
        return ["-m", script.removesuffix(".py").replace("/", ".")]
    return [script]


@pytest.mark.parametrize("script", scripts())
@pytest.mark.parametrize("flag, code", [("--help", 0), ("--no-such-flag", 2)])
def test_help_and_a_bad_flag_are_answered_without_torch(script, flag, code):
    call = [sys.executable, "-X", "importtime", *command(script), flag]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == code, done.stderr[-2000:]
    heavy = imported & {"torch", "torchvision", "faiss", "scipy", "sklearn", "PIL.Image", "matplotlib"}
    assert not heavy, f"{script} imports {', '.join(sorted(heavy))} before it parses"
    if code:
        assert (len(said) == 1 and "--no-such-flag" in said[0]) or "required" in said[0], said
    else:
        assert done.stdout.startswith("usage: ") and not said
