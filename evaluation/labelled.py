"""The labelled images of an evaluation: DATA/train and DATA/val with class sub-folders."""

from pathlib import Path

import data
from data import ImageList
from util import UserError


def open_split(
    folder: str | Path, split: str, workers: int, bad_list: Path, skip_bad: bool = False
) -> ImageList:
    """The images of DATA/<split> with its class sub-folders, their headers looked at.

    Raises UserError where either is missing; bad images: data.open_images.
    """
    path = Path(folder) / split
    if not path.is_dir():
        raise UserError(f"{split}/ is missing in {folder} (expected DATA/train and DATA/val)")
    images = data.open_images(str(path), bad_list=bad_list, skip_bad=skip_bad, workers=workers)
    if images.classes is None:
        raise UserError(f"{path}: no class sub-folders (expected two or more, {split}/<class>/<image>)")
    return images


def open_train_val(
    folder: str | Path, workers: int, bad_list: Path, skip_bad: bool = False
) -> tuple[ImageList, ImageList]:
    """DATA/train and DATA/val, class ids meaning the same in both.

    A class that is only in train/ is fine: its id counts. One that is only in val/ cannot be told: UserError.
    """
    train, val = (open_split(folder, split, workers, bad_list, skip_bad) for split in ("train", "val"))
    odd = sorted(set(val.class_names) - set(train.class_names))
    if odd:
        raise UserError(f"{folder}: class folder {odd[0]} is only in val/; nothing in train/ tells of it")
    ids = {name: i for i, name in enumerate(train.class_names)}
    val.renumber([ids[name] for name in val.class_names], train.class_names)
    return train, val
