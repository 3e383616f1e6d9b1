"""The labelled images of an evaluation: their classes by sub-folders or by a file, a part held out.

By sub-folders they lie in DATA/train/<class> and DATA/val/<class>; by a file (--labels) anywhere. Tar
shards of train and of val may tell the classes too.
"""

import csv
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data import ImageList
from data.scan import scan
from util import Log, UserError, derive_seed

SPLITS = ("train", "val")
LONGEST_PATH, LONGEST_LABEL = 4096, 255  # characters; no file system has longer ones
COLUMNS = ["path", "label", "split"]  # of a file of labels; the last one may be missing

# ---------------------------------------------------------------------------------------- a file of labels


@dataclass
class Labels:
    """What a file of labels says, a line an image.

    file, folder: its name, and the folder that its paths start from; paths: relative to the folder, those of
    images elsewhere absolute; labels: names of classes; splits: train or val, None without such a column.
    """

    file: str
    folder: str
    paths: list[str]
    labels: list[str]
    splits: list[str] | None

    def of_split(self, split: str) -> "FileLabelled":
        """The images of train or val, in the order of the file; UserError where it names none."""
        splits = self.splits or [split_of(path, self.file) for path in self.paths]
        rows = [i for i, name in enumerate(splits) if name == split]
        if not rows:
            raise UserError(f"{self.file} names no image of {split}")
        names = sorted({self.labels[i] for i in rows})
        ids = {name: c for c, name in enumerate(names)}
        classes = np.array([ids[self.labels[i]] for i in rows], dtype=np.int64)
        images = FileLabelled(Path(self.folder), [self.paths[i] for i in rows], classes, names)
        images.name, images.files = f"{split} of {self.file}", [self.file]
        return images


class FileLabelled(ImageList):
    """Images whose paths do not tell their classes: the digest covers these, so that a run that goes on finds
    the same ones."""

    def digest(self) -> str:
        text = "\n".join([self.paths.digest(), *self.class_names])
        return hashlib.sha256(text.encode(errors="surrogateescape") + self.classes.tobytes()).hexdigest()


def split_of(path: str, file: str) -> str:
    """train or val, by the first folder of a path; UserError for another one."""
    first = path.split("/", 1)[0]
    if first not in SPLITS:
        raise UserError(
            f"{file}: {path} is neither in train/ nor in val/; put it there, or add a column split"
        )
    return first


def read_labels(file: str | Path, folder: str | Path) -> Labels:
    """Read a CSV file `path,label` or `path,label,split`; nothing is looked up on the disk.

    Raises UserError, with the number of the line, for a file of another form, an empty label, an unknown
    split, and a path that is listed twice.
    """
    found = Labels(str(file), str(folder), [], [], None)
    seen: dict[str, int] = {}
    roots = [f"{root.rstrip('/')}/" for root in (os.path.abspath(folder), os.path.realpath(folder))]
    for number, row in rows_of(file):
        if number == 1:  # the header
            found.splits = [] if len(row) == len(COLUMNS) else None
            continue
        path, label, split = inside(row[0], roots), row[1].strip(), row[2].strip() if len(row) > 2 else None
        if len(path) > LONGEST_PATH or len(label) > LONGEST_LABEL:
            raise UserError(f"{file}, line {number}: {row[0][:80]} or its label is too long")
        if not label:
            raise UserError(f"{file}, line {number}: {row[0]} has no label")
        if not is_text(label):
            raise UserError(f"{file}, line {number}: the label of {row[0]} is not UTF-8; save the file so")
        if split is not None and split not in SPLITS:
            raise UserError(f"{file}, line {number}: split {split!r} of {row[0]} is neither train nor val")
        if path in seen:
            raise UserError(f"{file}, line {number}: {row[0]} is in line {seen[path]} already")
        seen[path] = number
        found.paths.append(path)
        found.labels.append(label)
        if split is not None:
            found.splits.append(split)
    if not found.paths:
        raise UserError(f"{file} names no image (expected a line path,label for each)")
    return found


