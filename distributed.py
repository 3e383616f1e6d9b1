"""The one place that knows of several processes; with one, without a group, everything is the identity.

    torchrun --nproc-per-node=8 main.py ...        sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

Consecutive images belong to each rank; what is to be whole again is gathered in the order of the ranks.
"""

import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from util import UserError, choose_device

# While the first process clusters, the others wait for it; a process that died is noticed by the launcher.
TIMEOUT = timedelta(hours=1)
CHUNK_BYTES = 64 * 2**20  # rows are gathered in pieces of this size
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def init(device: str | None = None) -> torch.device:
    """Join the group that the launcher's environment tells of, if there is one; the device to compute on.

    NCCL for tensors on GPUs, gloo for those on CPUs. A process of several on a machine takes the GPU of its
    LOCAL_RANK. Without all of LAUNCHER_SETS, or with a WORLD_SIZE of 1, there is no group. Raises UserError
    for a device that is not there.
    """
    launched = all(name in os.environ for name in LAUNCHER_SETS) and int(os.environ["WORLD_SIZE"]) > 1
    if not launched or dist.is_initialized():
        return choose_device(device)
    end_with_launcher()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    store, my_rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store over restarts: under the same names a restarted group finds dead addresses.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=my_rank, world_size=size, timeout=TIMEOUT)
    return chosen


def end_with_launcher() -> None:
    """Have Linux send this process SIGTERM when the one that started it is gone, killed outright."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != launcher:  # it went meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def shutdown() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def share_of(n: int, of_rank: int | None = None, size: int | None = None) -> range:
    """The consecutive ones of n things that belong to a rank: n * r // w to n * (r + 1) // w."""
    of_rank = rank() if of_rank is None else of_rank
    size = world_size() if size is None else size
    return range(n * of_rank // size, n * (of_rank + 1) // size)


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_object(value: Any) -> Any:
    """The first rank's value, on every rank. It is pickled: for values of our own only."""
    return broadcast_from(0, value)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call function on the first rank; its result, or the UserError that it raised, is every rank's."""
    if world_size() == 1:
        return function(*args, **options)
    result, error = None, None
    if is_main():
        try:
            result = function(*args, **options)
        except (UserError, OSError) as raised:
            error = str(raised)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise UserError(error)
    return result


def _as_bytes(array: np.ndarray) -> torch.Tensor:
    """The memory of a contiguous array, (bytes,) uint8: whatever its type, it can be sent."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def gather_rows(rows: np.ndarray) -> np.ndarray | None:
    """(n_r, ...) of each rank -> (N, ...) in the order of ranks on the first, None on the others.

    Ranks may hold different numbers of rows, also none; an empty array has the others' type and row shape.
    Only the first one ever holds all of them.
    """
    if world_size() == 1:
        return rows
    counts = gather_objects(len(rows))
    row_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])  # known to ranks without rows as well
    step = max(1, CHUNK_BYTES // max(row_bytes, 1))
    whole = np.empty((sum(counts), *rows.shape[1:]), rows.dtype) if is_main() else None
    begin = 0
    for source, count in enumerate(counts):
        for start in range(0, count, step):
            stop = min(start + step, count)
            if source == 0:
                if is_main():
                    whole[begin + start : begin + stop] = rows[start:stop]
            elif is_main():
                dist.recv(_as_bytes(whole[begin + start : begin + stop]), source)
            elif rank() == source:
                dist.send(_as_bytes(np.array(rows[start:stop], order="C")), 0)  # a memory map is copied
        begin += count
    return whole


def all_gather_rows(rows: np.ndarray) -> np.ndarray:
    """(n_r, ...) of each rank -> (N, ...) in the order of ranks, on every rank."""
    whole = gather_rows(rows)
    if world_size() == 1:
        return whole
    shape = broadcast_object(None if whole is None else whole.shape)
    if whole is None:
        whole = np.empty(shape, rows.dtype)
    for part in _as_bytes(whole).split(CHUNK_BYTES):
        dist.broadcast(part, 0)
    return whole


def from_rank(source: int, rows: np.ndarray) -> np.ndarray:
    """The rows (n_r, ...) of rank `source`, on every rank; all call it, with rows of one type."""
    if world_size() == 1:
        return rows
    shape = broadcast_from(source, rows.shape)
    whole = np.ascontiguousarray(rows) if rank() == source else np.empty(shape, rows.dtype)
    for part in _as_bytes(whole).split(CHUNK_BYTES):
        dist.broadcast(part, source)
    return whole


def broadcast_from(source: int, value: Any) -> Any:
    """The value of rank `source`, on every rank. It is pickled: for values of our own only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, source, device=torch.device("cpu"))
    return box[0]
