"""Rows that take hours to make, on their way into a .npy file: a killed run goes on where it stopped.

    with Store(path, width, "float32", settings, way_out) as store:
        for image in range(store.done, len(images)):
            store.append(rows_of(image))
        store.finish()

Rows (n, width) are appended in the order of the images, any number an image, to PATH.part; PATH.journal, a
small JSON file, says how far that is good: how many images are dealt with, in how many rows, their CRC32, and
the settings that decide them. It follows every SYNC_SECONDS, and when the block ends in whatever way: so much
work is lost by a kill. The next call goes on behind the rows that the journal vouches for. It refuses rows of
other settings, and damage: rows whose CRC32 is not the journal's, or a journal whose own is not.

Plain appends and not a memory map: where the disk fills, a map kills the process by a signal, and how many
rows there are is known only at the end where images are broken or give several rows.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from util import UserError, make_folder, rename, try_lock, write_json

SYNC_SECONDS = 20.0
CHUNK = 2**24  # bytes that are read at a time to check them


class Good(NamedTuple):
    """What a journal vouches for: images dealt with, their rows, the CRC32 of those, images without rows."""

    done: int = 0
    rows: int = 0
    crc: int = 0
    broken: tuple[int, ...] = ()


class Store:
    """A .npy file of rows (N, width) in the making. Use it as a context.

    path: of the finished file. settings: plain data that decide every bit of the rows. way_out: what an error
    tells the user to do where rows of other settings, or damaged ones, lie there. restart: drop what lies
    there. done: how many images are dealt with; broken: those of them that have no rows.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        dtype: str,
        settings: dict[str, Any],
        way_out: str,
        restart: bool = False,
    ) -> None:
        self.path, self.width, self.dtype, self.way_out = Path(path), width, np.dtype(dtype), way_out
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.journal = self.path.with_name(f"{self.path.name}.journal")
        self.settings = as_json(settings | {"width": width, "dtype": str(self.dtype)})
        self.good = Good()  # replaced as a whole, so that Ctrl-C between two of its numbers does no harm
        self.last_sync = time.monotonic()
        self.removed = False
        make_folder(self.path.parent)
        self.file = open_alone(self.part)
        try:
            self._begin(restart)
        except BaseException:
            self.file.close()
            raise

    @property
    def done(self) -> int:
        return self.good.done

    @property
    def broken(self) -> list[int]:
        return list(self.good.broken)

    def _begin(self, restart: bool) -> None:
        """Stand behind the good rows, or behind an empty file's header."""
        empty = restart or os.fstat(self.file.fileno()).st_size == 0
        found = None if empty else read_index(self.journal, self.way_out)
        if found is None:
            self.journal.unlink(missing_ok=True)  # first: it must never vouch for other rows
            self.file.truncate(0)
        else:
            check_settings(self.part, found["settings"], self.settings, self.way_out)
            done, rows, crc, broken = (found[name] for name in Good._fields)
            self.good = Good(done, rows, crc, tuple(broken))
        self._write_header()
        start, size = self.file.tell(), self.good.rows * self.width * self.dtype.itemsize
        if found is not None and crc_of(self.file, size) != self.good.crc:
            raise UserError(f"{self.part}: damaged, its rows are not those that were written; {self.way_out}")
        self.file.seek(start + size)
        self.file.truncate()

    def restart(self) -> None:
        """Drop what lies there: no image is dealt with."""
        self.good = Good()
        self._begin(restart=True)

    def append(self, rows: np.ndarray, images: int = 1, broken: Sequence[int] = ()) -> None:
        """Add the rows (n, width) of the next `images` images, of which `broken` have none."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows {rows.shape}, expected (n, {self.width})")
        good, crc = self.good, self.good.crc
        if len(rows):
            content = memoryview(np.ascontiguousarray(rows, self.dtype)).cast("B")
            self.file.write(content)
            crc = zlib.crc32(content, crc)
        broken = (*good.broken, *map(int, broken))
        self.good = Good(good.done + images, good.rows + len(rows), crc, broken)
        if time.monotonic() - self.last_sync >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """When this returns, everything so far is on the disk, and the journal says so."""
        self.file.flush()
        os.fsync(self.file.fileno())
        write_index(self.journal, {"settings": self.settings, **self.good._asdict()})
        self.last_sync = time.monotonic()

    def complete(self) -> Path:
        """All rows are there: bring the header to their number; PATH.part is now a .npy file. Its path."""
        self.sync()
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.part

    def finish(self, index: Path | None = None, **more: Any) -> None:
        """`complete`, and give the file its name.

        index: a JSON file to write beside it, which `load` checks: settings, CRC32, and what `more` names.
        """
        part = self.complete()
        if index is not None:
            write_index(index, {"settings": self.settings, **self.good._asdict(), **more})
        rename(part, self.path)
        self.remove()

    def remove(self) -> None:
        """Take away journal and part; for whoever has made another file out of the part."""
        self.removed = True
        self.journal.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def _write_header(self) -> None:
        """numpy leaves room in it for any number of rows, so that its size never changes."""
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.good.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, UserError):  # a full disk: the last journal stays valid
            if not self.removed:
                self.sync()
        with contextlib.suppress(OSError):
            self.file.close()


def load(path: Path, index: Path, way_out: str) -> tuple[np.ndarray, dict[str, Any]] | None:
    """(rows as a memory map, content of the index) of a file that `finish` wrote; None where there is none.

    Raises UserError for one that is damaged.
    """
    found = read_index(index, way_out) if path.is_file() else None
    if found is None:
        return None
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        with open(path, "rb") as file:
            file.seek(rows.offset)
            good = rows.shape == (found["rows"], rows.shape[-1]) and crc_of(file, rows.nbytes) == found["crc"]
    except (ValueError, OSError, EOFError):
        good = False
    if not good:
        raise UserError(f"{path}: damaged, its rows are not those that were written; {way_out}")
    return rows, found


def open_alone(path: Path) -> BinaryIO:
    """Open a file to read and write, or make it. UserError where another process has it open like this."""
    while True:
        try:
            file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if try_lock(file) is False:
            file.close()
            raise UserError(f"{path}: another process is writing it; wait for that, or end it")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the other one has just finished it, and it has its final name


def crc_of(file: BinaryIO, size: int) -> int | None:
    """CRC32 of the next `size` bytes; None where there are fewer."""
    crc = 0
    while size:
        content = file.read(min(size, CHUNK))
        if not content:
            return None
        crc, size = zlib.crc32(content, crc), size - len(content)
    return crc


def write_index(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that carries its own CRC32."""
    write_json(path, content | {"check": crc_of_json(content)})


def read_index(path: Path, way_out: str) -> dict[str, Any] | None:
    """What `write_index` wrote; None where there is no file, UserError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check = content.pop("check")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        content, check = None, 0
    if content is None or check != crc_of_json(content):
        raise UserError(f"{path}: damaged, or not written by this program; {way_out}")
    return content


def crc_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(as_json(content), sort_keys=True).encode())


def as_json(content: Any) -> Any:
    """Plain data as they come back from a JSON file: a tuple is a list."""
    return json.loads(json.dumps(content))


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any], way_out: str) -> None:
    """UserError for what was made with other settings; only those in `wanted` count."""
    for name, now in wanted.items():
        was = found.get(name)
        if was != now:
            short = all(len(str(value)) <= 20 for value in (was, now))
            what = f"{name} {was}, now {now}" if short else f"another {name}"
            raise UserError(f"{path}: was made with {what}; {way_out}")
