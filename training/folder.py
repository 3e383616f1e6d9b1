"""The folder of a run: who may write into it, which checkpoint a run goes on from, what is left over.

EXP/checkpoint.pth.tar, EXP/checkpoints/checkpoint_<n>.pth.tar     of the methods
EXP/<name>.pth.tar                                                 of evaluations that train
"""

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

import checkpoint
from util import Log, UserError, make_folder

AUTO = "auto"


class Folder:
    """EXP of a run, held by this process alone; name: of its checkpoint's file.

    keep: whether periodic checkpoints are kept, each in a file of its own, or the last one alone.
    """

    def __init__(self, path: str | Path, name: str, keep: bool = True) -> None:
        self.path, self.keep = Path(path), keep
        self.last = self.path / name
        self._lock: IO | None = None

    def periodic(self, n: int) -> Path:
        """Where the n-th periodic checkpoint goes; its folder is there."""
        if not self.keep:
            return self.last
        make_folder(self.path / "checkpoints")
        return self.path / "checkpoints" / f"{self.last.name.split('.')[0]}_{n}.pth.tar"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that lie in the folder, the last one first."""
        kept = sorted(self.path.glob(f"checkpoints/{self.last.name.split('.')[0]}_*.pth.tar"))
        return [path for path in (self.last, *kept) if path.is_file()]

    def open(self) -> None:
        """Make the folder and lock it for as long as this process lives; clear what dead ones left over.

        Raises UserError where it cannot be written, or another process holds it.
        """
        make_folder(self.path)
        lock = open(self.path / ".lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"--exp {self.path}: in use by {holder}; choose another folder") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        for left_over in (*self.path.glob("*.tmp-*"), *self.path.glob("checkpoints/*.tmp-*")):
            with contextlib.suppress(OSError):
                left_over.unlink()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def find(self, resume: str | None, log: Log) -> str | None:
        """The checkpoint that --resume names: its path, or for `auto` the furthest good one in the folder.

        Raises UserError where a new run would overwrite another one.
        """
        if resume == AUTO:
            found = self._furthest(log)
            if found is None:
                log(f"--resume auto: no checkpoint in {self.path}, this is a new run")
            return found
        lies_here = resume is not None and origin_of(resume).resolve() == self.path.resolve()
        others = self.checkpoints()
        if others and not lies_here:
            raise UserError(
                f"--exp {self.path}: holds another run ({others[0].name}); continue it with --resume "
                f"{others[0]}, or choose another folder"
            )
        return resume

    def _furthest(self, log: Log) -> str | None:
        """By what the files say, not by their times; those that cannot be read are warned about."""
        found: list[tuple[int, int, Path]] = []
        for path in self.checkpoints():
            try:
                state = checkpoint.read(path, peek=True)
                found.append((int(state["epoch"]), int(state["iteration"]), path))
            except UserError as error:
                log(f"warning: passed over, {error}")
            except (KeyError, TypeError, ValueError):
                log(f"warning: passed over, {path}: not a checkpoint of a run")
        for *_, path in sorted(found, key=lambda entry: entry[:2], reverse=True):
            try:
                checkpoint.read(path)
                return str(path)
            except UserError as error:
                log(f"warning: passed over, {error}")
        return None


def origin_of(path: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder
