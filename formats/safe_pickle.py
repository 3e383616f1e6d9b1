"""Pickles from strangers, opened without running anything that is in them.

`pickle.load` calls whatever a file asks for. The unpickler here knows lists, dicts, tuples, text, numbers
and arrays of numbers: the few names that numpy's pickles ask for are answered by stand-ins, every other is
refused. Nothing is allocated on a file's word: what it announces has to be in it.

This module stands below checkpoint.py, though in this folder: it imports util alone.
"""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from util import UserError

COPIES = 8  # times the file's size: how much of it may be copied from one form of text into another
DIGITS = 40  # of a whole number that is written as text


class Refused(pickle.UnpicklingError):
    """The file asks for more than plain data."""


class Array:
    """Stands for a numpy array while a pickle is read; `numbers` is the real one (read-only)."""

    def __init__(self) -> None:
        self.numbers = np.empty(0)


class _DType:
    """Stands for a numpy dtype of integers, floats or booleans."""

    def __init__(self, kind: str | bytes, *_: Any) -> None:
        kind = _ascii(kind)
        if not re.fullmatch("[iufb][1248]", kind):
            raise Refused(f"it holds an array of {kind[:40]}, not of numbers")
        self.kind, self.order = kind, "<"


class _Function:
    """A name that a file may ask for: what it gives when called; nothing about it can be changed."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call


def _ascii(text: str | bytes) -> str:
    return text.decode("ascii") if isinstance(text, bytes) else text


class _Bounded:
    """A file from where it stands to its end: no more is asked of it than there is."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, start = file, file.tell()
        self.size = self.left = file.seek(0, os.SEEK_END) - start
        file.seek(start)

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError(f"it announces {count} bytes and has {self.left}")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


# What builds objects of classes, and what plain data has no use for.
NEVER = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.PERSID, pickle.LONG4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


class PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, tuples, text, numbers and numpy arrays of numbers (as `Array`), nothing else.

    Python's own unpickler and not the one in C, which makes room for as many entries as a file says.
    """

    # (module, name) -> the method that stands for it; numpy's modules without their first part
    ALLOWED = {  # noqa: RUF012
        ("multiarray", "_reconstruct"): "new_array",
        ("multiarray", "scalar"): "scalar",
        ("numeric", "_frombuffer"): "array_of_buffer",
        ("numpy", "ndarray"): "not_callable",
        ("numpy", "dtype"): "dtype",
        ("_codecs", "encode"): "latin1",
        ("__builtin__", "bytes"): "no_bytes",
        ("builtins", "bytes"): "no_bytes",
    }

    def __init__(self, file: IO[bytes], encoding: str = "bytes") -> None:
        """encoding: of the 8-bit strings of Python 2; "bytes" leaves them as they are."""
        bounded = _Bounded(file)
        super().__init__(bounded, encoding=encoding)
        self.copies_left = COPIES * bounded.size

    # -- what is read differently, or not at all

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def find_class(self, module: str, name: str) -> _Function:
        short = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (short, name) not in self.ALLOWED:
            raise Refused(f"it asks for {module[:80]}.{name[:80]}")
        return _Function(getattr(self, self.ALLOWED[short, name]))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function):
            raise Refused("it calls what is no function")
        self.append(function.call(*arguments))

    def load_build(self) -> None:
        self.set_state(self.stack[-2], self.stack.pop())

    def load_whole_number(self) -> None:
        text = self.readline()[:-1].rstrip(b"L")
        if len(text) > DIGITS:
            raise Refused("it holds a number of more than 40 digits")
        self.append(text == b"01" if text in (b"00", b"01") else int(text))

    def load_long1(self) -> None:
        raw = self.read(self.read(1)[0])
        if len(raw) > 16:
            raise Refused("it holds a number of more than 128 bits")
        self.append(int.from_bytes(raw, "little", signed=True))

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def refuse_operation(self) -> None:
        raise Refused("it uses an operation of pickle that plain data does without")

    dispatch |= dict.fromkeys((code[0] for code in NEVER), refuse_operation)
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.INT[0]: load_whole_number, pickle.LONG[0]: load_whole_number}
    dispatch |= {pickle.LONG1[0]: load_long1, pickle.BYTEARRAY8[0]: load_bytearray8}

    def persistent_load(self, name: Any) -> Any:
        raise Refused("it names objects outside of itself")

    # -- what stands for numpy

    def set_state(self, target: Any, state: Any) -> None:
        """Give an object that the file has made its state."""
        if isinstance(target, Array):
            _, shape, dtype, fortran, raw = state
            target.numbers = self.numbers(raw, dtype).reshape(shape, order="F" if fortran else "C")
        elif isinstance(target, _DType):
            if any(part is not None for part in state[2:5]):  # sub-arrays, names and fields of a record
                raise Refused("it holds an array of records, not of numbers")
            target.order = {"|": "<", "<": "<", ">": ">"}[_ascii(state[1])]
        else:
            raise Refused("it gives a state to what has none")

    def numbers(self, raw: bytes | str, dtype: _DType) -> np.ndarray:
        """The bytes of an array as numbers (Python 2 wrote bytes as text)."""
        raw = self.latin1(raw) if isinstance(raw, str) else raw
        return np.frombuffer(raw, np.dtype(dtype.order + dtype.kind))

    def new_array(self, *_: Any) -> Array:
        """How protocols 0 to 4 begin an array; its state follows."""
        return Array()

    def scalar(self, dtype: _DType, raw: bytes | str) -> int | float | bool:
        return self.numbers(raw, dtype)[0].item()

    def array_of_buffer(self, raw: bytes, dtype: _DType, shape: tuple, order: str) -> Array:
        """How protocol 5 writes an array."""
        array = Array()
        self.set_state(array, (1, shape, dtype, order == "F", raw))
        return array

    def dtype(self, kind: str | bytes, *_: Any) -> _DType:
        return _DType(kind)

    def latin1(self, text: str, encoding: str = "latin1") -> bytes:
        """How protocols below 3 write bytes."""
        if _ascii(encoding) != "latin1":
            raise Refused(f"it holds text in {encoding[:40]}")
        self.copies_left -= len(text)
        if self.copies_left < 0:
            raise Refused("it copies its text again and again")
        return text.encode("latin1")

    def no_bytes(self, *arguments: Any) -> bytes:
        """How Python 3 writes b"" in protocols below 3."""
        if arguments:
            raise Refused("it makes bytes out of something")
        return b""

    def not_callable(self, *_: Any) -> None:
        raise Refused("it makes an array in a way that numpy's pickles do not")


def load(path: str | Path, encoding: str = "bytes") -> Any:
    """The plain data in the pickle file `path`; arrays come as `Array`, numpy's scalars as Python's numbers.

    encoding: for the 8-bit strings of Python 2. The default gives bytes, which costs no copy of large arrays
    and tells them from text; see `text`. Raises UserError for a missing, truncated or foreign file, and for
    one that asks for anything else, which it names.
    """
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding=encoding).load()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Refused as error:
        raise UserError(f"{path}: refused, its pickle is more than plain data ({error})") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory, or is not a pickle") from error
    except Exception as error:  # a hostile or foreign file fails in any way
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{path}: truncated or not a pickle ({reason})") from error


def text(value: Any) -> str | None:
    """The text that a str, or a byte string of Python 2 (UTF-8, else latin1), stands for; None for others."""
    if isinstance(value, str):
        return (
            None if re.search("[\ud800-\udbff]", value) else value
        )  # halves of characters, which no file name has
    if not isinstance(value, bytes):
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin1")
