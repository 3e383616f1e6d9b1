"""evaluation/store.py: rows that go on after a kill, and damage that is noticed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import store
from evaluation.store import Store
from util import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"layer": "conv5", "S": 112, "sizes": (1, 2)}


def open_store(folder, settings=SETTINGS, width=3, dtype="float32", **options):
    return Store(folder / "rows.npy", width, dtype, settings, "use another folder", **options)


def rows_of(image):
    """One to three rows, as regions of images are."""
    return np.random.default_rng(image).standard_normal((1 + image % 3, 3)).astype(np.float32)


def fill(rows, last=10):
    for image in range(rows.done, last):
        rows.append(rows_of(image))


EXPECTED = np.concatenate([rows_of(image) for image in range(10)])


def test_the_finished_file_is_what_numpy_would_have_saved(tmp_path):
    with open_store(tmp_path) as rows:
        fill(rows)
        rows.finish()
    np.save(tmp_path / "numpy.npy", EXPECTED)
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numpy.npy", "rows.npy"]


def test_rows_are_brought_to_the_dtype_of_the_file_and_to_its_layout(tmp_path):
    with open_store(tmp_path, dtype="float16") as rows:
        rows.append(EXPECTED.T.copy().T, images=9, broken=[4])
        assert (rows.done, rows.broken) == (9, [4])
        with pytest.raises(ValueError, match="expected"):
            rows.append(EXPECTED[:, :2])
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), EXPECTED.astype(np.float16))


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_a_block_that_ends_early_loses_nothing(tmp_path, error):
    with pytest.raises(error), open_store(tmp_path) as rows:
        fill(rows, 7)
        rows.append(np.zeros((0, 3)), broken=[7])
        raise error
    assert not (tmp_path / "rows.npy").exists()
    with open_store(tmp_path) as rows:
        assert (rows.done, rows.broken) == (8, [7])
        fill(rows)
        rows.finish()
    left = np.concatenate([rows_of(image) for image in range(10) if image != 7])
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), left)


KILLED = """
import os, signal, sys
from evaluation import store
from tests.evaluation.test_store import Path, fill, open_store
store.SYNC_SECONDS = float(sys.argv[2])
with open_store(Path(sys.argv[1])) as rows:
    fill(rows, 4)
    rows.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("seconds", "done"), [(0, 4), (1000, 0)])
def test_after_sigkill_it_goes_on_where_the_journal_stands(tmp_path, seconds, done):
    """What lies in the file beyond the journal's word is made again."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(seconds)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "rows.npy.part").stat().st_size > 128
    with open_store(tmp_path) as rows:
        assert rows.done == done
        fill(rows)
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), EXPECTED)


def begin(folder, last=6):
    with open_store(folder) as rows:
        fill(rows, last)
    return folder / "rows.npy.part", folder / "rows.npy.journal"


@pytest.mark.parametrize("change", ["flip", "shorten", "journal", "no json", "another json"])
def test_damage_is_refused_and_restart_is_the_way_out(tmp_path, change):
    part, journal = begin(tmp_path)
    content = bytearray(part.read_bytes())
    if change == "flip":
        content[-5] ^= 1
        part.write_bytes(content)
    elif change == "shorten":
        part.write_bytes(content[:-12])
    elif change == "journal":
        journal.write_text(journal.read_text().replace('"done": 6', '"done": 7'))
    else:
        journal.write_text({"no json": "{", "another json": "[1]"}[change])
    with pytest.raises(UserError, match=r"rows\.npy\.(part|journal): damaged, .*; use another folder$"):
        open_store(tmp_path)
    with open_store(tmp_path, restart=True) as rows:
        assert rows.done == 0
        fill(rows)
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), EXPECTED)


def test_a_journal_never_vouches_for_rows_of_another_call(tmp_path):
    part, journal = begin(tmp_path)
    part.unlink()
    with open_store(tmp_path) as rows:
        assert rows.done == 0 and not journal.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": SETTINGS | {"S": 128}}, "S 112, now 128"),
        ({"settings": SETTINGS | {"layer": "x" * 64}}, "another layer"),
        ({"settings": SETTINGS | {"pool": 2}}, "pool None, now 2"),
        ({"dtype": "float16"}, "dtype float32, now float16"),
        ({"width": 4}, "width 3, now 4"),
    ],
)
def test_rows_of_other_settings_are_refused(tmp_path, options, message):
    begin(tmp_path)
    with pytest.raises(UserError, match=f"was made with {message}; use another folder"):
        open_store(tmp_path, **options)
    with open_store(tmp_path) as rows:  # they are still there
        assert rows.done == 6


def test_two_processes_do_not_mix_their_rows(tmp_path):
    with open_store(tmp_path) as rows:
        fill(rows, 5)
        with pytest.raises(UserError, match=r"rows\.npy\.part: another process is writing it"):
            open_store(tmp_path, restart=True)
        fill(rows)
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), EXPECTED)


def test_a_part_that_is_made_into_another_file_goes_on_until_it_is_removed(tmp_path):
    with open_store(tmp_path) as rows:
        fill(rows)
        np.testing.assert_array_equal(np.load(rows.complete()), EXPECTED)
    with open_store(tmp_path) as rows:  # killed before the other file was there
        assert rows.done == 10
        np.testing.assert_array_equal(np.load(rows.complete()), EXPECTED)
        rows.remove()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_the_journal_vouches_for(tmp_path):
    begin(tmp_path, 3)
    with pytest.raises(OSError, match="No space"), open_store(tmp_path) as rows:
        full = open("/dev/full", "r+b")
        os.dup2(full.fileno(), rows.file.fileno())
        fill(rows)
        rows.sync()
    with open_store(tmp_path) as rows:
        assert rows.done == 3


# ---------------------------------------------------------------------------------------- finished files


def finish(folder):
    with open_store(folder) as rows:
        fill(rows)
        rows.finish(folder / "rows.json", names=["a", "b"])
    return folder / "rows.npy", folder / "rows.json"


def test_a_finished_file_is_loaded_with_its_index(tmp_path):
    assert store.load(tmp_path / "rows.npy", tmp_path / "rows.json", "") is None
    path, index = finish(tmp_path)
    rows, found = store.load(path, index, "")
    np.testing.assert_array_equal(rows, EXPECTED)
    assert found["names"] == ["a", "b"] and found["settings"]["sizes"] == [1, 2]
    assert json.loads(index.read_text())["rows"] == len(EXPECTED)
    index.unlink()
    assert store.load(path, index, "") is None


@pytest.mark.parametrize("change", ["flip", "shorten", "not numpy", "index"])
def test_damage_of_a_finished_file_is_refused(tmp_path, change):
    path, index = finish(tmp_path)
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[-1] ^= 64
    new = {"shorten": content[:-40], "not numpy": b"hello"}.get(change, content)
    path.write_bytes(new)
    if change == "index":
        index.write_text(index.read_text().replace('"a"', '"c"'))
    with pytest.raises(UserError, match=r"damaged, .*; remove it"):
        store.load(path, index, "remove it")
