"""Checkpoints: the one reader and the one writer, for our files and for those that the authors released.

Files come from strangers: they are opened with PyTorch's restricted unpickler, which builds tensors and plain
containers and never runs code from the file.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from util import UserError, atomic_write

CLUSTERING = "clustering.pth.tar"  # EXP/...: network, PCA and centroids of the moment of the last clustering


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) beside `path` and rename.

    A kill or a full disk leaves the last good file. Raises UserError where the file cannot be written.
    """
    with atomic_write(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's zip writer makes of a write that failed
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read(path: str | Path, peek: bool = False) -> dict[str, Any]:
    """The dict in a checkpoint, its tensors on the CPU. peek: tensors are not read until they are used.

    Reads PyTorch's zip format and the older one (protocol 2, Python 2 strings, CUDA storages) on machines
    without CUDA. Raises UserError for a missing, truncated or foreign file, and for one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=peek or None)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, not a plain checkpoint ({refused_name(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated or not a PyTorch checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def refused_name(error: Exception) -> str:
    """What the restricted unpickler refused, in a few words."""
    found = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
    if found:
        return f"it asks for {found.group(1)}"
    found = re.search(r"[Uu]nsupported \w+ ?\S*", str(error))
    return found.group() if found else "its pickle holds more than tensors and plain containers"
