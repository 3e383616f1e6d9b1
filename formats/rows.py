"""Rows with names, in the files that extract.py gives: .npy and its names, Parquet, the authors' pickle.

All are made of a complete evaluation.store.Store, in constant memory, and appear when they are complete.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.store import Store
from formats.released import FeaturesPickle
from util import UserError, atomic_write, clear_left_over

ENDINGS = {"npy": ".npy", "parquet": ".parquet", "pickle": ".pkl"}
GROUP_BYTES = 8 * 2**20  # of rows that are taken at a time: a row group of a Parquet file


@dataclass(frozen=True)
class Files:
    """The files of --out OUT; base: OUT without its ending."""

    base: Path
    form: str

    @classmethod
    def of(cls, out: str, form: str) -> "Files":
        """UserError for an OUT that names no file."""
        base = out.removesuffix(ENDINGS[form])
        if os.path.basename(base) in ("", ".", ".."):
            some = os.path.join(os.path.dirname(base), "features")
            raise UserError(f"--out {out}: names no file; give one, e.g. {some}")
        files = cls(Path(base), form)
        for path in files.written():
            if path.is_dir():
                raise UserError(f"--out {out}: {path} is a folder; choose another name")
        return files

    def with_ending(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    @property
    def final(self) -> Path:
        return self.with_ending(ENDINGS[self.form])

    @property
    def array(self) -> Path:
        """Of the rows in the making, in every form: two calls that write the same OUT exclude each other."""
        return self.with_ending(".npy")

    @property
    def names(self) -> Path:
        return self.with_ending(".txt")

    @property
    def bad(self) -> Path:
        return self.with_ending(".bad_images.txt")

    def written(self) -> list[Path]:
        """Everything that is written or replaced."""
        part, journal = (self.with_ending(f".npy.{name}") for name in ("part", "journal"))
        more = [self.names] if self.form == "npy" else [self.final.with_name(f"{self.final.name}.part")]
        return [self.final, self.bad, part, journal, *more]

    def clear_left_over(self) -> None:
        """Remove temporary files of calls that were killed."""
        for path in self.written():
            clear_left_over(path)


def to_npy(store: Store, path: Path, names: Iterable[str], _: dict[str, Any]) -> None:
    """OUT.npy and, beside it, OUT.txt: the store itself, and the names."""
    write_names(path.with_suffix(".txt"), names)
    store.finish()


def to_parquet(store: Store, path: Path, names: Iterable[str], about: dict[str, Any]) -> None:
    """A Parquet file of the rows: `path` string, `feature` fixed-size list of numbers. Constant memory.

    about goes into the metadata of the schema, one entry a setting. Names that are not UTF-8 have \\xNN for
    their odd bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet

    store.complete()
    names, width = iter(names), store.width
    values = pa.from_numpy_dtype(store.dtype)
    schema = pa.schema(
        [pa.field("path", pa.string(), False), pa.field("feature", pa.list_(values, width), False)],
        metadata={name: str(value) for name, value in about.items()},
    )
    with (
        atomic_write(path, "wb") as out,
        pa.parquet.ParquetWriter(out, schema, use_dictionary=False, write_statistics=["path"]) as writer,
    ):
        for block in blocks(store):
            paths = [os.fsencode(next(names)).decode("utf-8", "backslashreplace") for _ in block]
            features = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1), values), width)
            table = pa.table([pa.array(paths, pa.string()), features], schema=schema)
            writer.write_table(table, row_group_size=len(block))
    store.remove()


def to_pickle(store: Store, path: Path, names: Iterable[str], _: dict[str, Any]) -> None:
    """A pickle of the authors' form: a list of (path, float32 vector)."""
    store.complete()
    names = iter(names)
    with FeaturesPickle(path) as out:
        for block in blocks(store):
            for row in block:
                out.append(next(names), row)
    store.remove()


def blocks(store: Store) -> Iterator[np.ndarray]:
    """The rows of a complete store, GROUP_BYTES at a time: (n, D) each."""
    step = max(1, GROUP_BYTES // (store.width * store.dtype.itemsize))
    with open(store.part, "rb") as file:
        np.lib.format.read_magic(file)
        (number, width), _, dtype = np.lib.format.read_array_header_1_0(file)
        for start in range(0, number, step):
            count = min(step, number - start)
            yield np.fromfile(file, dtype, count * width).reshape(count, width)


def write_names(path: Path, names: Iterable[str]) -> None:
    """One name a line; a backslash, line feed and carriage return as \\\\, \\n and \\r."""
    table = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
    with atomic_write(path) as file:
        file.writelines(f"{name.translate(table)}\n" for name in names)


def read_names(path: str | Path) -> list[str]:
    """The names that `write_names` wrote."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        lines = [line.removesuffix("\n").split(r"\\") for line in file]
    return ["\\".join(p.replace(r"\n", "\n").replace(r"\r", "\r") for p in parts) for parts in lines]


# Functions of (store, file to write, name of each row, what the rows are).
FORMS: dict[str, Callable[..., None]] = {"npy": to_npy, "parquet": to_parquet, "pickle": to_pickle}
