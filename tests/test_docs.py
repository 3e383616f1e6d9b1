"""The README and docs/: links resolve, and the README stays short."""

import re
from pathlib import Path

import pytest

from tools.usage import anchor

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^][]*\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^][]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """Without code, in which brackets mean something else."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    lines = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {anchor(heading.strip()) for heading in re.findall(r"^#+ (.*)$", lines, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in target.parents, f"{page.name}: {link} is outside of the repository"
        if heading:
            assert heading in anchors_of(target), f"{page.name}: {link} has no such heading"


def test_pictures_are_there():
    pictures = [page.parent / link for page in PAGES for link in PICTURE.findall(text_of(page))]
    assert pictures and all(picture.is_file() for picture in pictures)


def test_a_link_is_found_and_code_is_none():
    text = "see [a](docs/a.md#b), ![picture](c.png)"
    assert LINK.findall(text) == ["docs/a.md#b"] and PICTURE.findall(text) == ["c.png"]
    assert LINK.findall(CODE.sub("", "`x[0](y)`\n```\nz[1](w)\n```\n")) == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 10_000


def test_every_page_of_docs_is_reached_from_the_readme():
    linked = {link.partition("#")[0] for link in LINK.findall(text_of(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked
