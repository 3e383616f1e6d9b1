"""What a run says before it begins, on the terminal and in EXP/config.json."""

import os
import sys
from collections.abc import Iterable

import distributed
from data import ImageList
from training.machine import versions
from training.run import Run
from util import write_json


def announce(run: Run, images: ImageList, what: str) -> None:
    """Say what is about to happen, and write EXP/config.json; what: a line on network and method."""
    args = run.args
    classes = "no class folders" if images.classes is None else f"{len(images.class_names)} classes"
    ranks = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    run.log(f"{len(images)} images in {images.name} ({classes}, for the log only)")
    run.log(f"{what}, on {run.device} ({args.precision}){ranks}")
    if args.verbose:
        run.log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    if distributed.is_main():
        write_config(run, images)


def tell_old_flags(run: Run, flags: Iterable[str]) -> None:
    """Say of flags of the authors' command lines that are given, and have no meaning here, that it is so."""
    for flag in flags:
        if getattr(run.args, flag.removeprefix("--").replace("-", "_")) is not None:
            run.log(f"note: {flag} changes nothing: the launcher's environment, and this program, decide")


def write_config(run: Run, images: ImageList) -> None:
    """EXP/config.json: what was asked for, on which images, by which versions; pictures read it."""
    args = vars(run.args)
    write_json(run.exp / "config.json", {
        "method": run.method,
        "args": args | {name: args.get(name) and os.path.abspath(args[name]) for name in ("dir", "shards")},
        "images": {
            "root": os.path.abspath(images.root),
            "number": len(images),
            "classes": images.class_names,
        },
        "device": str(run.device),
        "versions": versions(),
        "command": sys.argv,
    })  # fmt: skip
