"""shards.py and tools/make_shards.py: a run on shards is a run on the folder, whatever writes the shards."""

import functools
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import shards
import torch
import webdataset
from cache import CropCache
from PIL import Image

import data
from tools import make_shards
from util import UserError

ROOT = Path(__file__).resolve().parents[1]
PICTURES = sorted((ROOT / "demo" / "pictures").glob("*.jpg"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of small JPEGs and a PNG, with names that webdataset's keys would mix up."""
    root = tmp_path_factory.mktemp("folder")
    for i, picture in enumerate(PICTURES[:10]):
        path = root / ("dog" if i % 3 else "a cat") / f"{i}.{i % 2}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.open(picture).convert("RGB").resize((90 + i, 70)).save(path, quality=90)
    Image.open(PICTURES[0]).convert("RGB").resize((30, 44)).save(root / "dog" / "4.png")
    Image.open(PICTURES[1]).convert("L").resize((30, 44)).save(root / "dog" / "ü.0.PNG", "PNG")
    os.symlink(root / "dog" / "4.png", root / "dog" / os.fsdecode(b"\xff.png"))  # no UTF-8
    return root


def write(folder: Path, out: Path, *options: str) -> list[Path]:
    arguments = [str(folder), str(out / "train-%03d.tar"), "--workers", "0", *options]
    return make_shards.main(make_shards.get_parser().parse_args(arguments))


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# ---------------------------------------------------------------------------------------- as the folder


@pytest.mark.parametrize("size_mb", ["300", "0.012"])
def test_shards_are_the_folder(folder, tmp_path, size_mb):
    written = write(folder, tmp_path, "--size-mb", size_mb)
    assert (len(written) > 2) == (size_mb != "300")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    assert list(images.paths) == list(plain.paths) and images.digest() == plain.digest()
    assert images.classes.tolist() == plain.classes.tolist() and images.class_names == plain.class_names
    assert images.classes.dtype == np.int64
    for i in range(len(plain)):
        assert images.read(i) == plain.read(i) == plain.path(i).read_bytes()
        assert torch.equal(images.decode(i), plain.decode(i))
        with images.open(i) as file:
            assert file.read() == plain.read(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_through_loaders_are_the_folders(folder, tmp_path, workers):
    write(folder, tmp_path, "--size-mb", "0.02")
    lists = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    order = [(position, i) for position, i in enumerate(random.Random(0).choices(range(len(lists[0])), k=20))]
    batches = []
    for images in lists:
        central = data.make_loader(data.CentralView(images, 32), 5, workers)
        random_ = data.make_loader(data.TrainView(images, 32, seed=1, epoch=2), 4, workers, sampler=order)
        batches.append([tensor for loader in (central, random_) for batch in loader for tensor in batch])
    assert len(batches[0]) == len(batches[1])
    assert all(torch.equal(one, other) for one, other in zip(*batches))


def test_keep_keeps_images_with_their_names(folder, tmp_path):
    write(folder, tmp_path, "--size-mb", "0.02")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    mask = np.arange(len(images)) % 3 == 1
    images.scaled = True
    kept, expected = images.keep(mask), plain.keep(mask)
    assert kept.digest() == expected.digest() and kept.classes.tolist() == expected.classes.tolist()
    assert [kept.read(i) for i in range(len(kept))] == [expected.read(i) for i in range(len(kept))]
    assert kept.scaled and isinstance(kept, shards.ShardList)
    copy = pickle.loads(pickle.dumps(kept))  # as a worker that is spawned gets it
    assert copy.read(1) == kept.read(1) and copy.class_names == kept.class_names


def test_more_shards_than_open_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_handle", functools.lru_cache(maxsize=2)(shards._Handle))
    write(folder, tmp_path, "--size-mb", "0.001")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    assert len(images.shards) == len(images)
    before = len(os.listdir("/proc/self/fd"))
    with images.open(0) as first:
        for i in range(len(images)):
            assert images.read(i) == plain.read(i)
        assert first.read() == plain.read(0)  # its handle left the cache long ago
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # two, and that of `first`


def test_crop_cache_over_shards_follows_the_shards(folder, tmp_path):
    write(folder, tmp_path, "--size-mb", "0.02")
    images = shards.list_shards(f"{tmp_path}/train-*.tar")
    crops = CropCache(tmp_path / "cache", images, 16)
    crops.fill(images, batch=4, workers=0)
    assert torch.equal(crops.read(5), data.CentralView(data.list_images(folder), 16)[5][0])
    assert CropCache(tmp_path / "cache", shards.list_shards(f"{tmp_path}/train-*.tar"), 16).filled() == 13
    os.utime(images.shards[1])
    changed = CropCache(tmp_path / "cache", shards.list_shards(f"{tmp_path}/train-*.tar"), 16)
    assert changed.filled() == 0 and changed.path != crops.path


def test_webdataset_reads_what_make_shards_writes(folder, tmp_path):
    write(folder, tmp_path)
    plain = data.list_images(folder)
    samples = list(webdataset.WebDataset(str(tmp_path / "train-000.tar"), shardshuffle=False))
    assert len(samples) == len(plain)
    for i, sample in enumerate(samples):
        content = sample.get("jpg") or sample.get("png")
        assert content == plain.read(i) and int(sample["cls"]) == plain.classes[i]


def test_damaged_image_in_a_shard_is_broken_and_named(folder, tmp_path):
    (path,) = write(folder, tmp_path)
    images = shards.list_shards(path)
    content = bytearray(path.read_bytes())
    first, second = (images.where[i, 1:].tolist() for i in (0, 1))
    content[first[0] : first[0] + 30] = bytes(30)  # no JPEG any more
    content[second[0] + second[1] // 2 : second[0] + second[1]] = bytes(second[1] - second[1] // 2)
    path.write_bytes(content)
    images = shards.list_shards(path)
    assert data.check_headers(images, 2) == [(0, "not an image in a format that Pillow reads")]
    _, index = next(iter(data.make_loader(data.CentralView(images, 16), 4, 0)))
    assert index.tolist() == [-1, -2, 2, 3]
    assert data.broken_reason(images, 0) == "not an image in a format that Pillow reads"
    with pytest.raises(data.ImageError, match=r"train-000.tar/a cat/0\.0\.jpg: not an image"):
        images.decode(0)


# ---------------------------------------------------------------------------------------- foreign shards


def test_shards_of_webdatasets_own_writer(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/x-%02d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            other = {"json": b"{}", "seg.png": b"no photograph", "txt": b"caption"}
            writer.write({"__key__": f"k{i}", "jpg": jpeg(i), "cls": 10 - 3 * i % 4, **other})
    images = shards.list_shards(f"{tmp_path}/x-{{00..02}}.tar")
    assert list(images.paths) == ["x-00/k0.jpg", "x-00/k1.jpg", "x-01/k2.jpg", "x-01/k3.jpg", "x-02/k4.jpg"]
    assert [images.read(i) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert images.class_names == ["7", "8", "9", "10"]  # as numbers
    assert [images.class_names[c] for c in images.classes] == ["10", "7", "8", "9", "10"]
    assert images.root == tmp_path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_folders(tmp_path, format):
    names = [
        "./b/1.jpg",
        "./b/2.jpg",
        f"./a/{'long/' * 22}{'x' * 60}.jpg",
        "./a/ä.jpeg",
        "./a/._x.jpg",
        "./a/readme",
    ]
    with tarfile.open(tmp_path / "t.tar", "w", format=format) as tar:
        tar.addfile(folder := tarfile.TarInfo("./b"), None)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(jpeg(i)), 1.25 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(jpeg(i)))
    images = shards.list_shards(tmp_path / "t.tar")
    assert list(images.paths) == [f"t/{name[2:]}" for name in names[:4]]
    assert [images.read(i) for i in range(4)] == [jpeg(i) for i in range(4)]
    assert images.class_names == ["a", "b"] and images.classes.tolist() == [1, 1, 0, 0]


def test_shards_without_labels_have_no_classes(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "1.cls": b"4"})
    images = shards.list_shards(tmp_path / "{a,b}.tar")
    assert list(images.paths) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]
    assert images.classes is None and images.class_names is None


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("gone.tar", "names 1 shards, of which 1 do not exist; the first is .*gone.tar"),
        ("x-{00..03}.tar", "names 4 shards, of which 2 do not exist; the first is .*x-01.tar"),
        ("y-*.tar", r"y-\*.tar: no file matches"),
        ("x-{00..03.tar", "brace"),
        ("x-{00,00}.tar", "the image x-00/1.jpg is in the shards twice"),
        ("twice.tar", r"2 images of the key 1 \(1.jpg, 1.png\)"),
        ("dots.tar", r"2 images of the key 1 \(1.a.jpg, 1.b.jpg\)"),
        ("text.tar", "no image found in the 1 shard"),
        ("photo.tar", "is no tar file|is truncated"),
        ("empty.tar", "is truncated"),
        ("packed.tar.gz", "is compressed.*gunzip"),
        ("packed.tar", "is compressed.*gunzip"),
        ("http://host/x-{00..03}.tar", "only local files"),
        ("pipe:cat x.tar", "only local files"),
    ],
)
def test_mistakes_are_named(tmp_path, pattern, message):
    for name in ("x-00.tar", "x-02.tar"):
        write_tar(tmp_path / name, {"1.jpg": jpeg(1)})
    write_tar(tmp_path / "twice.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(3), "1.png": jpeg(2)})
    write_tar(tmp_path / "dots.tar", {"1.a.jpg": jpeg(1), "1.b.jpg": jpeg(2)})
    write_tar(tmp_path / "text.tar", {"1.txt": b"nothing"})
    (tmp_path / "photo.tar").write_bytes(jpeg(5))
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "photo.tar", "1.jpg")
    (tmp_path / "packed.tar").write_bytes((tmp_path / "packed.tar.gz").read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        shards.list_shards(pattern if ":" in pattern else f"{tmp_path}/{pattern}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_any_cut_is_noticed(tmp_path, format):
    long_name = "x" * 120 + ".jpg" if format == tarfile.GNU_FORMAT else "3.jpg"  # read by tarfile
    members = {"1.jpg": jpeg(1), "2.jpg": jpeg(2), long_name: jpeg(3)}
    path = write_tar(tmp_path / "x.tar", members, format=format)
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))  # of the last image; the end mark follows in whole blocks
    end += -end % 512
    for length in [1, 511, 512, 700, *range(1024, end + 1, 512), end - 5, end - 600]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"x\.tar.*(truncated|damaged|no tar file)"):
            shards.list_shards(path)
    path.write_bytes(content[: end + 512])
    assert len(shards.list_shards(path)) == 3


