"""WebDataset shards as an image list: tar files whose members are indexed once and read at random.

    train-000000.tar: 00000000.cls 00000000.jpg 00000001.cls 00000001.jpg ... __paths__

The webdataset library writes such files (tools/make_shards.py) and streams them in an order that changes with
ranks and epochs. Clustering needs the opposite: image i is the i-th image of the i-th shard, always, and the
sampler asks for any of them. So the headers of the tar files are read once, and each image is one read at its
offset. The member __paths__, which webdataset skips, tells the path that each image had in its folder: a run
on shards then has the names, the order and the classes of a run on the folder.
"""

import functools
import glob
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from data.decode import EXTENSIONS, check_size
from data.images import ImageList, classes_of
from util import UserError

PATHS_MEMBER = "__paths__"

CLASS_BYTES = 255  # of a class's name
PATHS_BYTES = 2**26  # of PATHS_MEMBER: of half a million images
HEADER_BYTES = 2**20  # of the header of a member, with long names and the like
BLOCK = 512  # bytes; a tar file is made of such blocks
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class ShardList(ImageList):
    """The images of tar files in a fixed order: shards as named, images as they lie in each.

    shards: S paths of tar files; where: (N, 3) int64 rows (shard, offset of the first byte, bytes).
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        classes: np.ndarray | None,
        class_names: list[str] | None,
        shards: list[str],
        where: np.ndarray,
    ):
        super().__init__(root, paths, classes, class_names)
        self.shards = shards
        self.where = where
        self.files = shards

    def path(self, i: int) -> Path:
        """Where image i lies, for messages: the shard, then the image's own path."""
        return Path(self.shards[self.where[i, 0]], self.paths[i])

    @property
    def folder(self) -> None:
        return None

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i as a file."""
        shard, offset, size = self.where[i].tolist()
        return io.BufferedReader(_Window(_handle(self.shards[shard]), offset, size))

    def read(self, i: int) -> bytes:
        """The bytes of image i."""
        shard, offset, size = self.where[i].tolist()
        check_size(size)
        handle = _handle(self.shards[shard])  # held until the bytes are there
        return os.pread(handle.fd, size, offset)

    def stamps(self) -> np.ndarray:
        """(N, 3) int64 that change when a shard does: its mtime and ctime (ns), and where the image lies."""
        status = [os.stat(shard) for shard in self.shards]
        times = np.array([[s.st_mtime_ns, s.st_ctime_ns] for s in status])[self.where[:, 0]]
        return np.column_stack([times, self.where[:, 1]])

    def _keep(self, mask: np.ndarray) -> None:
        super()._keep(mask)
        self.where = self.where[mask]


class _Handle:
    """An open file that closes with its last user: one thread may still read what another has dropped."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


# In each process as many shards stay open. A fork may share them: reads name their offset and move nothing.
_handle = functools.lru_cache(maxsize=256)(_Handle)


