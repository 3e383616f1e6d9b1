"""Checkpoints: the one reader and the one writer, for our files and for those that the authors released.

Files come from strangers: they are opened by formats/tensor_files.py, which builds tensors and plain
containers and never runs code from the file.
"""

from pathlib import Path
from typing import Any

import torch

from formats import tensor_files
from formats.safe_pickle import Refused
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
    """The dict in a checkpoint, its tensors on the CPU.

    peek: tensors are not read until they are used, and not checked; else each has to have the CRC32 that its
    file says. Reads PyTorch's zip format and the older one (protocol 2, Python 2 strings, CUDA storages) on
    machines without CUDA. Raises UserError for a missing, truncated or foreign file, and for one that would
    run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        state = tensor_files.read(path, lazy=peek)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Refused as error:
        raise UserError(f"{path}: refused, not a plain checkpoint ({error})") from error
    except Exception as error:  # a damaged or foreign file fails in any way
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{path}: truncated, damaged or not a PyTorch checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint's dict")
    return state
