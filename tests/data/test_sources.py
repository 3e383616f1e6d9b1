"""One way to images: what is looked at, told, left out."""

from pathlib import Path

import pytest
from PIL import Image

import data
from data import decode
from tests.data.pictures import touch_images
from util import UserError


def test_dangling_link_is_listed_and_reported(tmp_path):
    touch_images(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    images = data.list_images(tmp_path)
    assert list(images.paths) == ["a.png", "b.png"]
    assert data.check_headers(images, 1) == [(1, "no such file or directory")]


def write_broken(root: Path) -> dict[str, str]:
    """Broken files and a part of the reason that is to be given."""
    (root / "empty.jpg").touch()
    (root / "text.png").write_text("not an image, but long enough to be looked at" * 10)
    (root / "program.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    (root / "folder.jpg").mkdir()
    return {
        "empty.jpg": "the file is empty",
        "text.png": "not an image",
        "program.jpg": "not an image",
        "folder.jpg": "is a directory",
        "gone.jpg": "no such file",
    }


def test_broken_files_are_named_with_the_reason(tmp_path):
    reasons = write_broken(tmp_path)
    images = data.ImageList(tmp_path, list(reasons))
    found = data.check_headers(images, workers=2)
    assert [i for i, _ in found] == list(range(len(reasons)))
    for i, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(data.ImageError, match=f"{name}: {reason}") as caught:
            decode.decode_file(tmp_path / name)
        assert isinstance(caught.value, UserError)
        assert data.broken_reason(images, i) == found[i][1] == caught.value.reason


def test_check_headers_covers_every_index_once(tmp_path):
    touch_images(tmp_path, "good.png")
    (tmp_path / "bad.png").write_text("no")
    names = ["bad.png" if i % 700 == 3 else "good.png" for i in range(2500)]
    found = data.check_headers(data.ImageList(tmp_path, names), workers=3)
    assert [i for i, _ in found] == [3, 703, 1403, 2103]


def test_bombs_are_refused_before_they_are_decoded(tmp_path, photo, monkeypatch):
    names = ["x.jpg", "x.png", "x.gif"]
    for name in names:
        photo.save(tmp_path / name)
    images = data.ImageList(tmp_path, names)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 143 * 191 // 2)  # the limit is twice that: one pixel less
    assert [i for i, _ in data.check_headers(images, 1)] == [0, 1, 2]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    for name in names:
        with pytest.raises(
            data.ImageError, match=f"{name}: more than 27312 pixels, refused as a decompression bomb"
        ):
            decode.decode_file(tmp_path / name)
