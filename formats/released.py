"""The cluster assignments and features that the authors released: reading them, and writing the same forms.

    python released.py alexnet_cluster_assignment.pickle                    # what is in it
    python released.py alexnet_cluster_assignment.pickle --csv alexnet.csv  # path,cluster
    python released.py alexnet_features.pkl

Nothing in a file is executed (safe_pickle.py).
"""

import argparse
import csv
import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safe_pickle
from safe_pickle import Array, text

from util import UserError, atomic_write, run_main

SHOWN = 5  # lines of a file that are printed
PROTO_2 = pickle.PROTO + b"\x02"


# ---------------------------------------------------------------------------------------- reading


def read_assignments(path: str | Path) -> list[tuple[str, int]]:
    """The (image path, cluster) pairs of a released `*_cluster_assignment.pickle`, in the file's order.

    1.28 million pairs take some five seconds and 0.7 GiB. Raises UserError for anything but such a list.
    """
    return as_assignments(safe_pickle.load(path), path)


def as_assignments(content: Any, path: str | Path) -> list[tuple[str, int]]:
    """Check and clean the content of an assignment pickle, in place; `path` is for the errors."""
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of (image path, cluster) pairs, found {describe(content)}")
    if not content:
        raise UserError(f"{path}: an empty list, it holds no image")
    for i, pair in enumerate(content):
        name = text(pair[0]) if isinstance(pair, tuple | list) and len(pair) == 2 else None
        if name is None or type(pair[1]) is not int or not 0 <= pair[1] < 2**31:
            raise UserError(
                f"{path}: expected (image path, cluster) pairs, found {describe(pair)} at position {i}"
            )
        content[i] = (name, pair[1])
    return content


def read_features(path: str | Path) -> tuple[list[str] | None, np.ndarray]:
    """(names or None, features (N, D)) of a features pickle; rows in the file's order, the file's own dtype.

    The authors did not document the form of theirs. Read are: an array (N, D); a list of arrays (D,); a list
    of (path, array) pairs; a dict path -> array; and (paths, array), as a tuple, a list or the values of a
    dict. Memory: an array as it is, read-only; rows take twice their size, as they are gathered into one
    array. Raises UserError, which says what was found, for everything else.
    """
    return as_features(safe_pickle.load(path), path)


def as_features(content: Any, path: str | Path) -> tuple[list[str] | None, np.ndarray]:
    """Bring the content of a features pickle into one form; `path` is for the errors."""
    if isinstance(content, Array):
        return None, _matrix(content, path)
    parts = list(content.values()) if isinstance(content, dict) else content
    if isinstance(parts, tuple | list) and len(parts) == 2:
        names, features = parts if isinstance(parts[1], Array) else parts[::-1]
        if isinstance(features, Array) and isinstance(names, tuple | list):
            return _names(names, features, path), _matrix(features, path)
    names, rows = _by_image(content)
    clean = None if names is None else [text(name) for name in names]
    if not rows or (clean is not None and None in clean) or not all(isinstance(row, Array) for row in rows):
        raise UserError(
            f"{path}: expected features, by path or as an array (N, D); found {describe(content)}"
        )
    return clean, _stack(rows, path)


def _by_image(content: Any) -> tuple[list | None, list]:
    """(names or None, rows) of a dict, a list of pairs or a list of rows; not yet checked."""
    if isinstance(content, dict):
        return list(content), list(content.values())
    if not isinstance(content, list) or not content:
        return None, []
    if not isinstance(content[0], tuple | list):
        return None, content
    pairs = [pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None) for pair in content]
    return [name for name, _ in pairs], [row for _, row in pairs]


def _matrix(array: Array, path: str | Path) -> np.ndarray:
    if array.numbers.ndim != 2 or array.numbers.dtype.kind != "f" or not len(array.numbers):
        raise UserError(f"{path}: expected features (N, D) of floats, found {describe(array)}")
    return array.numbers


def _names(names: list | tuple, features: Array, path: str | Path) -> list[str]:
    """The names beside one array, checked to be as many as its rows."""
    clean = [text(name) for name in names]
    if None in clean or len(clean) != len(features.numbers):
        raise UserError(
            f"{path}: expected a path for each row, found {describe(names)} beside {describe(features)}"
        )
    return clean


def _stack(rows: list[Array], path: str | Path) -> np.ndarray:
    """Rows (D,) or (1, D) -> (N, D)."""
    first = rows[0].numbers
    result = np.empty((len(rows), first.size), dtype=first.dtype)
    for i, row in enumerate(rows):
        numbers = row.numbers
        if numbers.shape not in ((first.size,), (1, first.size)) or numbers.dtype.kind != "f":
            raise UserError(
                f"{path}: expected {first.size} floats for each image, found {describe(row)} at position {i}"
            )
        result[i] = numbers.reshape(-1)
    return result


def describe(value: Any, depth: int = 0) -> str:
    """What a value is, in a few words: `a list of 3, the first a tuple (text, an array (8,) of f4)`."""
    if isinstance(value, Array):
        return f"an array {value.numbers.shape} of {value.numbers.dtype.str[1:]}"
    if text(value) is not None:
        return "text"
    if isinstance(value, tuple | list) and (depth or isinstance(value, tuple)) and 0 < len(value) <= 4:
        inner = ", ".join(describe(item, depth + 1) for item in value) if depth < 3 else "..."
        return f"a {type(value).__name__} ({inner})"
    if isinstance(value, tuple | list | dict):
        first = next(iter(value.items() if isinstance(value, dict) else value), None)
        more = f", the first {describe(first, depth + 1)}" if len(value) and depth < 3 else ""
        return f"a {type(value).__name__} of {len(value)}{more}"
    return f"{type(value).__name__} {value!r}"[:60]


