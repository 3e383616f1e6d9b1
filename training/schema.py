"""What a checkpoint of a run has to look like: checked when it is read, before anything of it is used.

Files come from strangers and from broken disks. Here stands what holds for every method: the place, the
settings, the tensors. A part checks the rest against what it is restored into (optim.restore, the
load_state_dict of the others).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import checkpoint
from util import UserError

PLAIN = (str, int, float, bool, type(None))
LARGEST = 2**53  # of a counter
DEEPEST = 20  # of a nest of tables and lists
# What a clustering says of itself, tensors and the rest: algorithms and networks know the sizes.
ASSIGNMENT = {"labels": (torch.int64, 1), "distances": (torch.float32, 1), "centroids": (torch.float32, 2)}


class Wrong(ValueError):
    """What is wrong with a checkpoint, to be put behind its path."""


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint of a run in today's form. Raises UserError, one line, for everything that is none."""
    saved = upgrade(checkpoint.read(path), path)
    missing = [name for name in CHECKS if name not in saved]
    if missing:
        raise UserError(
            f"--resume {path}: holds no {missing[0]}, so it is not a checkpoint of a run of this program; to "
            "start from its weights use --init"
        )
    try:
        for name, check in (CHECKS | OPTIONAL).items():
            if name in saved:
                check(name, saved[name])
        check_place(saved)
        for name, value in saved.items():
            check_values(name, value)
    except Wrong as wrong:
        raise UserError(f"--resume {path}: cannot go on from it, {wrong}; take another checkpoint") from None
    return saved


def place(path: str | Path) -> tuple[int, int]:
    """(epoch, iteration) of a checkpoint, whose tensors are not read. UserError if it is not one of a run."""
    saved = checkpoint.read(path, peek=True)
    try:
        for name in ("epoch", "iteration"):
            counter(name, saved.get(name))
    except Wrong as wrong:
        raise UserError(f"{path}: not a checkpoint of a run, {wrong}") from None
    return saved["epoch"], saved["iteration"]


# ---------------------------------------------------------------------------------------- one value


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def counter(name: str, value: Any) -> None:
    """A whole number from 0 on."""
    require(type(value) is int and 0 <= value <= LARGEST, f"{name} is {shown(value)}, no count")


def number(name: str, value: Any) -> None:
    """A finite number."""
    require(type(value) in (int, float) and math.isfinite(value), f"{name} is {shown(value)}, no number")


def text(name: str, value: Any) -> None:
    require(isinstance(value, str) and len(value) < 1000, f"{name} is {shown(value)}, no text")


def mapping(name: str, value: Any) -> None:
    """A dict whose keys are texts."""
    good = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    require(good, f"{name} is {shown(value)}, no table")


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return repr(value)[:40] if isinstance(value, PLAIN) else f"a {type(value).__name__}"


def tensor(name: str, value: Any, dtype: torch.dtype, dims: int) -> None:
    """A tensor of this type with so many dimensions, none of them empty."""
    good = isinstance(value, torch.Tensor) and value.dtype == dtype and value.dim() == dims
    require(good and value.numel() > 0, f"{name} is {shown(value)}, not {dims}-dimensional {dtype}")


def check_values(name: str, value: Any) -> None:
    """Every tensor in the nest is plain, on the CPU and finite; nothing but containers and plain values."""
    for path, leaf in leaves(name, value):
        if isinstance(leaf, torch.Tensor):
            plain = leaf.layout == torch.strided and leaf.device.type == "cpu" and not leaf.is_complex()
            require(plain and not leaf.is_quantized, f"{path} is no plain tensor")
            finite = not leaf.is_floating_point() or bool(leaf.isfinite().all())
            require(finite, f"{path} holds numbers that are not finite")
            negative = path.endswith("running_var") and bool((leaf < 0).any())
            require(not negative, f"{path} holds a negative variance")
        else:
            require(isinstance(leaf, PLAIN), f"{path} is {shown(leaf)}")


def leaves(name: str, value: Any, met: dict[int, Any] | None = None, depth: int = 0) -> Iterator:
    """(path, value) of everything in a nest of dicts and lists that is none.

    Each of these once (met: by their ids), as a small file may hold one in itself, or twice in each of 60
    that hold each other. Raises Wrong for a nest deeper than any of ours.
    """
    if not isinstance(value, dict | list | tuple):
        yield name, value
        return
    met = {} if met is None else met
    require(depth < DEEPEST, f"{name[:80]} is nested too deep")
    if id(value) not in met:
        met[id(value)] = value
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{name}.{key}", inner, met, depth + 1)


# ---------------------------------------------------------------------------------------- the entries


def check_args(name: str, value: Any) -> None:
    """Settings are plain values, or lists of such."""
    mapping(name, value)
    for path, leaf in leaves(name, value):
        require(isinstance(leaf, PLAIN), f"{path} is {shown(leaf)}")


def check_loss(name: str, value: Any) -> None:
    mapping(name, value)
    number(f"{name}.sum", value.get("sum"))
    counter(f"{name}.count", value.get("count"))


def check_record(name: str, value: Any) -> None:
    mapping(name, value)
    mapping(f"{name}.seconds", value.get("seconds"))
    mapping(f"{name}.images_per_second", value.get("images_per_second", {}))
    for what, seconds in value["seconds"].items():
        number(f"{name}.seconds.{what}", seconds)


