"""Features that lie in .npy files (extract.py), read a slice at a time, with the classes of their images."""

from pathlib import Path

import numpy as np

from algorithms.pca import normalise_rows
from evaluation.assignments import by_file, by_folder
from evaluation.labelled import Labels
from util import UserError


class UnitRows:
    """Rows of norm 1, made of those of a file when they are asked for: rows[a:b] is (b - a, D) float32.

    array: (N, D), memory-mapped; index: (n,) rows of it that count; paths: (N,) of the images; classes: (n,)
    class ids, once `match` has set them.
    """

    def __init__(self, file: str, array: np.ndarray, paths: list[str], index: np.ndarray, names: np.ndarray):
        self.file, self.array, self.paths, self.index, self.names = file, array, paths, index, names
        self.shape = (len(index), array.shape[1])
        self.classes = np.zeros(len(index), np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> np.ndarray:
        rows = np.asarray(self.array[self.index[part]], dtype=np.float32)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            path = self.paths[self.index[part][finite.argmin()]]
            raise UserError(f"{self.file}: the feature of {path} is not finite")
        return normalise_rows(rows)


def open_rows(file: str, paths: list[str], split: str, labels: Labels | None) -> UnitRows:
    """The rows of a .npy file whose images have a class; paths (N,): of the images, as extract.py names them.

    Raises UserError for a file of another form and for paths that tell no class.
    """
    try:
        with open(file, "rb") as start:
            if np.lib.format.read_magic(start) != (1, 0):  # later ones may announce a header of 4 GiB
                raise ValueError("of a version that extract.py does not write")
        array = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # what numpy makes of a damaged or foreign header is nearly any of them
        reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        raise UserError(f"{file}: not a .npy file that can be read ({reason})") from error
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32) or 0 in array.shape:
        raise UserError(f"{file}: holds {array.dtype} {array.shape}, expected rows of float32 or float16")
    if len(array) != len(paths):
        raise UserError(f"{file} has {len(array)} rows, its file of names {len(paths)}")
    rows = np.arange(len(paths))[None]
    found = (
        by_folder(file, paths, rows, split) if labels is None else by_file(file, paths, rows, split, labels)
    )
    if split not in found:
        raise UserError(f"{file}: none of its images is of {split}")
    return UnitRows(file, array, paths, found[split].labels[0], found[split].classes)


def match(train: UnitRows, val: UnitRows) -> list[str]:
    """Set the class ids of both by their names, and return these.

    Raises UserError for a class that is only in val, and where rows are of different lengths.
    """
    if train.shape[1] != val.shape[1]:
        raise UserError(f"{train.file} has rows of {train.shape[1]} numbers, {val.file} of {val.shape[1]}")
    names = np.unique(train.names)
    odd = np.setdiff1d(val.names, names)
    if len(odd):
        raise UserError(f"{val.file}: class {odd[0]} is only in val; nothing in {train.file} tells of it")
    for rows in (train, val):
        rows.classes = np.searchsorted(names, rows.names)
    return names.tolist()


def names_of(file: str) -> Path:
    """The file of names that extract.py writes beside a .npy file; UserError where it is missing."""
    path = Path(file).with_suffix(".txt")
    if Path(file).suffix != ".npy" or not path.is_file():
        raise UserError(f"{file}: not a file of extract.py: OUT.npy, with the images' paths in OUT.txt")
    return path
