"""Small things that several scripts share: errors, seeds, the device, files, log, progress.

torch is imported where it is used, so that `--help` and a bad flag are answered at once.
"""

import argparse
import contextlib
import fcntl
import glob
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    import torch


class UserError(Exception):
    """A mistake the user can mend: its message is one line that names the thing and the way out."""


class Preempted(BaseException):
    """A signal ends the run, which can go on later: exit code 75, "try again" (EX_TEMPFAIL of sysexits.h).

    No Exception: it may be raised anywhere, also where every error is taken for that of a broken image.
    """

    exit_code = 75


class Interrupted(Preempted):
    """The user ends the run by Ctrl-C: exit code 130."""

    exit_code = 130


def run_main(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call `main(args)`; a UserError becomes one line and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        if signal.getsignal(signal.SIGINT) is quit_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(args)
    except UserError as error:
        fail(f"{name}: {error}")
    except OSError as error:  # a full disk, a folder that went away
        fail(f"{name}: {explain(error) or error}")
    except (RuntimeError, ValueError, EOFError) as error:
        known = explain(error)
        if known is None:
            raise
        fail(f"{name}: {known}")
    except Preempted as stop:
        fail(f"{name}: {stop}", stop.exit_code)
    except KeyboardInterrupt:
        fail(f"{name}: interrupted", Interrupted.exit_code)


def quit_at_once(number: int, _: FrameType | None) -> NoReturn:
    """A handler for Ctrl-C while there is nothing to save, such as during the imports: exit code 130."""
    say(f"{Path(sys.argv[0]).name}: interrupted", sys.stderr)
    os._exit(Interrupted.exit_code)


# What libraries say where the machine is too small, and what a user can do about it.
SHARED_MEMORY = (
    "the shared memory of this machine (/dev/shm) is too small for data loading workers; use --workers 0, or "
    "give it more (docker run --shm-size=8g)"
)
KNOWN_ERRORS = {
    r"out of shared memory|allocate shared memory|Bus error|/torch_\S+: No space|shm_open": SHARED_MEMORY,
    r"DataLoader worker .*(killed by signal|exited unexpectedly)|^Connection\w+Error|^EOFError": (
        "a data loading worker was killed, most likely by the system for want of memory; use fewer "
        "--workers, or a smaller --batch"
    ),
    r"out of memory|can't allocate memory": "out of memory; use a smaller --batch, or smaller images",
    r"Expected more than 1 value per channel": (
        "batch norm has a single value to average, as a batch has one image and maps are 1 x 1; use a larger "
        "--batch, larger images, or --sync-bn with several processes"
    ),
}


def explain(error: Exception) -> str | None:
    """One line on an error of a library that tells of the machine or of the settings; None for others."""
    text = f"{type(error).__name__} {error}"
    found = (line for pattern, line in KNOWN_ERRORS.items() if re.search(pattern, text))
    return next(found, None)


LONGEST_LINE = 2000  # characters


def fail(message: str, code: int = 2) -> NoReturn:
    """End the process with one line on stderr; what would break it, in the name of a file, is escaped."""
    line = re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda c: repr(c[0])[1:-1], message[:LONGEST_LINE])
    say(line, sys.stderr)
    sys.exit(code)


def say(text: str, stream: IO | None = None, end: str = "\n") -> bool:
    """Print to stream, by default standard output; False where that is closed.

    Characters that the terminal's encoding lacks, and bytes of a file name that are none, are escaped.
    """
    stream = stream or sys.stdout
    if stream is None:
        return False
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)
    except ValueError:  # the stream was closed
        return False
    except OSError:  # nobody reads any more, the terminal is gone, the disk of a redirection is full
        _discard(stream)
        return False
    return True


def _discard(stream: IO) -> None:
    """Let the stream write into nothing: Python's own flush at the exit would fail on what is left in it."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


# ---------------------------------------------------------------------------------------- randomness


def derive_seed(seed: int, *items: int | str) -> int:
    """A 63-bit seed that depends on (seed, items) only, e.g. `derive_seed(31, "crop", epoch, position)`.

    Everything random in this repository draws from such a seed, so that a resumed run does not depend on
    what happened to run before it. Items are integers >= 0 or names.
    """
    entropy = [seed, *(zlib.crc32(item.encode()) if isinstance(item, str) else item for item in items)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------- device


def choose_device(name: str | None) -> "torch.device":
    """The device to compute on: `name`, or CUDA if there is one, else the CPU.

    Raises UserError for an unknown name, and for CUDA where there is none.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cpu, cuda or cuda:<n>") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported here; use cpu, cuda or cuda:<n>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA GPU on this machine; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), from cuda:0")
    return device