def check_parts(name: str, value: Any) -> None:
    mapping(name, value)
    for part, state in value.items():
        check = PARTS.get(part)
        if check is not None:
            check(f"{name}.{part}", state)


def check_images(name: str, value: Any) -> None:
    mapping(name, value)
    counter(f"{name}.number", value.get("number"))
    text(f"{name}.digest", value.get("digest"))
    skipped = value.get("skipped")
    good = isinstance(skipped, list) and all(isinstance(path, str) for path in skipped)
    require(good, f"{name}.skipped is {shown(skipped)}, no list of names")
    bits = value.get("bits", 16)
    require(
        bits is None or (type(bits) is int and 8 <= bits <= 16), f"{name}.bits is {shown(bits)}, not 8 to 16"
    )


def check_labels(name: str, value: Any) -> None:
    mapping(name, value)
    epoch, assignments = value.get("epoch"), value.get("assignments")
    require(type(epoch) is int and -1 <= epoch <= LARGEST, f"{name}.epoch is {shown(epoch)}")
    require(isinstance(assignments, list), f"{name}.assignments is {shown(assignments)}, no list")
    counter(f"{name}.clusters_size", value.get("clusters_size"))
    mapping(f"{name}.figures", value.get("figures"))
    for i, assignment in enumerate(assignments):
        check_assignment(f"{name}.assignments.{i}", assignment)


def check_assignment(name: str, value: Any) -> None:
    """Labels (N,) below k, N distances, k centroids."""
    mapping(name, value)
    for what, (dtype, dims) in ASSIGNMENT.items():
        tensor(f"{name}.{what}", value.get(what), dtype, dims)
    number(f"{name}.objective", value.get("objective"))
    counter(f"{name}.num_clusters", value.get("num_clusters"))
    labels, k = value["labels"], value["num_clusters"]
    require(len(value["centroids"]) == k, f"{name} has {len(value['centroids'])} centroids of {k} clusters")
    require(len(value["distances"]) == len(labels), f"{name} has other numbers of labels and distances")
    inside = labels.min() >= 0 and labels.max() < k
    require(bool(inside), f"{name} has a label that is not one of {k} clusters")


def check_optimizer(name: str, value: Any) -> None:
    """{"state": {number of a parameter: {...}}, "param_groups": [...]}; optim.restore knows the shapes."""
    mapping(name, value)
    state, groups = value.get("state"), value.get("param_groups")
    require(isinstance(state, dict), f"{name}.state is {shown(state)}, no table")
    require(isinstance(groups, list), f"{name}.param_groups is {shown(groups)}, no list")
    for key, inner in state.items():
        counter(f"the number of a parameter in {name}.state", key)
        mapping(f"{name}.state.{key}", inner)


def check_place(saved: dict[str, Any]) -> None:
    """The counters go together: an epoch takes a step or more, and labels are of an epoch that began."""
    epoch, position, iteration = saved["epoch"], saved["position"], saved["iteration"]
    require(saved.get("batch", 1) > 0, "its batches are of no image")
    start = saved["args"].get("start_epoch", 0)
    counter("args.start_epoch", start)
    few = iteration < max(epoch - start, 0) + position
    require(not few, f"epoch {epoch} with {position} steps does not fit {iteration} iterations")
    labels = saved["parts"].get("labels")
    late = labels is not None and labels["epoch"] > epoch
    require(not late, f"its labels are of a later epoch than {epoch}")


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "epoch": counter,
    "position": counter,
    "iteration": counter,
    "record": check_record,
    "loss": check_loss,
    "args": check_args,
    "parts": check_parts,
    "method": text,
}
OPTIONAL = {"batch": counter, "state_dict": mapping, "optimizer": check_optimizer}
PARTS = {"images": check_images, "labels": check_labels, "head": check_optimizer}


# ---------------------------------------------------------------------------------------- earlier versions

FIRST_FORM = (
    "assignment", "clustered", "epoch", "position", "iteration", "record", "loss", "args", "clusters_size",
    "images", "skipped", "optimizer", "optimizer_head",
)  # fmt: skip


def upgrade(saved: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint of any version of this repository in today's form; anything else as it is."""
    if "parts" in saved or not all(name in saved for name in FIRST_FORM):
        return saved
    clustered, epoch, record, images = (saved[name] for name in ("clustered", "epoch", "record", "images"))
    try:
        counter("epoch", epoch)
        mapping("record", record)
        mapping("images", images)
        require(type(clustered) is bool, f"clustered is {shown(clustered)}")
        require(clustered or saved["position"] == 0, "it stands in an epoch that has no labels")
    except Wrong as wrong:
        raise UserError(f"--resume {path}: cannot go on from it, {wrong}; take another checkpoint") from None
    labels = {
        "epoch": epoch if clustered else epoch - 1,
        "assignments": [saved["assignment"]],
        "clusters_size": saved["clusters_size"],
        "figures": {name: value for name, value in record.items() if name not in ("epoch", "seconds")},
    }
    return saved | {
        "method": "deepcluster",
        "record": {"seconds": record.get("seconds", {})},
        "parts": {
            "images": images | {"skipped": saved["skipped"]},
            "labels": labels,
            "head": saved["optimizer_head"],
        },
    }
