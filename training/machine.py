"""What a run needs of the machine, asked before its first step rather than found out in the middle."""

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

import distributed
from util import SHARED_MEMORY, Log, UserError

SHARED = Path("/dev/shm")  # where Linux keeps what workers hand over
AHEAD = 2  # batches that torch's loader asks of every worker before it needs them


def check_compiler(device: torch.device) -> None:
    """Compile a step of nothing. Raises UserError where --compile could not work."""
    try:
        compiled = torch.compile(lambda x: (x * 2 + 1).relu())
        compiled(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler and its environment may say
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"--compile: cannot compile here ({lines[0][:200]}); leave it out") from error


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30


def check_shared_memory(workers: int, batch: int, size: int) -> None:
    """Refuse workers whose batches, of crops of this size, do not fit into shared memory. UserError."""
    if workers == 0 or not SHARED.is_dir():
        return
    room = os.statvfs(SHARED)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes * workers * AHEAD * batch * 3 * size**2
    if room.f_bavail * room.f_frsize < needed:
        raise UserError(
            f"--workers {workers}: takes {needed / 2**20:.0f} MB of shared memory; {SHARED_MEMORY}"
        )


def warn_of_workers(workers: int, log: Log) -> None:
    """Say where there are more data loading workers than cores for them."""
    cores = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    if workers > cores:
        of = "this machine" if distributed.world_size() == 1 else "each process"
        log(f"warning: --workers {workers}, but {of} has {cores} core(s); {cores} would do")


def costs(seconds: dict[str, float], device: torch.device) -> dict[str, Any]:
    """What an epoch took, for its log line: seconds by phase and in all, peak memory so far."""
    whole = seconds | {"total": sum(seconds.values())}
    found: dict[str, Any] = {"seconds": {name: round(value, 2) for name, value in whole.items()}}
    found["peak_memory_gib"] = round(peak_memory_gib(), 3)
    if device.type == "cuda":
        found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found


def versions() -> dict[str, str]:
    """What computed this: a resumed run is the same bit for bit only with the same."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "faiss": faiss.__version__,
    }
