"""What a run writes besides its checkpoints: `clusters`, `log.jsonl`, `assignments.csv`, TensorBoard."""

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from util import UserError, atomic_write

EMPTY_LOG = b"\x80\x02]."  # protocol 2, an empty list, STOP


class ClusterLog:
    """`EXP/clusters`: one pickle, a list with an entry an epoch, that grows by appending.

    The file is always `PROTO, EMPTY_LIST, (entry, APPEND)*, STOP`. An append writes everything behind the
    STOP first and replaces the STOP itself, one byte, last: at any moment `pickle.load` reads all that was
    complete, and nothing already written is rewritten.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        """Start an empty log, or continue an existing one of which the first `size` bytes count."""
        self.path = Path(path)
        if size is None:
            with atomic_write(self.path, "wb") as file:
                file.write(EMPTY_LOG)
            self.size = len(EMPTY_LOG)
            return
        if not self.path.is_file() or self.path.stat().st_size < size:
            raise UserError(f"{self.path}: the log of the earlier epochs is missing or shorter than it was")
        self.size = size
        with open(self.path, "r+b") as file:
            file.seek(max(size - 1, 0))
            if size < len(EMPTY_LOG) or file.read(1) not in b".]":  # STOP, or what the next entry begins with
                raise UserError(f"{self.path}: no epoch ends at byte {size}, where the checkpoint says so")
            file.seek(size - 1)
            file.write(b".")  # from here on the file is valid with fewer epochs
            file.truncate(size)

    def append(self, lists: list[list[int]]) -> None:
        """Add one epoch: for each cluster the image indexes in it. O(N) bytes."""
        entry = pickle.dumps(lists, protocol=2)[2:-1] + b"a."  # without its own PROTO and STOP
        with open(self.path, "r+b") as file:
            file.seek(self.size)
            file.write(entry[1:])
            file.flush()
            os.fsync(file.fileno())
            file.seek(self.size - 1)
            file.write(entry[:1])
            file.flush()
            os.fsync(file.fileno())
        self.size += len(entry) - 1


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line (`log.jsonl`, a line an epoch)."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`; lines that are none, such as a last one cut by a kill, are left out."""
    return check_lines(path)[0]


def check_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(records, broken) of a `log.jsonl`: what its lines say, and the numbers, from 1, of those that do not.

    A record is a JSON object in UTF-8 with a whole number under `epoch`.
    """
    records: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        epoch = record.get("epoch") if isinstance(record, dict) else None
        if type(epoch) is int and 0 <= epoch < 2**31:
            records.append(record)
        else:
            broken.append(number)
    return records, broken


def keep_lines_before(path: Path, epoch: int) -> None:
    """Drop the lines of epochs from `epoch` on: a resumed run writes them again."""
    records = [record for record in read_lines(path) if record["epoch"] < epoch] if path.is_file() else []
    with atomic_write(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def flags_of(settings: dict[str, Any]) -> tuple[str, str]:
    """How a run with these settings calls its learning rate and its number of clusters."""
    return ("--base_lr", "--nmb_prototypes") if "base_lr" in settings else ("--lr", "--k")


def cures_of(settings: dict[str, Any]) -> str:
    """What SwAV's and DeepCluster-v2's authors advise where training collapses or does not begin."""
    own = "--epsilon 0.03, prototypes frozen longer (--freeze_prototypes_niters), " * ("epsilon" in settings)
    return f"{own}a --temperature of 0.5, fewer --nmb_prototypes, or fewer or softer crops"


def advice(epoch: int, loss: float, log_k: float, settings: dict[str, Any] | None = None) -> str | None:
    """What to do about the loss of an epoch, of which log_k is that of guessing; None where all is well.

    settings: of the run, whose flags are named.
    """
    if epoch < 2:
        return None
    rate, number = flags_of(settings or {})
    if loss > 1.1 * log_k:
        return (
            f"the loss {loss:.3f} is far above log k = {log_k:.3f}, what guessing gives: training diverges; "
            f"try a lower {rate}"
        )
    if loss > 0.98 * log_k:
        more = f", {cures_of(settings)}" if rate == "--base_lr" else f" or a smaller {number}"
        return (
            f"the loss {loss:.3f} is stuck at log k = {log_k:.3f}: the cluster ids are not being learnt; try "
            f"a higher {rate}{more}"
        )
    return None


def take_over(name: str, origin: Path, exp: Path) -> None:
    """Copy the file of a run that goes on in another folder, exp."""
    if origin.resolve() != exp.resolve() and (origin / name).is_file():
        with atomic_write(exp / name, "wb") as file:
            file.write((origin / name).read_bytes())


def write_assignments(path: Path, paths: list[str], *heads: tuple[np.ndarray, np.ndarray]) -> None:
    """`assignments.csv` of the last clustering: path, cluster, squared L2 distance to the centroid.

    heads: (labels, distances) of each; the columns of the second one are cluster1 and distance1.
    """
    columns: list[list] = [paths]
    head = ["path"]
    for h, (labels, distances) in enumerate(heads):
        head += [f"cluster{h or ''}", f"distance{h or ''}"]
        columns += [labels.tolist(), [f"{d:.6g}" for d in distances.tolist()]]
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\r\n" if any("\r" in path for path in paths) else "\n")
        writer.writerow(head)
        writer.writerows(zip(*columns))


def open_tensorboard(exp: Path) -> Any:
    """A TensorBoard writer into EXP/tensorboard; the package is needed only when this is asked for."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: not installed; pip install -r requirements-extra.txt") from None
    return SummaryWriter(exp / "tensorboard")


def to_tensorboard(writer: Any, record: dict[str, Any]) -> None:
    """Every number of a log record as a scalar at its epoch; nested ones as `group/name`."""
    for name, value in record.items():
        values = (
            {name: value} if not isinstance(value, dict) else {f"{name}/{k}": v for k, v in value.items()}
        )
        for tag, number in values.items():
            if isinstance(number, int | float):
                writer.add_scalar(tag, number, record["epoch"])
    writer.flush()
