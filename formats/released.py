"""The cluster assignments and features that the authors released: reading them, and writing the same forms.

    python -m formats.released alexnet_cluster_assignment.pickle                    # what is in it
    python -m formats.released alexnet_cluster_assignment.pickle --csv alexnet.csv  # path,cluster
    python -m formats.released alexnet_features.pkl

Nothing in a file is executed (formats/safe_pickle.py).
"""

import argparse

from commandline import Parser


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="cluster assignments or features")
    parser.add_argument("--csv", metavar="OUT", help="write the assignments as path,cluster to OUT")
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import csv
import os
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from formats import safe_pickle
from formats.safe_pickle import Array, text
from util import UserError, atomic_write, rename, run_main, say

SHOWN = 5  # lines of a file that are printed
PROTO_2 = pickle.PROTO + b"\x02"


def main(args: argparse.Namespace) -> None:
    """Print how much is in the file and its first lines; convert assignments with --csv."""
    content = safe_pickle.load(args.file)
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[1], int):
        pairs = as_assignments(content, args.file)
        print_assignments(args.file, pairs)
        if args.csv:
            write_csv(args.csv, pairs)
            say(f"written: {args.csv}")
        return
    if args.csv:
        raise UserError(f"--csv: {args.file} holds {describe(content)}, not (image path, cluster) pairs")
    print_features(args.file, *as_features(content, args.file))


def print_assignments(path: str, pairs: list[tuple[str, int]]) -> None:
    """How many images and clusters, how large these are, and the first pairs."""
    ids, sizes = np.unique([cluster for _, cluster in pairs], return_counts=True)
    say(
        f"{path}: {len(pairs)} images in {len(ids)} clusters (ids up to {ids[-1]}); "
        f"sizes {sizes.min()} to {sizes.max()}, median {np.median(sizes):g}"
    )
    for name, cluster in pairs[:SHOWN]:
        say(f"  {name}  {cluster}")


def print_features(path: str, names: list[str] | None, features: np.ndarray) -> None:
    """How many rows of what, whether they have names, and the first rows."""
    named = "with" if names else "without"
    say(f"{path}: features {features.shape} of {features.dtype.name}, {named} image names")
    for i, row in enumerate(features[:SHOWN]):
        values = " ".join(f"{value:.4g}" for value in row[:4].tolist())
        say(f"  {names[i] if names else i}  {values} ...")


def write_csv(path: str | Path, pairs: Iterable[tuple[str, int]]) -> None:
    """A table of path,cluster with a header line."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "cluster"])
        writer.writerows(pairs)


# ---------------------------------------------------------------------------------------- reading


def read_assignments(path: str | Path) -> list[tuple[str, int]]:
    """The (image path, cluster) pairs of a released `*_cluster_assignment.pickle`, in the file's order.

    1.28 million pairs take some ten seconds and 0.7 GiB. Raises UserError for anything but such a list.
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

    Read are an array (N, D), and a list of (path, array (D,)) pairs. Memory: an array as it is, read-only;
    rows take twice their size, as they are gathered into one array. Raises UserError, which says what was
    found, for everything else.
    """
    return as_features(safe_pickle.load(path), path)


def as_features(content: Any, path: str | Path) -> tuple[list[str] | None, np.ndarray]:
    """Bring the content of a features pickle into one form; `path` is for the errors."""
    if isinstance(content, Array) and content.numbers.ndim == 2 and content.numbers.size:
        if content.numbers.dtype.kind == "f":
            return None, content.numbers
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{path}: expected features, an array (N, D) of floats or (path, array) pairs; found "
            f"{describe(content)}"
        )
    names, rows = [], []
    for i, pair in enumerate(content):
        name, row = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        numbers = row.numbers if isinstance(row, Array) else np.empty(0)
        wrong = numbers.ndim != 1 or numbers.dtype.kind != "f" or not numbers.size
        if text(name) is None or wrong or numbers.size != len(rows[0] if rows else numbers):
            raise UserError(
                f"{path}: expected (path, array (D,) of floats) pairs, D the same in all; found "
                f"{describe(pair)} at position {i}"
            )
        names.append(text(name))
        rows.append(numbers)
    return names, np.stack(rows)


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
    return f"{type(value).__name__} {value!r}"[:60]  # of numbers only, which safe_pickle keeps short


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
        rename(self.part, self.path)

    def __enter__(self) -> "FeaturesPickle":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.file.close()


if __name__ == "__main__":
    run_main(main, ARGS)
