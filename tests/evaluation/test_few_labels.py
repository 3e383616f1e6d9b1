"""Few labelled images: drawn, so many of every class, or named by a list."""

from pathlib import Path

import numpy as np
import pytest

from data import ImageList
from evaluation.few_labels import drawn_mask, listed_mask, number_of_each
from tests.helpers import refuses

SIZES = {"ant": 300, "bee": 100, "cat": 2, "dog": 198}  # 600 images


def counts(mask, classes):
    return [int(mask[classes == c].sum()) for c in range(len(SIZES))]


@pytest.fixture
def classes():
    """Ids of 600 images in no order."""
    ids = np.repeat(np.arange(len(SIZES)), list(SIZES.values()))
    return np.random.default_rng(0).permutation(ids)


@pytest.mark.parametrize("percent, each", [(1, 2), (10, 15), (0.01, 1)])
def test_every_class_gives_the_same_number_or_all_it_has(classes, percent, each):
    assert number_of_each(classes, percent) == each  # 600 / 4 classes: 1.5 is rounded to 2
    assert counts(drawn_mask(classes, percent, seed=3), classes) == [each, each, min(each, 2), each]


def test_draws_depend_on_the_seed_and_reach_every_image(classes):
    a, again, b = (drawn_mask(classes, 10, seed) for seed in (3, 3, 4))
    assert np.array_equal(a, again) and not np.array_equal(a, b)
    small = drawn_mask(classes, 1, 3)
    assert (small <= a).all() and small.sum() < a.sum()  # one percent lies in the ten
    drawn = sum(drawn_mask(classes, 10, seed).astype(int) for seed in range(60))
    assert (drawn[classes == 1] > 0).all()  # 15 of 100, 60 times: a miss of one has odds of 6e-5
    assert abs(drawn[classes == 1].mean() - 9) < 1e-9


@pytest.fixture
def images():
    names = ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n01_x/n01_x_1.JPEG", "n02/n02_1.JPEG", "n02/photo.png"]
    names += ["n01/same.png", "n02/same.png", "n02/n01_9.JPEG"]
    classes = ["n01", "n01_x", "n02"]
    ids = np.array([classes.index(name.split("/")[0]) for name in names])
    images = ImageList(Path("train"), names, ids, classes)
    images.skipped = ["n02/broken.png"]
    return images


def listed(images, tmp_path, *lines):
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    return np.flatnonzero(listed_mask(images, tmp_path / "list.txt")).tolist()


def test_names_are_found_in_the_class_before_the_underscore_or_by_their_folder(images, tmp_path):
    assert listed(images, tmp_path, "n02_1.JPEG", "", "  n01_2.JPEG ") == [1, 3]
    assert listed(images, tmp_path, "n01_x_1.JPEG") == [2]  # the longest name of a class
    assert listed(images, tmp_path, "photo.png", "n02/same.png") == [4, 6]
    assert listed(images, tmp_path, "n01_1.JPEG", "broken.png") == [0]  # left out with --skip-bad-images
    assert listed(images, tmp_path, "n02/n01_9.JPEG") == [7]


def test_unknown_names_are_counted_and_the_first_is_told(images, tmp_path):
    with refuses(r"list.txt: 2 of 3 names are not in train, the first is n07_3.JPEG \(line 2\)"):
        listed(images, tmp_path, "n01_1.JPEG", "n07_3.JPEG", "n01/absent.JPEG")
    with refuses(r"1 of 1 names are not in train, the first is n01_9.JPEG"):
        listed(images, tmp_path, "n01_9.JPEG")  # which lies in another class's folder
    with refuses(r"line 3: n01_1.JPEG is listed twice"):
        listed(images, tmp_path, "n01_1.JPEG", "n02_1.JPEG", "n01_1.JPEG")
    with refuses(r"line 1: 2 images are called same.png; write class/name, as in n01/same.png"):
        listed(images, tmp_path, "same.png")
    with refuses("list.txt names no image of train"):
        listed(images, tmp_path, "broken.png")
    with refuses("nowhere.txt: not a text file that can be read"):
        listed_mask(images, tmp_path / "nowhere.txt")