# ---------------------------------------------------------------------------------------- writing


def write_assignments_pickle(path: str | Path, pairs: Iterable[tuple[str, int]]) -> None:
    """(image path, cluster) pairs as the authors released theirs: a list of tuples, protocol 2.

    `pickle.load` of Python 2 reads it, and that of Python 3 with `encoding="latin1"` or without. Constant
    memory; the file appears when it is complete.
    """
    with atomic_write(path, "wb") as file:
        file.write(PROTO_2 + pickle.EMPTY_LIST)
        for name, cluster in pairs:
            file.write(_inner((str(name), int(cluster))) + pickle.APPEND)
        file.write(pickle.STOP)


def _inner(value: Any) -> bytes:
    """The opcodes that build a plain value, without PROTO and STOP."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _row(name: str, vector: np.ndarray) -> bytes:
    """The opcodes that append (name, float32 vector) to the list on the stack, as Python 2's numpy did.

    Python 3 would write the array's bytes as escaped text, half as large again and slower to read.
    """
    raw = np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return b"".join(
        (
            _inner(name),
            pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n",
            pickle.GLOBAL + b"numpy\nndarray\n" + _inner((0,)) + _string(b"b"),
            pickle.TUPLE3 + pickle.REDUCE,  # an empty array, whose state follows
            pickle.MARK + _inner(1) + _inner(tuple(vector.shape)),
            pickle.GLOBAL + b"numpy\ndtype\n" + _string(b"f4") + _inner(0) + _inner(1),
            pickle.TUPLE3 + pickle.REDUCE,
            pickle.MARK + _inner(3) + _string(b"<") + _inner(None) * 3 + _inner(-1) * 2 + _inner(0),
            pickle.TUPLE + pickle.BUILD,
            _inner(False) + _string(raw) + pickle.TUPLE + pickle.BUILD,
            pickle.TUPLE2 + pickle.APPEND,
        )
    )


def _string(raw: bytes) -> bytes:
    """Python 2's 8-bit string."""
    return pickle.BINSTRING + struct.pack("<i", len(raw)) + raw


class FeaturesPickle:
    """Writes a pickle of a list of (path, float32 vector) pairs, one by one, in constant memory.

        with FeaturesPickle("features.pkl") as features:
            features.append("n01440764/1.jpg", vector)  # vector (D,)

    `numpy` arrays for `pickle.load` of Python 2, and of Python 3 with `encoding="latin1"`. The pairs go into
    PATH.part, which becomes PATH when the block ends well. To go on after a kill, remember what `sync()`
    returned and give it as `size`: what was written after it is cut off.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        try:
            if size is None:
                self.file = open(self.part, "wb")
                self.file.write(PROTO_2 + pickle.EMPTY_LIST)
                return
            if self.part.stat().st_size < size:
                raise UserError(f"{self.part}: shorter than it was; begin again without it")
            self.file = open(self.part, "r+b")
            self.file.truncate(size)
            self.file.seek(size)
        except OSError as error:
            raise UserError(f"cannot write {self.part}: {error.strerror or error}") from error

    def append(self, path: str, vector: np.ndarray) -> None:
        """Add an image's path and its features (D,)."""
        self.file.write(_row(path, vector))

    def sync(self) -> int:
        """Everything so far is on the disk when this returns; the size to go on from."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """End the list and give the file its name."""
        self.file.write(pickle.STOP)
        self.sync()
        self.file.close()
        os.replace(self.part, self.path)

    def __enter__(self) -> "FeaturesPickle":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()


# ---------------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Say what a released pickle holds, without running it")
    parser.add_argument("file", metavar="FILE", help="cluster assignments or features")
    parser.add_argument("--csv", metavar="OUT", help="write the assignments as path,cluster to OUT")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print how much is in the file and its first lines; convert assignments with --csv."""
    content = safe_pickle.load(args.file)
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[1], int):
        pairs = as_assignments(content, args.file)
        print_assignments(args.file, pairs)
        if args.csv:
            write_csv(args.csv, pairs)
            print(f"written: {args.csv}")
        return
    if args.csv:
        raise UserError(f"--csv: {args.file} holds {describe(content)}, not (image path, cluster) pairs")
    print_features(args.file, *as_features(content, args.file))


def print_assignments(path: str, pairs: list[tuple[str, int]]) -> None:
    """How many images and clusters, how large these are, and the first pairs."""
    ids, sizes = np.unique([cluster for _, cluster in pairs], return_counts=True)
    print(
        f"{path}: {len(pairs)} images in {len(ids)} clusters (ids up to {ids[-1]}); "
        f"sizes {sizes.min()} to {sizes.max()}, median {np.median(sizes):g}"
    )
    for name, cluster in pairs[:SHOWN]:
        print(f"  {name}  {cluster}")


def print_features(path: str, names: list[str] | None, features: np.ndarray) -> None:
    """How many rows of what, whether they have names, and the first rows."""
    named = "with" if names else "without"
    print(f"{path}: features {features.shape} of {features.dtype.name}, {named} image names")
    for i, row in enumerate(features[:SHOWN]):
        values = " ".join(f"{value:.4g}" for value in row[:4].tolist())
        print(f"  {names[i] if names else i}  {values} ...")


def write_csv(path: str | Path, pairs: Iterable[tuple[str, int]]) -> None:
    """A table of path,cluster with a header line."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "cluster"])
        writer.writerows(pairs)


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
