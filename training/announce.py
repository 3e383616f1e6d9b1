"""What a run says before it begins, on the terminal and in EXP/config.json."""

import argparse
import os
import platform
import sys
from pathlib import Path

import faiss
import numpy as np
import torch

import distributed
from data import ImageList
from util import Log, write_json


def announce(
    exp: Path,
    images: ImageList,
    method: str,
    what: str,
    args: argparse.Namespace,
    device: torch.device,
    log: Log,
) -> None:
    """Say what is about to happen, and write EXP/config.json; what: a line on network and method."""
    classes = "no class folders" if images.classes is None else f"{len(images.class_names)} classes"
    ranks = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    log(f"{len(images)} images in {images.name} ({classes}, for the log only)")
    log(f"{what}, on {device} ({args.precision}){ranks}")
    if args.verbose:
        log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    if distributed.is_main():
        write_config(exp, images, method, args, device)


def write_config(
    exp: Path, images: ImageList, method: str, args: argparse.Namespace, device: torch.device
) -> None:
    """EXP/config.json: what was asked for, on which images, by which versions; pictures read it."""
    sources = {name: getattr(args, name, None) for name in ("dir", "shards")}
    write_json(exp / "config.json", {
        "method": method,
        "args": vars(args) | {name: path and os.path.abspath(path) for name, path in sources.items()},
        "images": {
            "root": os.path.abspath(images.root),
            "number": len(images),
            "classes": images.class_names,
        },
        "device": str(device),
        "versions": versions(),
        "command": sys.argv,
    })  # fmt: skip


def versions() -> dict[str, str]:
    """What computed this: a resumed run is the same bit for bit only with the same."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "faiss": faiss.__version__,
    }
