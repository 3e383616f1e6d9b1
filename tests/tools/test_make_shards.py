"""tools/make_shards.py: what it writes, refuses, and leaves behind where it ends early."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

import data
from data import crops, scan, shards
from tests.tars import PICTURES, ROOT, jpeg, write, write_folder
from tools import make_shards
from util import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


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
        expected = crops._resize(plain.decode(i), 50).float()
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
def test_bad_options_are_refused(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        write(folder, tmp_path, *options)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said


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


def test_splits_and_folders_that_cannot_be_read_go_by_the_flags_of_a_run(tmp_path, capsys, monkeypatch):
    for name in ("train", "val", "closed"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(jpeg(3))
    (tmp_path / "in" / "notes.heic").touch()
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(scan.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"closed: permission denied.*--skip-bad-images"):
        write(tmp_path / "in", tmp_path / "out", "--all-splits")
    with pytest.raises(UserError, match=r"holds train/ and val/.*--all-splits"):
        write(tmp_path / "in", tmp_path / "out", "--skip-bad-images")
    (path,) = write(tmp_path / "in", tmp_path / "out", "--skip-bad-images", "--all-splits")
    assert list(shards.list_shards(path).paths) == ["train/1.jpg", "val/1.jpg"]
    said = capsys.readouterr().out
    assert "closed: permission denied" in said and "1 .heic" in said


def killed(folder, out):
    """A process that writes 20 images into shards of three or so, and is killed at the 16th."""
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tools import make_shards
encode = make_shards.Encoded.__getitem__
def dying(self, i):
    return encode(self, i) if i < 15 else os.kill(os.getpid(), signal.SIGKILL)
make_shards.Encoded.__getitem__ = dying
options = [{str(folder)!r}, {str(out / "train-%03d.tar")!r}, "--size-mb", "0.004", "--workers", "0"]
make_shards.main(make_shards.get_parser().parse_args(options))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_whole_shards_only_which_give_way_to_the_next(tmp_path):
    killed(tmp_path / "in", tmp_path / "out")
    images = shards.list_shards(tmp_path / "out/train-*.tar")
    assert 2 < len(images) <= 15 and len(images.shards) > 2
    assert all(images.read(i) == jpeg(i) for i in range(len(images)))

    assert (tmp_path / "out/train-000.tar.unfinished").exists()
    assert list((tmp_path / "out").glob("*.tmp-*"))
    (tmp_path / "out" / "train-000.tar.mine").touch()  # not ours to remove
    (tmp_path / "out" / "train-900.tar").touch()
    (path,) = write(tmp_path / "in", tmp_path / "out")
    assert len(shards.list_shards(path)) == 20
    left = {found.name for found in (tmp_path / "out").iterdir()}
    assert left == {"train-000.tar", "train-000.tar.mine", "train-900.tar"}


def test_a_full_disk_leaves_nothing_and_the_next_call_goes_through(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02d}.jpg").write_bytes(jpeg(i))
    write_shard, fsync = make_shards.write_shard, os.fsync
    for place in range(6):  # the third shard, or the journal's third line
        count = 0

        def full(*arguments, of=write_shard if place % 2 else fsync, last=2 + place // 2):
            nonlocal count
            count += 1
            if count > last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return of(*arguments)

        with monkeypatch.context() as patch, pytest.raises((UserError, OSError), match="No space left"):
            patch.setattr(*((make_shards, "write_shard") if place % 2 else (os, "fsync")), full)
            write(tmp_path / "in", tmp_path / "out", "--size-mb", "0.004")
        assert list((tmp_path / "out").iterdir()) == []
    assert len(write(tmp_path / "in", tmp_path / "out", "--size-mb", "0.004")) > 3


def test_shards_of_others_behind_the_first_are_neither_overwritten_nor_removed(folder, tmp_path):
    (tmp_path / "train-001.tar").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"train-001\.tar exists already"):
        write(folder, tmp_path, "--size-mb", "0.012")
    assert [path.name for path in tmp_path.iterdir()] == ["train-001.tar"]
    assert (tmp_path / "train-001.tar").read_bytes() == b"theirs"


def test_two_processes_do_not_write_the_same_shards(folder, tmp_path):
    with make_shards.unfinished(str(tmp_path / "train-%03d.tar")):
        with pytest.raises(UserError, match="another process is writing these shards"):
            write(folder, tmp_path)
    assert len(write(folder, tmp_path)) == 1
