"""What a run keeps: its parts, which are in every checkpoint, and how they come back from one."""

from pathlib import Path
from typing import Any

import torch

from models.network import Network
from models.weights import load_weights, model_weights
from training import optim, schema
from util import Log, UserError

# Settings that may change in a resumed run without a word; of the others those that are not fixed are told.
FREE = frozenset({
    "dir", "data", "shards", "exp", "resume", "epochs", "start_epoch", "init", "checkpoints", "workers",
    "device", "verbose", "skip_bad_images", "crop_cache", "no_report", "tensorboard",
})  # fmt: skip
TOP = {"net": "state_dict", "body": "optimizer", "optimizer": "optimizer"}  # names that others read


class Parts:
    """Whatever has state_dict and load_state_dict, by name; and what a checkpoint holds for those to come."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._void: set[str] = set()
        self._path: Path | None = None

    def read(
        self, path: Path, method: str, settings: dict[str, Any], fixed: tuple, log: Log
    ) -> dict[str, Any]:
        """Read the checkpoint at path, whose parts are then restored when they are kept; returns its content.

        Raises UserError unless it is a good one of this method, with the same settings where those are fixed.
        """
        saved = schema.read(path)
        if saved["method"] != method:
            raise UserError(f"--resume {path}: a checkpoint of {saved['method']}, not of {method}")
        check_same(saved["args"], settings, fixed, path, log)
        top = {name: saved[key] for name, key in TOP.items() if key in saved}
        self._saved, self._path = top | saved["parts"], path
        return saved

    def keep(self, **parts: Any) -> None:
        """Kept from now on; restored, once, where a checkpoint was read. UserError if one does not fit."""
        for name, part in parts.items():
            new = name not in self.kept
            self.kept[name] = part
            if self._path is None or not new or name in self._void:
                continue
            if name not in self._saved:
                raise UserError(f"--resume {self._path}: holds no {name}; take another checkpoint")
            self.restore(name, part, self._saved.pop(name))

    def restore(self, name: str, part: Any, state: Any) -> None:
        """Load what was saved of a part. Raises UserError where it does not fit."""
        try:
            self._restore(part, state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--resume {self._path}: its {name} does not fit ({reason})") from error

    def _restore(self, part: Any, state: Any) -> None:
        if isinstance(part, Network):
            weights = model_weights({"state_dict": state, "arch": part.arch}, self._path)[1]
            own = part.state_dict()
            for name in own.keys() & weights.keys():
                if own[name].dtype != weights[name].dtype:
                    raise ValueError(f"{name} is {weights[name].dtype}, not {own[name].dtype}")
            load_weights(part, weights, self._path)
        elif isinstance(part, torch.optim.Optimizer):
            optim.restore(part, state)
        else:
            part.load_state_dict(state)

    def forget(self, name: str) -> None:
        """What was read of this part is void: it is made anew."""
        self._saved.pop(name, None)
        self._void.add(name)

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, some of them under the names that checkpoints have always had."""
        parts = {name: part.state_dict() for name, part in self.kept.items()}
        top = {TOP[name]: parts.pop(name) for name in TOP if name in parts}
        return {"arch": getattr(self.kept.get("net"), "arch", None), **top, "parts": parts}


def check_same(was: dict[str, Any], now: dict[str, Any], fixed: tuple, path: Path, log: Log) -> None:
    """A checkpoint goes on only with the settings it was made with; a change of others is told."""
    for name, value in now.items():
        if name not in was or was[name] == value or name in FREE:
            continue
        if name in fixed:
            weights = " from its weights with --init" if "init" in now else ""  # evaluations have none
            raise UserError(
                f"--resume {path}: was run with {name} {was[name]}, not {value}; give the same, or start a "
                f"new run{weights}"
            )
        log(f"note: {name} was {was[name]} and is {value} from here on")


def global_batch(saved: dict[str, Any], now: dict[str, Any], batch: int, path: Path, log: Log) -> int:
    """The images of a step in all processes, with which a checkpoint goes on: as many as it was made with.

    batch: what the settings `now` ask for. Where --batch_size, of one process, is as it was, the number of
    processes has changed, and they share what a step had. UserError where it is neither.
    """
    was = saved.get("batch", batch)
    if "batch_size" not in now or was == batch:
        return batch
    if now["batch_size"] != saved["args"].get("batch_size"):
        raise UserError(
            f"--resume {path}: was run with global batches of {was}, not of {batch}; give --batch_size "
            f"{saved['args'].get('batch_size')} again, with any number of processes"
        )
    log(f"note: another number of processes shares global batches of {was}, as they were")
    return was
