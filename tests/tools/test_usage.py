"""docs/usage.md is what the scripts say to --help."""

import os
import sys

import pytest

from tools import usage
from util import UserError


@pytest.fixture
def other_page(tmp_path, monkeypatch):
    """docs/usage.md in a folder of its own."""
    monkeypatch.setattr(usage, "PAGE", tmp_path / "usage.md")
    return usage.PAGE


def call(*flags):
    usage.main(usage.get_parser().parse_args(flags))


def test_page_is_what_the_scripts_say():
    page = usage.PAGE.read_text(encoding="utf-8")
    if (
        f"under Python {sys.version_info.major}.{sys.version_info.minor}." in page
    ):  # argparse changes its words
        assert page == usage.usage_page(), "flags have changed: python -m tools.usage"
    for path in usage.scripts():
        assert f"\n## {path.as_posix()}\n" in page


def test_every_method_and_this_script_are_among_them():
    found = [path.as_posix() for path in usage.scripts()]
    assert found[:4] == ["main.py", "main_deepclusterv2.py", "main_deepercluster.py", "main_swav.py"]
    assert "eval_linear.py" in found and "tools/usage.py" in found
    assert "commandline.py" not in found


def test_check_tells_an_old_page(other_page):
    call()
    call("--check")
    other_page.write_text(other_page.read_text().replace("--nmb_cluster", "--number"))
    with pytest.raises(UserError, match=r"python -m tools\.usage"):
        call("--check")


def test_terminal_does_not_change_the_page(monkeypatch):
    path = usage.scripts()[0]
    before = usage.help_of(path)
    monkeypatch.setenv("COLUMNS", "60")
    assert usage.help_of(path) == before
    assert os.environ["COLUMNS"] == "60"
    assert max(map(len, before.splitlines())) <= usage.COLUMNS
