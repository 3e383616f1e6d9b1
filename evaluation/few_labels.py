"""Few labelled images of many: named by a list, or drawn, the same number of every class.

The published lists (imagenet_subsets/1percent.txt and 10percent.txt of google-research/simclr) have a file
name a line, such as n01440764_10026.JPEG: the class is what stands before the `_`.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from data import ImageList
from util import UserError, derive_seed


def drawn_mask(classes: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """(N,) bool: of each class in (N,) int64 `classes` the same number of images at random.

    The number is percent of N shared out over the classes, rounded, one at least; a class that has fewer
    gives all it has. With the same seed a smaller percentage draws a part of what a larger one does.
    """
    rng = np.random.default_rng(derive_seed(seed, "few labels"))
    each = number_of_each(classes, percent)
    mask = np.zeros(len(classes), dtype=bool)
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        mask[rng.permutation(members)[:each]] = True
    return mask


def number_of_each(classes: np.ndarray, percent: float) -> int:
    """How many images of every class percent of (N,) `classes` are."""
    return max(1, round(len(classes) * percent / 100 / len(np.unique(classes))))


def listed_mask(images: ImageList, path: str | Path) -> np.ndarray:
    """(N,) bool: the images whose names stand in a text file, one a line; empty lines count for nothing.

    A line is a path from the folder of the classes on (`cat/1.jpg`), or a file name. That one is looked for
    in the class folder whose name stands before its `_`; where there is none of that name, in all of them,
    and has to be the only one. Images that were left out as broken are passed over. Raises UserError for a
    file that is no text, for names that are not there (the first one, and how many), for one given twice.
    """
    lines = read_lines(path)
    ids = {name: c for c, name in enumerate(images.class_names)}
    places = {name: i for i, name in enumerate(images.paths)}
    called: dict[str, list[int]] = defaultdict(list)  # by file name alone
    for name, i in places.items():
        called[file_name(name)].append(i)
    skipped = {*images.skipped, *map(file_name, images.skipped)}
    mask, unknown = np.zeros(len(images), dtype=bool), []
    for number, line in lines:
        if "/" in line:
            found = [places[line]] if line in places else []
        else:
            own = class_before(line, ids)
            found = [i for i in called.get(line, []) if own is None or images.classes[i] == own]
        if len(found) > 1:
            raise UserError(
                f"{path} line {number}: {len(found)} images are called {line}; write class/name, as in "
                f"{images.paths[found[0]]}"
            )
        if found and mask[found[0]]:
            raise UserError(f"{path} line {number}: {line} is listed twice")
        mask[found] = True
        if not found and line not in skipped:
            unknown.append((number, line))
    if unknown:
        number, line = unknown[0]
        raise UserError(
            f"{path}: {len(unknown)} of {len(lines)} names are not in {images.name}, the first is {line} "
            f"(line {number})"
        )
    if not mask.any():
        raise UserError(f"{path} names no image of {images.name} (expected a file name a line)")
    return mask


def file_name(path: str) -> str:
    """What stands behind the last slash."""
    return path.rpartition("/")[2]


def class_before(name: str, ids: dict[str, int]) -> int | None:
    """The class whose name stands before a `_` of a file's name, the longest of several; or None."""
    end = name.rfind("_")
    while end > 0 and name[:end] not in ids:
        end = name.rfind("_", 0, end)
    return ids[name[:end]] if end > 0 else None


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not empty; UserError where the file is no text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read (expected a file name a line)") from error
    return [(n, line.strip()) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