def test_two_sets_of_make_shards_with_the_same_names(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(folder, tmp_path / name)
    with pytest.raises(UserError, match=r"a cat/0.0.jpg is in the shards twice, in .*one.* and in .*two"):
        shards.list_shards(f"{tmp_path}/{{one,two}}/*.tar")


# ---------------------------------------------------------------------------------------- make_shards.py


def test_resizing_shrinks_what_is_larger_and_copies_the_rest(tmp_path):
    (tmp_path / "in").mkdir()
    photo = Image.open(PICTURES[2]).convert("RGB").resize((150, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    photo.save(tmp_path / "in" / "a.jpg", quality=95, exif=exif)
    photo.resize((60, 40)).save(tmp_path / "in" / "b.jpg")
    photo.save(tmp_path / "in" / "c.png")
    write(tmp_path / "in", tmp_path / "out", "--resize", "50", "--quality", "95")
    images, plain = shards.list_shards(tmp_path / "out/train-000.tar"), data.list_images(tmp_path / "in")
    assert list(images.paths) == ["a.jpg", "b.jpg", "c.png"]
    assert images.decode(0).shape == (3, 75, 50) and images.decode(2).shape == (3, 50, 75)
    assert images.read(1) == plain.read(1)
    assert images.read(0).startswith(b"\xff\xd8\xff") and images.read(2).startswith(b"\xff\xd8\xff")
    for i in (0, 2):
        expected = data._resize(plain.decode(i), 50).float()
        assert (images.decode(i).float() - expected).abs().mean() < 4  # JPEG at quality 95


def test_broken_images_stop_it_or_are_left_out(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg(3))
    (tmp_path / "b.jpg").write_bytes(jpeg(4)[:-300])
    with pytest.raises(UserError, match=r"b\.jpg: .*truncated.*--skip-bad-images"):
        write(tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write(tmp_path, tmp_path / "out", "--skip-bad-images")
    assert "b.jpg" in capsys.readouterr().out
    assert list(shards.list_shards(tmp_path / "out/train-000.tar").paths) == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size-mb", "0"], "--size-mb"),
        (["--resize", "0"], "--resize"),
        (["--quality", "101"], "--quality"),
        (["--workers", "-1"], "--workers"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write(folder, tmp_path, *options)


@pytest.mark.parametrize("name", ["train.tar", "train-%d-%d.tar", "train-%s%.tar", "train-%03d.tgz"])
def test_bad_patterns_are_refused(folder, tmp_path, name):
    arguments = make_shards.get_parser().parse_args([str(folder), str(tmp_path / name)])
    with pytest.raises(UserError, match="%06d"):
        make_shards.main(arguments)


def test_shards_that_exist_are_not_overwritten(folder, tmp_path):
    (path,) = write(folder, tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write(folder, tmp_path, "--resize", "20")
    assert path.read_bytes() == before


def test_a_killed_run_leaves_whole_shards_only(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02d}.jpg").write_bytes(jpeg(i))
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tools import make_shards
encode = make_shards.Encoded.__getitem__
def dying(self, i):
    return encode(self, i) if i < 15 else os.kill(os.getpid(), signal.SIGKILL)
make_shards.Encoded.__getitem__ = dying
options = ["in", "out/x-%02d.tar", "--size-mb", "0.004", "--workers", "0"]
make_shards.main(make_shards.get_parser().parse_args(options))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    images = shards.list_shards(tmp_path / "out/x-*.tar")
    assert 2 < len(images) <= 15 and len(images.shards) > 2
    assert all(images.read(i) == jpeg(i) for i in range(len(images)))
