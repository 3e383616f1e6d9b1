"""The labelled images of an evaluation: DATA/train and DATA/val with class sub-folders, a part held out."""

from pathlib import Path

import numpy as np

import data
from data import ImageList
from util import Log, UserError, derive_seed


def open_split(
    folder: str | Path,
    split: str,
    workers: int,
    bad_list: Path,
    skip_bad: bool = False,
    log: Log | None = None,
) -> ImageList:
    """The images of DATA/<split> with its class sub-folders, their headers looked at.

    Raises UserError where either is missing; bad images: data.open_images.
    """
    path = Path(folder) / split
    if not path.is_dir():
        raise UserError(f"{split}/ is missing in {folder} (expected DATA/train and DATA/val)")
    images = data.open_images(str(path), bad_list=bad_list, skip_bad=skip_bad, workers=workers, log=log)
    if images.classes is None:
        raise UserError(f"{path}: no class sub-folders (expected two or more, {split}/<class>/<image>)")
    return images


def open_train_val(
    folder: str | Path, workers: int, bad_list: Path, skip_bad: bool = False, log: Log | None = None
) -> tuple[ImageList, ImageList]:
    """DATA/train and DATA/val, class ids meaning the same in both.

    A class that is only in train/ is fine: its id counts. One that is only in val/ cannot be told: UserError.
    """
    train, val = (open_split(folder, split, workers, bad_list, skip_bad, log) for split in ("train", "val"))
    odd = sorted(set(val.class_names) - set(train.class_names))
    if odd:
        raise UserError(f"{folder}: class folder {odd[0]} is only in val/; nothing in train/ tells of it")
    ids = {name: i for i, name in enumerate(train.class_names)}
    val.renumber([ids[name] for name in val.class_names], train.class_names)
    return train, val


def hold_out(images: ImageList, fraction: float, seed: int) -> tuple[ImageList, ImageList | None]:
    """(the images to train on, those held out); (images, None) with fraction 0.

    Raises UserError where no class has an image to spare.
    """
    if fraction == 0:
        return images, None
    held = held_out_mask(images.classes, fraction, seed)
    if not held.any():
        raise UserError(f"--val-fraction {fraction:g}: no class has images enough to hold one out")
    return images.keep(~held), images.keep(held)


def held_out_mask(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool: of each class in (N,) int64 `classes` a random `fraction`, rounded, never all of it."""
    rng = np.random.default_rng(derive_seed(seed, "held out"))
    mask = np.zeros(len(classes), dtype=bool)
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        number = min(max(round(fraction * len(members)), fraction > 0), len(members) - 1)
        mask[rng.permutation(members)[:number]] = True
    return mask