def set_precision(precision: str, device: "torch.device") -> contextlib.AbstractContextManager:
    """Set the arithmetic of matrix products and convolutions; returns the autocast context to compute in.

    fp32: full float32 everywhere (TF32 off too), the default on every device, so that nothing becomes less
    exact silently. tf32: float32 with TF32 products, CUDA only. bf16: autocast to bfloat16; on a CPU only
    where it multiplies bfloat16 in hardware, as elsewhere it is slower than fp32. fp16: autocast to float16,
    CUDA only; training needs a gradient scaler with it. Raises UserError where a choice makes no sense.
    """
    import torch

    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise UserError(
            f"--precision {precision}: for CUDA GPUs only; use fp32, or bf16 on a CPU that has it"
        )
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise UserError(
            "--precision bf16: this CPU has neither AMX nor AVX512-BF16, so fp32 is faster; use that"
        )
    # The older of torch's two ways of saying so: torch.export fails after the newer one (torch 2.14).
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=precision in ("bf16", "fp16"))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers in hardware."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16", False) or found.get("avx512_bf16", False))


# ---------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `path`; when the block ends well it is flushed to the disk and renamed to `path`.

    A full disk, a kill or an exception leaves whatever stood at `path` before; what a killed one left beside
    it goes with the next.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    clear_left_over(path)
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}  # any file name
        with open(beside, mode, **text) as file:
            try_lock(file)  # tells others that its process lives
            yield file
            file.flush()
            os.fsync(file.fileno())
            rename(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def clear_left_over(path: Path) -> None:
    """Remove the files beside `path` that processes which died were writing: nobody holds them locked."""
    for left_over in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        with contextlib.suppress(OSError), open(left_over, "rb") as file:
            if try_lock(file):
                left_over.unlink()


def rename(beside: Path, path: Path) -> None:
    """Give the file or folder the name `path`, so that a power cut does not undo it."""
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename in the folder is on the disk when this returns, as far as the file system can say."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def try_lock(file: IO | int) -> bool | None:
    """Hold an open file (or folder) alone until it is closed or this process dies; whether that went well.

    False where another process holds it; None on a file system without locks, which keeps nobody out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole, beside and renamed."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def make_folder(path: str | Path) -> Path:
    """Make the folder (and its parents) and check that files can be written in it; UserError if not."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY
        reason = "it is on a read-only file system" if read_only else "permission denied"
        raise UserError(f"cannot write into the folder {path}: {reason}")
    return path


# ---------------------------------------------------------------------------------------- meters


class AverageMeter:
    """Running mean of a value weighted by how many items it stands for."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    @property
    def avg(self) -> float:
        return self.sum / max(self.count, 1)

    def update(self, value: float, n: int = 1) -> None:
        self.sum += value * n
        self.count += n


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------------------------------- log and progress


class Log:
    """Prints lines to the terminal and appends them, with the time of day, to a file."""

    def __init__(self, path: str | Path | None = None, quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet

    def __call__(self, line: str) -> None:
        if not self.quiet and not say(line):
            self.quiet = True
            self.to_file("note: standard output is closed; going on, with this file alone")
        self.to_file(line)

    def to_file(self, line: str) -> None:
        """Append a line to the log file only."""
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class Progress:
    """How much, how fast, how long still: `features 12800/1281167  1431 img/s  eta 14:46`.

    On a terminal the line is rewritten in place; elsewhere, and in the log's file, a plain line comes every
    `every` seconds and at the end.
    """

    def __init__(
        self, total: int, label: str, unit: str = "img", log: Log | None = None, every: float = 30.0
    ) -> None:
        self.total, self.label, self.unit, self.every = total, label, unit, every
        self.log = log or Log(quiet=True)
        self.terminal = sys.stdout is not None and sys.stdout.isatty() and not self.log.quiet
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.last_draw = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def line(self, note: str = "") -> str:
        rate = self.done / max(self.seconds, 1e-9)
        eta = clock((self.total - self.done) / rate) if rate > 0 else "?"
        return f"{self.label} {self.done}/{self.total}  {self.speed}  eta {eta}  {note}".rstrip()

    @property
    def speed(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        return f"{rate:.{0 if rate >= 10 else 2}f} {self.unit}/s"

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more; draw or write when it is time to."""
        self.done += n
        now = time.monotonic()
        if self.terminal and now - self.last_draw > 0.2:
            self.last_draw = now
            say(f"\r\033[K{self.line(note)}", end="")
        if now - self.last_line > self.every:
            self.last_line = now
            self.log.to_file(self.line(note)) if self.terminal else self.log(self.line(note))

    def clear(self) -> None:
        """Wipe the bar off the terminal."""
        if self.terminal:
            say("\r\033[K", end="")

    def close(self, note: str = "") -> None:
        """Replace the bar by one last line: how many, how long, how fast."""
        self.clear()
        line = f"{self.label} {self.done}/{self.total} in {clock(self.seconds)}, {self.speed}"
        self.log(f"{line}  {note}".rstrip())
