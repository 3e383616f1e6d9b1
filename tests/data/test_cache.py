"""The crop cache: what it gives is exactly the crop, or nothing; old, damaged and shared files do no harm."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import CropCache, cache
from data import images as listing
from tests.helpers import ROOT
from util import UserError

PICTURES = sorted((ROOT / "demo" / "pictures").glob("*.jpg"))
SIZE = 33  # 3267 bytes: no whole number of words


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for i, picture in enumerate(PICTURES[:7]):
        Image.open(picture).convert("RGB").resize((90 + i, 70)).save(tmp_path / "in" / f"{i}.jpg")
    return tmp_path / "in"


def loader_of(images: data.ImageList, crop_cache: CropCache | None = None, batch=3, workers: int = 0):
    view = data.PlainView(images, data.central_crop(SIZE), crop_cache)
    return data.make_loader(view, batch, workers, torch.device("cpu"))


def crops(images: data.ImageList, crop_cache: CropCache | None = None, workers: int = 0) -> torch.Tensor:
    batches = list(loader_of(images, crop_cache, workers=workers))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(images)))
    return torch.cat([batch.views for batch in batches])


def filled(crop_cache: CropCache) -> int:
    """How many crops have been written."""
    return int(np.count_nonzero(crop_cache._open()[1]))


@pytest.fixture
def no_decoding(monkeypatch):
    """A function that forbids decoding from its call on."""

    def forbid():
        monkeypatch.setattr(listing, "decode_bytes", lambda *_: pytest.fail("decoded"))

    return forbid


@pytest.mark.parametrize("workers", [0, 2])
def test_second_pass_reads_the_same_crops_and_decodes_nothing(folder, tmp_path, no_decoding, workers):
    images = data.list_images(folder)
    expected = crops(images)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    assert filled(crop_cache) == 0 and crop_cache.read(0) is None
    assert torch.equal(crops(images, crop_cache, workers), expected)
    assert filled(crop_cache) == 7
    no_decoding()
    again = CropCache(tmp_path / "cache", data.list_images(folder), SIZE)  # another process, another day
    assert again.path == crop_cache.path
    for one in (crop_cache, again, pickle.loads(pickle.dumps(again))):
        read = crops(images, one, workers)
        assert torch.equal(read, expected)
        assert read.is_contiguous(memory_format=torch.channels_last)


def test_a_pass_fills_all_but_broken_images(folder, tmp_path):
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:-100])
    images = data.list_images(folder)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    for workers in (1, 0):
        (batch,) = loader_of(images, crop_cache, 7, workers)
        assert batch.index.tolist() == [0, 1, 2, 4, 5, 6] and batch.broken == [3]
        assert filled(crop_cache) == 6
    assert "truncated" in data.broken_reason(images, 3)


def test_views_do_not_share_memory_with_the_file(folder, tmp_path):
    images = data.list_images(folder)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    crops(images, crop_cache)
    expected = crop_cache.read(2).clone()
    crop_cache.read(2).zero_()
    assert torch.equal(crop_cache.read(2), expected)


CHANGES = {
    "content": lambda f: (f / "2.jpg").write_bytes((f / "5.jpg").read_bytes()),
    "same size and mtime": lambda f: rewrite_keeping_size_and_mtime(f / "2.jpg"),
    "new image": lambda f: (f / "9.jpg").write_bytes((f / "5.jpg").read_bytes()),
    "gone": lambda f: (f / "2.jpg").unlink(),
    "renamed": lambda f: (f / "2.jpg").rename(f / "8.jpg"),
    "swapped": lambda f: [
        (f / a).rename(f / b) for a, b in (("1.jpg", "x"), ("2.jpg", "1.jpg"), ("x", "2.jpg"))
    ],
}


def rewrite_keeping_size_and_mtime(path: Path) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-40:-30] = bytes(10)  # other pixels
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_never_served_old_crops(folder, tmp_path, change):
    images = data.list_images(folder)
    crops(images, CropCache(tmp_path / "cache", images, SIZE))
    CHANGES[change](folder)
    changed = data.list_images(folder)
    crop_cache = CropCache(tmp_path / "cache", changed, SIZE)
    assert filled(crop_cache) == 0
    assert torch.equal(crops(changed, crop_cache), crops(changed))


def test_the_name_tells_all_that_crops_depend_on(folder, tmp_path, monkeypatch):
    images, scaled = data.list_images(folder), data.list_images(folder)
    scaled.scaled = True
    names = {CropCache(tmp_path / "cache", images, size).path for size in (16, 24)}
    names.add(CropCache(tmp_path / "cache", images.keep(np.arange(7) > 0), 16).path)
    names.add(CropCache(tmp_path / "cache", scaled, 16).path)
    monkeypatch.setattr(cache, "version", lambda name: "another")
    names.add(CropCache(tmp_path / "cache", images, 16).path)
    monkeypatch.setattr(cache, "VERSION", 2)
    names.add(CropCache(tmp_path / "cache", images, 16).path)
    assert len(names) == 6


@pytest.mark.parametrize(
    "damage", ["deleted", "empty", "cut", "zeros", "noise", "one bit", "pixels lost", "longer"]
)
def test_a_damaged_file_is_mended(folder, tmp_path, damage):
    images = data.list_images(folder)
    expected = crops(images)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    crops(images, crop_cache)
    content = np.fromfile(crop_cache.path, dtype=np.uint8)
    if damage == "deleted":
        crop_cache.path.unlink()
    elif damage == "zeros":
        content[:] = 0
    elif damage == "noise":
        content[:] = np.random.default_rng(0).integers(0, 256, len(content))
    elif damage == "one bit":
        content[5000] ^= 16
    elif damage == "pixels lost":  # after a crash of the machine: checksums on the disk, pixels not
        content[3000:9000] = 0
    kept = {"empty": 0, "cut": len(content) // 2}.get(damage, len(content))
    if damage != "deleted":
        content[:kept].tofile(crop_cache.path)
    if damage == "longer":
        os.truncate(crop_cache.path, len(content) + 4096)
    again = CropCache(tmp_path / "cache", images, SIZE)
    assert torch.equal(crops(images, again), expected)
    assert torch.equal(torch.stack([again.read(i) for i in range(7)]), expected)


def test_two_caches_on_one_file_at_once(folder, tmp_path):
    images = data.list_images(folder)
    expected = crops(images)
    one, other = (CropCache(tmp_path / "cache", images, SIZE) for _ in range(2))
    for i in range(7):
        view = data.PlainView(images, data.central_crop(SIZE), (one, other)[i % 2])
        assert torch.equal(view[i][0], expected[i])
        assert torch.equal((other, one)[i % 2].read(i), expected[i])  # seen by the other at once
        other.write(i, expected[i])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_process_that_made_the_file_first_wins(folder, tmp_path):
    images = data.list_images(folder)
    first = CropCache(tmp_path / "cache", images, SIZE)
    crops(images, first)
    late = CropCache(tmp_path / "cache", images, SIZE)
    late._create()  # as if both had found no file
    assert filled(late) == 7 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_half_written_row_does_not_count(folder, tmp_path):
    images = data.list_images(folder)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    rows, _ = crop_cache._open()
    rows[2] = 7  # pixels without a checksum
    assert crop_cache.read(2) is None and filled(crop_cache) == 0


def test_black_crops_are_kept(folder, tmp_path):
    crop_cache = CropCache(tmp_path / "cache", data.list_images(folder), SIZE)
    crop_cache.write(1, torch.zeros(3, SIZE, SIZE, dtype=torch.uint8))
    assert crop_cache.read(1).sum() == 0 and crop_cache.read(0) is None


def test_the_cache_fits_only_its_own_view(folder, tmp_path):
    images = data.list_images(folder)
    crop_cache = CropCache(tmp_path / "cache", images, SIZE)
    with pytest.raises(ValueError, match="crop cache"):
        data.PlainView(images.keep(np.arange(7) > 0), data.central_crop(SIZE), crop_cache)
    for transform in (data.central_crop(SIZE + 1), data.ten_crops(SIZE)):
        with pytest.raises(ValueError, match="crop cache"):
            data.PlainView(images, transform, crop_cache)[0]
    assert filled(crop_cache) == 0


def test_too_little_space_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    images = data.list_images(folder)
    monkeypatch.setattr(cache, "free_bytes", lambda _: cache.bytes_needed(7, SIZE) - 1)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB in .*cache"):
        CropCache(tmp_path / "cache", images, SIZE)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_space_is_reserved(folder, tmp_path):
    crop_cache = CropCache(tmp_path / "cache", data.list_images(folder), 224)
    status = crop_cache.path.stat()
    assert status.st_size == cache.bytes_needed(7, 224) == 7 * (224 * 224 * 3 + 8)
    assert status.st_blocks * 512 >= status.st_size  # no hole: a full disk cannot kill a worker later


def test_free_bytes_of_a_folder_to_be_made(tmp_path):
    assert cache.free_bytes(tmp_path / "a" / "b") > 0
