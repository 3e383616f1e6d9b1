"""Files that torch.save wrote, zip or older, Python 2's too: read by the unpickler of safe_pickle.py.

torch.load takes a file's word for what it holds: it checks no CRC32, inflates what is deflated, and lacks an
operation of Python 2's pickles. Here everything is checked before memory is taken.

This module stands below checkpoint.py, though in this folder: it imports util alone.
"""

import collections
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from formats.safe_pickle import PlainUnpickler, Refused

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the older form
KINDS = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
CHUNK = 2**20  # bytes that are read at once

Fetch = Callable[[str, torch.dtype, int], torch.Tensor]  # key, type and length of a storage -> (length,)


def read(path: Path, lazy: bool = False) -> Any:
    """What torch.save wrote into the file at path, its tensors on the CPU.

    lazy: tensors of a zip file are read when they are used, and their CRC32 is not checked. Raises Refused
    for more than tensors and plain containers, OSError, and any other exception for a damaged file.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            return _read_zip(file, path, lazy)
        file.seek(0)
        return _read_older(file)


class TensorUnpickler(PlainUnpickler):
    """Reads tensors, whose numbers `fetch` brings, ordered dicts and plain data."""

    ALLOWED = {  # noqa: RUF012
        ("collections", "OrderedDict"): "ordered",
        ("torch", "Size"): "size",
        ("torch._utils", "_rebuild_tensor"): "tensor",
        ("torch._utils", "_rebuild_tensor_v2"): "tensor",
        ("torch._utils", "_rebuild_parameter"): "parameter",
        ("_codecs", "encode"): "latin1",
    }

    def __init__(self, file: IO[bytes], fetch: Fetch) -> None:
        super().__init__(file, encoding="utf-8")
        self.fetch = fetch

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in KINDS:
            return KINDS[name]
        return super().find_class(module, name)

    def persistent_load(self, name: Any) -> torch.Tensor:
        """The numbers (length,) that ("storage", type, key, device, length[, part of another]) names."""
        _, dtype, key, _, length, *part = name
        if not isinstance(dtype, torch.dtype) or type(length) is not int or any(part):
            raise Refused("it holds a storage of an unknown kind")
        return self.fetch(str(key), dtype, length)

    def set_state(self, target: Any, state: Any) -> None:
        if not isinstance(target, collections.OrderedDict):  # whose state is versions of torch's modules
            super().set_state(target, state)

    def ordered(self, *items: Any) -> collections.OrderedDict:
        return collections.OrderedDict(*items)

    def size(self, sizes: tuple) -> tuple:
        return tuple(sizes)

    def tensor(self, numbers: torch.Tensor, offset: int, shape: tuple, strides: tuple, *more: Any) -> Any:
        """A view of numbers (length,); it has to lie within them, and to have no more elements than they."""
        values = (offset, *shape, *strides)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
        elements = int(np.prod(shape, dtype=object)) if shape else 1
        if not all(type(value) is int and value >= 0 for value in values) or len(shape) != len(strides):
            raise Refused("it holds a tensor of a shape that is none")
        if elements > len(numbers) or (elements and last >= len(numbers)):
            raise Refused(f"it holds a tensor of {elements} elements where there are {len(numbers)}")
        if len(more) > 2 and more[2]:  # conjugated or negated when it is used
            raise Refused("it holds a tensor of an unknown kind")
        return numbers.as_strided(shape, strides, offset)

    def parameter(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        return tensor


# ---------------------------------------------------------------------------------------- zip


def _read_zip(file: IO[bytes], path: Path, lazy: bool) -> Any:
    """NAME/data.pkl, and for each storage an entry NAME/data/KEY, none of them compressed."""
    found: dict[str, torch.Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(e.compress_type or e.file_size != e.compress_size for e in entries.values()):
            raise Refused("its entries are compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries.values()) > os.fstat(file.fileno()).st_size:
            raise Refused("its entries are larger than the file")
        (pickled,) = (name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if folder + "byteorder" in entries and archive.read(folder + "byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")

        def fetch(key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
            entry = entries[f"{folder}data/{key}"]
            if entry.file_size != length * dtype.itemsize:
                raise Refused(f"it says {length} elements of an entry of {entry.file_size} bytes")
            if key not in found:
                found[key] = _map(file, path, entry) if lazy else _checked(file, entry)
            return found[key].view(dtype)

        return TensorUnpickler(io.BytesIO(archive.read(pickled)), fetch).load()


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its header, whose length lies in it."""
    file.seek(entry.header_offset)
    return entry.header_offset + 30 + sum(struct.unpack("<26xHH", file.read(30)))


def _map(file: IO[bytes], path: Path, entry: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of an entry that is not compressed, read when they are used."""
    if not entry.file_size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.memmap(path, np.uint8, "c", _start(file, entry), entry.file_size))


def _checked(file: IO[bytes], entry: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of an entry that is not compressed; they have to give its CRC32."""
    file.seek(_start(file, entry))
    numbers = torch.empty(entry.file_size, dtype=torch.uint8)
    if _fill(file, numbers) != entry.CRC:
        raise ValueError(f"{entry.filename} is not what was written, its CRC32 differs")
    return numbers


def _fill(file: IO[bytes], numbers: torch.Tensor) -> int:
    """Read numbers (size,) uint8 from a file; their CRC32."""
    view, crc = memoryview(numbers.numpy()), 0
    for start in range(0, len(view), CHUNK):
        part = view[start : start + CHUNK]
        if file.readinto(part) != len(part):
            raise EOFError("it ends in the middle of a tensor")
        crc = zlib.crc32(part, crc)  # while the bytes are in the processor's cache
    return crc


# ---------------------------------------------------------------------------------------- older


def _read_older(file: IO[bytes]) -> Any:
    """Pickles in a row: magic number, version, machine, content, keys of the storages; then their numbers."""

    def nothing(*_: Any) -> Any:
        raise Refused("it holds a tensor where none belongs")

    if TensorUnpickler(file, nothing).load() != MAGIC or TensorUnpickler(file, nothing).load() != VERSION:
        raise pickle.UnpicklingError("it does not begin as one")
    if not TensorUnpickler(file, nothing).load().get("little_endian", True):
        raise Refused("it was written on a big-endian machine")
    left = os.fstat(file.fileno()).st_size - file.tell()
    found: dict[str, torch.Tensor] = {}

    def fetch(key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
        nonlocal left
        if key not in found:
            left -= length * dtype.itemsize
            if left < 0 or length < 0:
                raise EOFError("its tensors are larger than the file")
            found[key] = torch.empty(length, dtype=dtype)
        if found[key].dtype != dtype or len(found[key]) != length:
            raise Refused("it says two things of one storage")
        return found[key]

    content = TensorUnpickler(file, fetch).load()
    for key in map(str, TensorUnpickler(file, nothing).load()):
        (length,) = struct.unpack("<q", file.read(8))
        if length != len(found[key]):
            raise Refused(f"it says {len(found[key])} elements of a storage of {length}")
        _fill(file, found[key].view(torch.uint8))
    return content
