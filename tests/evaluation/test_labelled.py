"""DATA/train and DATA/val: classes that mean the same, what is missing, bad files, the part held out."""

import numpy as np
import pytest
from PIL import Image

from evaluation.labelled import held_out_mask, hold_out, open_split, open_train_val
from util import UserError


def write(root, **splits):
    """root/<split>/<class>/<number>.png, `splits` naming for each split its classes and how many of each."""
    for split, classes in splits.items():
        for name, number in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20, 20)).save(root / split / name / f"{i}.png")
    return root


def test_class_that_is_only_in_train_counts_as_an_id(tmp_path):
    write(tmp_path, train={"ant": 2, "bee": 1, "cat": 1}, val={"ant": 1, "cat": 2})
    train, val = open_train_val(tmp_path, 1, tmp_path / "bad.txt")
    assert train.class_names == val.class_names == ["ant", "bee", "cat"]
    assert train.classes.tolist() == [0, 0, 1, 2]
    assert val.classes.tolist() == [0, 2, 2]


def test_class_that_is_only_in_val_is_refused(tmp_path):
    write(tmp_path, train={"ant": 1, "bee": 1}, val={"ant": 1, "cow": 1})
    with pytest.raises(UserError, match="class folder cow is only in val/"):
        open_train_val(tmp_path, 1, tmp_path / "bad.txt")


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": {"ant": 1, "bee": 1}}, "val/ is missing in .* .expected DATA/train and DATA/val"),
        ({"val": {"ant": 1, "bee": 1}}, "train/ is missing in"),
        ({"train": {"ant": 1}, "val": {"ant": 1}}, r"train: no class sub-folders .*train/<class>/<image>"),
    ],
)
def test_what_is_missing_is_told(tmp_path, splits, message):
    write(tmp_path, **splits)
    with pytest.raises(UserError, match=message):
        open_train_val(tmp_path, 1, tmp_path / "bad.txt")


def test_shards_have_to_tell_classes_which_mean_the_same_in_both(tmp_path):
    pytest.importorskip("webdataset")
    from tools import make_shards

    write(tmp_path, train={"ant": 2, "bee": 2}, val={"bee": 1}, odd={"ant": 1, "cow": 1})
    for split in ("train", "val", "odd"):
        folder = str(tmp_path / split)
        arguments = [folder, str(tmp_path / f"{split}-%03d.tar"), "--workers", "0"]
        make_shards.main(make_shards.get_parser().parse_args(arguments))

    def open_both(train, val):
        patterns = tuple(str(tmp_path / f"{name}-000.tar") for name in (train, val))
        return open_train_val(None, 1, tmp_path / "bad.txt", shards=patterns)

    train, _ = open_both("train", "train")
    assert train.classes.tolist() == [0, 0, 1, 1] and train.class_names == ["ant", "bee"]
    with pytest.raises(UserError, match=r"val-000\.tar: tells no classes"):
        open_both("train", "val")
    with pytest.raises(UserError, match=r"odd-000\.tar: class cow is only in val/; nothing in train/"):
        open_both("train", "odd")


def test_bad_file_is_named_or_left_out(tmp_path):
    write(tmp_path, train={"ant": 2, "bee": 2})
    (tmp_path / "train/bee/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/bee/0\.png: the file is empty"):
        open_split(tmp_path, "train", 1, tmp_path / "bad.txt")
    said = []
    images = open_split(tmp_path, "train", 1, tmp_path / "bad.txt", skip_bad=True, log=said.append)
    assert list(images.paths) == ["ant/0.png", "ant/1.png", "bee/1.png"]
    assert images.classes.tolist() == [0, 0, 1]
    assert "left out 1 of 4 images" in said[0]
    assert (tmp_path / "bad.txt").read_text().count("bee/0.png") == 1


def test_held_out_part_is_the_same_share_of_each_class_and_never_all_of_it():
    classes = np.repeat([0, 1, 2, 3], [40, 20, 1, 4])
    mask = held_out_mask(classes, 0.25, seed=31)
    assert np.bincount(classes[mask], minlength=4).tolist() == [10, 5, 0, 1]
    assert np.array_equal(mask, held_out_mask(classes, 0.25, seed=31))
    assert not np.array_equal(mask, held_out_mask(classes, 0.25, seed=32))
    assert np.bincount(classes[held_out_mask(classes, 0.99, 31)])[1] == 19
    assert not held_out_mask(classes, 0.0, seed=31).any()


def test_held_out_images_and_the_others_are_all_images(tmp_path):
    write(tmp_path, train={"ant": 4, "bee": 4})
    images = open_split(tmp_path, "train", 1, tmp_path / "bad.txt")
    kept, held = hold_out(images, 0.25, 31)
    assert (len(kept), len(held)) == (6, 2)
    assert sorted([*kept.paths, *held.paths]) == list(images.paths)
    assert held.classes.tolist() == [0, 1]
    assert hold_out(images, 0.0, 31) == (images, None)


def test_nothing_to_hold_out_is_told(tmp_path):
    write(tmp_path, train={"ant": 1, "bee": 1})
    images = open_split(tmp_path, "train", 1, tmp_path / "bad.txt")
    with pytest.raises(UserError, match=r"--val-fraction 0\.5: no class has images enough"):
        hold_out(images, 0.5, 31)
