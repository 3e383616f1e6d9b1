"""What the evaluators share: the labelled folders, the network to look at, the protocol beside the number."""

import json
import sys
from pathlib import Path
from typing import Any

import checkpoint
import data
import models
from util import UserError, make_folder, write_json

RESULTS = "results.json"


def open_split(folder: str | Path, split: str) -> data.ImageList:
    """The images of DATA/<split> with its class sub-folders; UserError where either is missing."""
    path = Path(folder) / split
    if not path.is_dir():
        raise UserError(f"{split}/ is missing in {folder} (expected DATA/train and DATA/val)")
    images = data.list_images(path)
    if images.classes is None:
        raise UserError(f"{path}: no class sub-folders (expected two or more, {split}/<class>/<image>)")
    return images


def open_train_val(folder: str | Path) -> tuple[data.ImageList, data.ImageList]:
    """DATA/train and DATA/val with the same class folders, so that class ids mean the same in both."""
    train, val = open_split(folder, "train"), open_split(folder, "val")
    odd = sorted(set(train.class_names) ^ set(val.class_names))
    if odd:
        where = "train" if odd[0] in train.class_names else "val"
        raise UserError(f"{folder}: class folder {odd[0]} is only in {where}/; both need the same classes")
    return train, val


def open_network(path: str | None, layers: list[str]) -> models.DeepClusterNet:
    """The network of a checkpoint (ours or the authors'), checked to have these activations."""
    if not path:
        raise UserError("--model is missing: give a checkpoint, e.g. exp/checkpoint.pth.tar")
    net = checkpoint.load_model(path)
    for layer in layers:
        if layer not in net.activation_names:
            raise UserError(
                f"{path}: {net.arch} has no layer {layer}; it has {', '.join(net.activation_names)}"
            )
    return net


def report(exp: str | Path, name: str, protocol: dict[str, Any], results: Any) -> None:
    """Print the protocol of evaluator `name` and put it with its results into EXP/results.json.

    The file keeps the results of other evaluators: {name: {"protocol": ..., "results": ..., "command": ...}}.
    """
    print(f"{name} protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()), flush=True)
    path = make_folder(exp) / RESULTS
    try:
        everything = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        raise UserError(f"{path}: not valid JSON; move it away") from None
    everything[name] = {"protocol": protocol, "results": results, "command": sys.argv}
    write_json(path, everything)