def rows_of(file: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, fields) of a file of labels, its header first; UserError for another form."""
    width = 0
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines, skipinitialspace=True)
            for row in filter(None, reader):
                if not width:
                    width = len(row)
                    if [name.strip().lower() for name in row] not in (COLUMNS[:2], COLUMNS):
                        raise UserError(
                            f"{file}: its first line must be path,label or path,label,split, with commas and "
                            "in UTF-8"
                        )
                    yield 1, row
                    continue
                if len(row) != width:
                    raise UserError(f"{file}, line {reader.line_num}: expected {','.join(COLUMNS[:width])}")
                yield reader.line_num, row
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def inside(path: str, roots: list[str]) -> str:
    """A path as it stands in a list of the images: relative where it lies below one of the roots."""
    full = os.path.normpath(os.path.join(roots[0], path))
    return next((full[len(root) :] for root in roots if full.startswith(root)), full)


def is_text(name: str) -> bool:
    """Whether a name that was read with surrogateescape was UTF-8 to begin with."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def find_images(labels: Labels, log: Log | None = None) -> None:
    """UserError where images of the file are missing; says how many images of the folder it leaves out."""
    if not os.path.isdir(labels.folder):
        raise UserError(f"{labels.folder}: no such folder")
    lying = set(scan(labels.folder).paths())
    absent = [
        path
        for path in labels.paths
        if path not in lying and not os.path.isfile(os.path.join(labels.folder, path))
    ]
    if absent:
        way_out = "" if all(map(is_text, absent)) else "; is the file in UTF-8?"
        raise UserError(
            f"{labels.file}: {absent[0]} does not exist in {labels.folder} "
            f"({len(absent)} of {len(labels.paths)} images are missing{way_out})"
        )
    without = len(lying.difference(labels.paths))
    if without and log is not None:
        log(f"left out {without} of the {len(lying)} images in {labels.folder}, not in {labels.file}")


# ---------------------------------------------------------------------------------------- splits


def open_split(
    folder: str | Path,
    split: str,
    workers: int,
    bad_list: Path,
    skip_bad: bool = False,
    log: Log | None = None,
    labels: Labels | None = None,
    one_class: bool = False,
    shards: str | None = None,
) -> ImageList:
    """The images of DATA/<split> with its class sub-folders, or those of `labels`; their headers looked at.

    one_class: a single class will do. shards: a pattern of tar shards instead of DATA. Raises UserError where
    images or classes are missing; bad images: data.open_images.
    """
    if labels is not None:
        return data.look_at(
            labels.of_split(split), bad_list=bad_list, skip_bad=skip_bad, workers=workers, log=log
        )
    if shards is not None:
        images = data.open_images(
            None, shards, bad_list=bad_list, skip_bad=skip_bad, workers=workers, log=log
        )  # fmt: skip
        if images.classes is None:
            raise UserError(f"{shards}: tells no classes (paths <class>/<image>, or a .cls for every image)")
        return images
    path = Path(folder) / split
    if not path.is_dir():
        raise UserError(f"{split}/ is missing in {folder} (expected DATA/train and DATA/val)")
    images = data.open_images(str(path), bad_list=bad_list, skip_bad=skip_bad, workers=workers, log=log)
    if images.classes is None and one_class:
        first = {path.split("/", 1)[0] if "/" in path else "" for path in images.paths}
        if len(first) == 1 and "" not in first:
            images.classes, images.class_names = np.zeros(len(images), np.int64), list(first)
    if images.classes is None:
        raise UserError(
            f"{path}: no class sub-folders (expected two or more, {split}/<class>/<image>; or --labels FILE)"
        )
    return images


def refuse_missing(
    folder: str | None, shards: str | None, val_shards: str | None, labels: str | None = None
) -> None:
    """UserError unless the images are named in one of the two ways: DATA, or shards of both splits."""
    given = [folder is not None, shards is not None, val_shards is not None]
    if given not in ([True, False, False], [False, True, True]):
        raise UserError(
            "--data is missing: give a folder with train/ and val/, or --shards and --val-shards, not both"
        )
    if labels is not None and folder is None:
        raise UserError("--labels: is of the images in --data; shards tell their classes themselves")


def open_train_val(
    folder: str | Path | None,
    workers: int,
    bad_list: Path,
    skip_bad: bool = False,
    log: Log | None = None,
    labels: str | Path | None = None,
    shards: tuple[str | None, str | None] = (None, None),
) -> tuple[ImageList, ImageList]:
    """The images to train on and those to judge by, class ids meaning the same in both.

    labels: a file that tells the classes; without one they lie in DATA/train/<class> and DATA/val/<class>.
    shards: of train and of val, instead of DATA.
    A class that is only in train is fine: its id counts. One that is only in val cannot be told: UserError.
    """
    read = None
    if labels is not None:
        read = read_labels(labels, folder)
        find_images(read, log)
    train, val = (
        open_split(folder, split, workers, bad_list, skip_bad, log, read, split == "val", pattern)
        for split, pattern in zip(SPLITS, shards)
    )
    where = labels or shards[1]
    match_classes(train, val, f"{folder}: class folder" if where is None else f"{where}: class")
    return train, val


def match_classes(train: ImageList, val: ImageList, what: str) -> None:
    """Give val the class ids of train; UserError for one that train lacks, with `what` before its name."""
    odd = sorted(set(val.class_names) - set(train.class_names))
    if odd:
        raise UserError(f"{what} {odd[0]} is only in val/; nothing in train/ tells of it")
    ids = {name: i for i, name in enumerate(train.class_names)}
    val.renumber([ids[name] for name in val.class_names], train.class_names)


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