class _Window(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, as a file of its own."""

    def __init__(self, handle: _Handle, offset: int, size: int):
        self._handle, self._offset, self._size = handle, offset, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        read = os.preadv(self._handle.fd, [memoryview(buffer)[:count]], self._offset + self._position)
        self._position += read
        return read


# ---------------------------------------------------------------------------------------- listing


def list_shards(pattern: str | Path, threads: int = 16) -> ShardList:
    """List the images of the tar files that `pattern` names, reading nothing but the headers.

    pattern: a path, with braces ('train-{000000..000146}.tar') or wildcards ('train-*.tar', in the order of
    their names). Of each webdataset sample (the members of one name up to its first dot) the image is taken,
    by its ending. Its relative path is the one that tools/make_shards.py stored, or in shards from elsewhere
    the shard's path without .tar and the member's name. Classes are, as in a folder, the first-level folders;
    in shards from elsewhere the contents of .cls members if every image has one.

    Raises UserError for a pattern that names no file or a missing one, a shard that is compressed, truncated
    or no tar file, two images of one name, a name that leaves the folder, an image that is a link, and shards
    without an image.
    """
    names = expand(str(pattern))
    base_plus_ext = import_webdataset().tariterators.base_plus_ext
    with ThreadPoolExecutor(max(1, threads)) as pool:
        indexes = list(pool.map(functools.partial(_index, split=base_plus_ext), names))
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]))
    folders = [os.path.relpath(name, root).removesuffix(".tar") for name in names]
    paths = [
        path if index.own_paths else f"{folder}/{path}"
        for index, folder in zip(indexes, folders)
        for path in index.paths
    ]
    if not paths:
        raise UserError(f"no image found in the {len(names)} shard(s) that {pattern} names")
    where = np.array(
        [(shard, *place) for shard, index in enumerate(indexes) for place in index.places], dtype=np.int64
    )
    _refuse_duplicates(paths, where, names)
    images = ShardList(root, paths, *_classes(indexes), names, where)
    images.name = str(pattern)
    return images


def expand(pattern: str) -> list[str]:
    """The existing files that a pattern with braces and wildcards names, in order. Raises UserError."""
    try:
        patterns = import_webdataset().shardlists.expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{pattern}: {str(error).strip() or 'the braces do not match'}") from error
    if any("://" in name or name.startswith("pipe:") for name in patterns):
        raise UserError(f"{pattern}: only local files can be read at random; download the shards first")
    found: list[str] = []
    for name in patterns:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not matches:
            raise UserError(f"{name}: no file matches")
        found += matches
    missing = [name for name in found if not os.path.isfile(name)]
    if missing:
        raise UserError(
            f"{pattern} names {len(found)} shards, of which {len(missing)} do not exist; "
            f"the first is {missing[0]}"
        )
    return found


def import_webdataset() -> ModuleType:
    """The webdataset library with the modules that are used here, or a UserError."""
    try:
        import webdataset
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError:
        raise UserError("shards need webdataset: pip install -r requirements-extra.txt") from None
    return webdataset


def _refuse_duplicates(paths: list[str], where: np.ndarray, names: list[str]) -> None:
    """Each image has one name: results are told by it."""
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        if first.setdefault(path, i) != i:
            one, other = names[where[first[path], 0]], names[where[i, 0]]
            raise UserError(f"the image {path} is in the shards twice, in {one} and in {other}")


def _classes(indexes: list["_Index"]) -> tuple[np.ndarray | None, list[str] | None]:
    """Class ids (N,) int64 and names: from .cls members where all have one, else from the first folders."""
    labels = [label for index in indexes for label in index.labels]
    if None in labels or all(index.own_paths for index in indexes):
        return classes_of([path for index in indexes for path in index.paths])
    numbers = all(label.isdecimal() for label in labels)
    names = sorted(set(labels), key=int if numbers else None)
    ids = {name: i for i, name in enumerate(names)}
    return np.array([ids[label] for label in labels], dtype=np.int64), names


# ---------------------------------------------------------------------------------------- one shard


@dataclass
class _Index:
    """What one shard holds: for each image its path, (offset, size) and the content of .cls, if any."""

    paths: list[str]
    places: list[tuple[int, int]]
    labels: list[str | None]
    own_paths: bool  # whether make_shards.py stored the paths of the folder


def _index(shard: str, split: Callable[[str], tuple[str | None, str | None]]) -> _Index:
    """Index one shard. split: member name -> (key, ending from the first dot on), webdataset's rule."""
    images: dict[str, list[tuple[str, int, int]]] = {}
    labels: dict[str, tuple[int, int]] = {}
    own_paths = None
    handle = _Handle(shard)
    for name, offset, size in _members(shard, handle.fd):
        name = name.removeprefix("./")
        key, ending = split(name)
        if name == PATHS_MEMBER:
            if size > PATHS_BYTES:
                raise UserError(f"{shard}: its {PATHS_MEMBER} has {size} bytes; write smaller shards")
            own_paths = _read_paths(shard, os.pread(handle.fd, size, offset))
        elif key is None or name.startswith("__") or os.path.basename(name).startswith("."):
            continue  # of webdataset itself, or hidden
        elif os.path.splitext(name)[1].lower() in EXTENSIONS:
            images.setdefault(key, []).append((name, offset, size))
        elif ending.lower() == "cls":
            labels[key] = (offset, size)
    chosen = [_image_of(shard, key, candidates) for key, candidates in images.items()]
    places = [(offset, size) for _, offset, size in chosen]
    for name in own_paths or [name for name, *_ in chosen]:
        check_name(name, shard)
    if own_paths is None:
        read = {key: _read_class(shard, handle.fd, key, *place) for key, place in labels.items()}
        return _Index([name for name, *_ in chosen], places, [read.get(key) for key in images], False)
    if len(own_paths) != len(chosen):
        raise UserError(f"{shard}: {len(chosen)} images but {len(own_paths)} paths; write the shard again")
    return _Index(own_paths, places, [None] * len(chosen), True)


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that leaves the folder, or that breaks the line it is written in."""
    if name.startswith("/") or ".." in name.split("/") or not name or set(name) & set("\0\n\r"):
        raise UserError(
            f"{where}: holds an image of the name {name[:200]!r}, which no image below a folder has"
        )


def _read_paths(shard: str, content: bytes) -> list[str]:
    """The paths that tools/make_shards.py stored: a JSON list of texts that can be file names."""
    try:
        paths = json.loads(content)
        if not isinstance(paths, list):
            raise TypeError
        for path in paths:
            os.fsencode(path if isinstance(path, str) else None)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{shard}: its {PATHS_MEMBER} is no JSON list of paths; write the shard again"
        ) from error
    return paths


def _read_class(shard: str, fd: int, key: str, offset: int, size: int) -> str:
    """The content of a .cls member."""
    if size > CLASS_BYTES:
        raise UserError(f"{shard}: the class of {key[:200]!r} is {size} bytes long, not a number or a name")
    return os.pread(fd, size, offset).decode("utf-8", "replace").strip()


def _image_of(shard: str, key: str, candidates: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    """The image of a sample: <key>.<ending>; where it has none, the only one among <key>.<more>.<ending>."""
    plain = [entry for entry in candidates if entry[0].count(".", len(key)) == 1] or candidates
    if len(plain) > 1:
        names = ", ".join(sorted(name for name, *_ in plain))
        raise UserError(
            f"{shard}: {len(plain)} images of the key {key} ({names}); a sample of webdataset is what bears "
            "one name up to the first dot: rename them, or write the shards with tools/make_shards.py"
        )
    return plain[0]


def _members(shard: str, fd: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file in a tar file; UserError unless it is whole."""
    start = os.pread(fd, BLOCK, 0)
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{shard} is compressed: nothing in it can be read at random; {command} it first")
    length = os.fstat(fd).st_size
    with open(shard, "rb") as file:
        end = 0
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:", errors="surrogateescape") as tar:
                for member in tar:
                    end = member.offset_data + _padded(member.size if member.isreg() else 0)
                    if member.size < 0 or end > length:
                        end = length
                        break
                    if member.isreg() and not member.issparse():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir() and os.path.splitext(member.name)[1].lower() in EXTENSIONS:
                        raise UserError(
                            f"{shard}: {member.name[:200]!r} is a link, a device or a file with holes, not "
                            "an image's bytes; write the shard with the files themselves"
                        )
        except UserError:
            raise
        except Exception as error:  # tarfile meets a damaged file with nearly any of them
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(f"{shard} is no tar file, or is damaged after {end} bytes: {reason}") from error
    if end + BLOCK > length or os.pread(fd, BLOCK, end).strip(b"\0"):
        raise UserError(f"{shard} is truncated or damaged after {end} bytes")


class _Headers:
    """A tar file of which headers alone are read: tarfile takes their word for how large they are."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)


def _padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
