"""extract.py: the same bits after a kill, and broken images left out or told."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import data
import extract
from evaluation import store
from formats import released, rows
from formats.rows import read_names
from tests.extract_runs import close, plain, run, work  # noqa: F401
from tests.helpers import refuses
from util import UserError

# ---------------------------------------------------------------------------------------- going on


class Killed(Exception):
    pass


def kill_after(monkeypatch, batches):
    """The process ends when it would note down that so many batches are done."""
    sync, calls = store.Store.sync, []

    def dying(rows):
        calls.append(rows)
        if len(calls) >= batches:
            raise Killed
        sync(rows)

    monkeypatch.setattr(store, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(store.Store, "sync", dying)


@pytest.mark.parametrize("form", ["npy", "parquet", "pickle"])
def test_killed_and_continued_is_bit_identical(work, tmp_path, monkeypatch, form):
    flags = ["--format", form, "--batch", 7, "--layer", "conv1"]
    whole = run(work, tmp_path / "whole", *flags).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        run(work, tmp_path / "part", *flags)
    assert not (tmp_path / f"part{rows.ENDINGS[form]}").exists()
    decoded = []
    decode = data.ImageList.decode
    monkeypatch.setattr(data.ImageList, "decode", lambda images, i: decoded.append(i) or decode(images, i))
    path = run(work, tmp_path / "part", *flags)
    assert decoded == list(range(21, 48))  # three batches were noted down, the fourth is made again
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob("part*.part")) and not list(tmp_path.glob("*.journal"))
    if form == "npy":
        assert (tmp_path / "part.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_other_settings_do_not_go_on(work, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(work, tmp_path / "a")
    before = (tmp_path / "a.npy.part").read_bytes()
    for flags, named in (
        (["--batch", 8], "batch 16, now 8"),
        (["--layer", "fc7"], "layer fc7.pre, now fc7"),
    ):
        with pytest.raises(UserError, match=named):
            run(work, tmp_path / "a", *flags)
    with pytest.raises(UserError, match="another network"):
        run(work, tmp_path / "a", model="exp/clustering.pth.tar")
    assert (tmp_path / "a.npy.part").read_bytes() == before  # the work is not lost by a slip
    assert close(np.load(run(work, tmp_path / "a", "--layer", "fc7", "--restart")), plain(work, "fc7"))


def test_changed_images_do_not_go_on(work, tmp_path, monkeypatch):
    shutil.copytree(work / "images", tmp_path / "images")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        run(work, tmp_path / "a", images=tmp_path / "images")
    first = sorted((tmp_path / "images").rglob("*.jpg"))[0]
    Image.new("RGB", (50, 50)).save(first)
    with pytest.raises(UserError, match="another state of the images"):
        run(work, tmp_path / "a", images=tmp_path / "images")


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_two_calls_that_write_one_out_exclude_each_other(work, tmp_path, monkeypatch, form):
    """In whatever form the second one writes; with the first one's end the way is free."""
    append, refused = store.Store.append, []

    def interrupted(*arguments):
        append(*arguments)
        if not refused:
            with refuses(r"a\.npy\.part: another process is writing it"):
                run(work, tmp_path / "a", "--format", form)
            refused.append(True)

    monkeypatch.setattr(store.Store, "append", interrupted)
    first = np.load(run(work, tmp_path / "a"))
    assert refused and close(first, plain(work, "fc7.pre"))
    run(work, tmp_path / "a", "--format", form)


def test_left_over_files_of_killed_calls_are_removed(work, tmp_path):
    for name in ("a.npy.journal.tmp-1", "a.txt.tmp-1", "b.txt.tmp-1"):
        (tmp_path / name).write_text("half")
    run(work, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.txt", "b.txt.tmp-1"]


# ---------------------------------------------------------------------------------------- broken images


@pytest.fixture
def damaged(work, tmp_path):
    """The images, one of them cut after its header; its index."""
    shutil.copytree(work / "images", tmp_path / "images")
    images = data.list_images(tmp_path / "images")
    content = images.path(20).read_bytes()
    images.path(20).write_bytes(content[: len(content) * 9 // 10])
    return tmp_path / "images", 20


@pytest.mark.parametrize("form", ["npy", "parquet", "pickle"])
def test_a_damaged_image_stops_the_run_or_is_left_out(work, tmp_path, damaged, monkeypatch, form):
    folder, bad = damaged
    name = data.list_images(folder).paths[bad]
    with pytest.raises(UserError, match=f"1 of 48 images cannot be decoded .*{name}"):
        run(work, tmp_path / "a", "--format", form, images=folder)
    assert name in (tmp_path / "a.bad_images.txt").read_text()
    monkeypatch.setattr(
        extract, "activation_batches", lambda *_: iter([])
    )  # all is done: nothing is computed again
    path = run(work, tmp_path / "a", "--format", form, "--skip-bad-images", images=folder)
    if form == "npy":
        rows, names = np.load(path), read_names(tmp_path / "a.txt")
    elif form == "pickle":
        names, rows = released.read_features(path)
    else:
        table = pyarrow.parquet.read_table(path)
        names = table.column("path").to_pylist()
        rows = table.column("feature").combine_chunks().flatten().to_numpy().reshape(47, -1)
    assert names == [p for i, p in enumerate(data.list_images(folder).paths) if i != bad]
    assert close(rows, np.delete(plain(work, "fc7.pre"), bad, axis=0))


def test_a_mended_image_is_not_left_out(work, tmp_path, damaged, monkeypatch):
    folder, bad = damaged
    with pytest.raises(UserError):
        run(work, tmp_path / "a", images=folder)
    path = data.list_images(folder).path(bad)
    shutil.copy(data.list_images(work / "images").path(bad), path)
    with pytest.raises(UserError, match="another state of the images"):
        run(work, tmp_path / "a", "--skip-bad-images", images=folder)
    stamps = data.ImageList.stamps  # a file system that was away for a moment: nothing changed
    monkeypatch.setattr(data.ImageList, "stamps", lambda images: stamps(images)[:, :0])
    (tmp_path / "a.npy.part").unlink()
    with monkeypatch.context() as patch, pytest.raises(UserError):
        decode = data.ImageList.decode

        def failing(images, i):
            if i == bad:
                raise data.ImageError(images.path(i), "input/output error")
            return decode(images, i)

        patch.setattr(data.ImageList, "decode", failing)
        run(work, tmp_path / "a", images=folder)
    assert np.load(run(work, tmp_path / "a", "--skip-bad-images", images=folder)).shape == (48, 40)


def test_what_is_no_image_stops_before_any_work(work, tmp_path, damaged):
    folder, _ = damaged
    (folder / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"text\.jpg: not an image"):
        run(work, tmp_path / "a", images=folder)
    assert not (tmp_path / "a.npy.part").exists()
    assert len(np.load(run(work, tmp_path / "a", "--skip-bad-images", images=folder))) == 47
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(UserError, match="none of the 49 images"):
        run(work, tmp_path / "b", "--skip-bad-images", images=folder)
