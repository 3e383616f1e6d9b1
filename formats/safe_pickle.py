"""Pickles from strangers, opened without running anything that is in them.

`pickle.load` calls whatever a file asks for. The unpickler here knows lists, dicts, tuples, text, numbers
and arrays of numbers: the few names that numpy's pickles ask for are answered by stand-ins, every other is
refused.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from util import UserError


class Refused(pickle.UnpicklingError):
    """The file asks for more than plain data."""


class Array:
    """Stands for a numpy array while a pickle is read; `numbers` is the real one (read-only)."""

    def __init__(self) -> None:
        self.numbers = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.numbers = _numbers(raw, dtype).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stands for a numpy dtype of integers, floats or booleans."""

    def __init__(self, kind: str | bytes, *_: Any) -> None:
        kind = _ascii(kind)
        if not re.fullmatch("[iufb][1248]", kind):
            raise Refused(f"it holds an array of {kind}, not of numbers")
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple) -> None:
        if any(part is not None for part in state[2:5]):  # sub-arrays, names and fields of a record
            raise Refused("it holds an array of records, not of numbers")
        self.order = {"|": "<", "<": "<", ">": ">"}[_ascii(state[1])]


class _Function:
    """A name that a file may ask for: what it gives when called; nothing about it can be changed."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it gives a state to a function")


def _ascii(text: str | bytes) -> str:
    return text.decode("ascii") if isinstance(text, bytes) else text


def _numbers(raw: bytes | str, dtype: _DType) -> np.ndarray:
    """The bytes of an array as numbers (Python 2 wrote bytes as text)."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, np.dtype(dtype.order + dtype.kind))


def _reconstruct(*_: Any) -> Array:
    """How protocols 0 to 4 begin an array; its state follows."""
    return Array()


def _scalar(dtype: _DType, raw: bytes | str) -> int | float | bool:
    return _numbers(raw, dtype)[0].item()


def _from_buffer(raw: bytes, dtype: _DType, shape: tuple, order: str) -> Array:
    """How protocol 5 writes an array."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols below 3 write bytes."""
    if _ascii(encoding) != "latin1":
        raise Refused(f"it holds text in {encoding}")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """How Python 3 writes b"" in protocols below 3."""
    if arguments:
        raise Refused("it makes bytes out of something")
    return b""


def _not_callable(*_: Any) -> None:
    raise Refused("it makes an array in a way that numpy's pickles do not")


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, tuples, text, numbers and numpy arrays of numbers (as `Array`), nothing else."""

    ALLOWED = {  # noqa: RUF012
        ("multiarray", "_reconstruct"): _Function(_reconstruct),
        ("multiarray", "scalar"): _Function(_scalar),
        ("numeric", "_frombuffer"): _Function(_from_buffer),
        ("numpy", "ndarray"): _Function(_not_callable),
        ("numpy", "dtype"): _Function(_DType),
        ("_codecs", "encode"): _Function(_latin1),
        ("__builtin__", "bytes"): _Function(_no_bytes),
        ("builtins", "bytes"): _Function(_no_bytes),
    }

    def find_class(self, module: str, name: str) -> Any:
        short = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (short, name) not in self.ALLOWED:
            raise Refused(f"it asks for {module}.{name}")
        return self.ALLOWED[short, name]


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
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{path}: truncated or not a pickle ({reason})") from error


def text(value: Any) -> str | None:
    """The text that a str, or a byte string of Python 2 (UTF-8, else latin1), stands for; None for others."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin1")
