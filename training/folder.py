"""The folder of a run: who may write into it, which checkpoint a run goes on from, what is left over.

EXP/checkpoint.pth.tar, EXP/checkpoints/checkpoint_<n>.pth.tar     of the methods
EXP/<name>.pth.tar                                                 of evaluations that train
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from data import scan
from training import schema
from util import Log, UserError, make_folder, rename, try_lock

AUTO = "auto"
REPLACED = ".replaced"  # what the name of a checkpoint ends in that another past of the run has made


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

    def of_epoch(self, epoch: int, every: int | None, epochs: int | None) -> Path | None:
        """The checkpoint that is kept after an epoch, one of `every` or the last; None where none is."""
        if not every or not (epoch % every == 0 or epoch + 1 == epochs):
            return None
        make_folder(self.path / "checkpoints")
        return self.path / "checkpoints" / f"ckp-{epoch}.pth.tar"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that lie in the folder, the last one first."""
        kept = sorted(self.path.glob(f"checkpoints/{self.last.name.split('.')[0]}_*.pth.tar"))
        kept += sorted(self.path.glob("checkpoints/ckp-*.pth.tar"))
        return [path for path in (self.last, *kept) if path.is_file()]

    def open(self) -> None:
        """Make the folder and lock it for as long as this process lives; clear what dead ones left over.

        Raises UserError where it cannot be written, or another process holds it.
        """
        make_folder(self.path)
        lock = open(self.path / f".{self.last.name}.lock", "a+", encoding="utf-8")
        held = try_lock(lock)
        if held is False:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"--exp {self.path}: in use by {holder}; choose another folder")
        if held is None:  # nobody can tell whose the left-over files are
            lock.close()
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        _HELD.add(lock)
        for left_over in (*self.path.glob("*.tmp-*"), *self.path.glob("checkpoints/*.tmp-*")):
            if not runs_beside(left_over.name.rpartition("-")[2]):
                with contextlib.suppress(OSError):
                    left_over.unlink()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            _HELD.discard(self._lock)
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
        """By what the files say, not by their times; those that cannot be used are warned about."""
        found: list[tuple[tuple[int, int], Path]] = []
        for path in self.checkpoints():
            try:
                found.append((schema.place(path), path))
            except UserError as error:
                log(f"warning: passed over, {error}")
        for _, path in sorted(found, key=lambda entry: entry[0], reverse=True):
            try:
                schema.read(path)
                return str(path)
            except UserError as error:
                log(f"warning: passed over, {error}")
        return None

    def set_aside(self, place: tuple[int, int], log: Log) -> None:
        """Rename the checkpoints beyond (epoch, iteration), from where the run goes on.

        Its log ends there, and `--resume auto` is not to take one of another past for the furthest.
        """
        for path in self.checkpoints():
            try:
                beyond = schema.place(path) > place
            except UserError:
                continue
            if beyond:
                rename(path, path.with_name(path.name + REPLACED))
                log(f"note: {path.name} is beyond the checkpoint that is resumed: renamed to *{REPLACED}")


# Locks that this process holds. A forked data loading worker may outlive it for seconds, and must not.
_HELD: set[IO] = set()


def _let_go() -> None:
    for lock in _HELD:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def refuse_images_folder(exp: Path, source: str | None) -> None:
    """UserError where EXP holds images of the folder DIR: a run's folder is left out of DIR as a whole."""
    if source is None or not os.path.isdir(source) or not exp.is_dir():
        return
    inside = Path(os.path.realpath(exp)).is_relative_to(os.path.realpath(source))
    if inside and not scan.is_run(os.listdir(exp)) and scan.scan(str(exp)).images:
        raise UserError(
            f"--exp {exp}: holds images of DIR, and what the run writes there would be told from them by "
            "nobody; choose another folder"
        )


def runs_beside(process: str) -> bool:
    """Whether another process of this machine has this number; containers begin with the same ones again."""
    try:
        if int(process) == os.getpid():
            return False
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def origin_of(path: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder
