"""Few labelled images of many: named by a list, or drawn, the same number of every class.

The published lists (imagenet_subsets/1percent.txt and 10percent.txt of google-research/simclr) have a file
name a line, such as n01440764_10026.JPEG: the class is what stands before the `_`.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

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
    by_path = {name: i for i, name in enumerate(images.paths)}
    by_name: dict[str, list[int]] = defaultdict(list)
    for name, i in by_path.items():
        by_name[PurePosixPath(name).name].append(i)
    skipped = {name for left_out in images.skipped for name in (left_out, PurePosixPath(left_out).name)}
    mask, unknown = np.zeros(len(images), dtype=bool), []
    for number, line in lines:
        if line in skipped:
            continue
        found = [by_path[line]] if line in by_path else by_name.get(line, [])
        found = in_its_class(images, line, found)
        if not found:
            unknown.append((number, line))
        elif len(found) > 1:
            raise UserError(
                f"{path} line {number}: {len(found)} images are called {line}; write class/name, as in "
                f"{images.paths[found[0]]}"
            )
        elif mask[found[0]]:
            raise UserError(f"{path} line {number}: {line} is listed twice")
        else:
            mask[found[0]] = True
    if unknown:
        number, line = unknown[0]
        raise UserError(
            f"{path}: {len(unknown)} of {len(lines)} names are not in {images.name}, the first is {line} "
            f"(line {number})"
        )
    if not mask.any():
        raise UserError(f"{path} names no image of {images.name} (expected a file name a line)")
    return mask


def in_its_class(images: ImageList, line: str, found: list[int]) -> list[int]:
    """Those of the images found for a line that lie in the class before its `_`, if there is such a class."""
    if "/" in line:
        return found
    parts = line.split("_")
    named = {"_".join(parts[:n]) for n in range(1, len(parts))} & set(images.class_names)
    if not named:
        return found
    own = images.class_names.index(max(named, key=len))
    return [i for i in found if images.classes[i] == own]


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not empty; UserError where the file is no text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read (expected a file name a line)") from error
    return [(n, line.strip()) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
