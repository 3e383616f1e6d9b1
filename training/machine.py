"""What a run needs of the machine, asked before its first step rather than found out in the middle."""

import os
from pathlib import Path

import torch

from util import SHARED_MEMORY, UserError

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
