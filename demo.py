"""Cut the demo's image folder from the photographs in demo/pictures: deterministic, offline, in seconds.

    python demo.py demo_images

writes 5,000 small square JPEG files: DIR/train/<picture>/*.jpg from the left three quarters of each
photograph and DIR/val/<picture>/*.jpg from its right quarter, so that no pixel is in both. The class of a
crop is the photograph that it was cut from. A complete folder is reused, an incomplete one is made again.
"""

import argparse

from commandline import Parser, add_seed, at_least


def get_parser() -> Parser:
    """The flags of demo.py."""
    parser = Parser(__doc__)
    parser.add_argument("dir", metavar="DIR", help="folder to make, with DIR/train and DIR/val")
    parser.add_argument(
        "--train", type=at_least(1), default=200, metavar="N", help="train crops from each picture"
    )
    parser.add_argument(
        "--val", type=at_least(1), default=50, metavar="N", help="val crops from each picture"
    )
    add_seed(parser)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import util

PICTURES = Path(__file__).resolve().parent / "demo" / "pictures"
MANIFEST = "demo.json"  # says what the folder holds; there is one in every folder that this script made
TRAIN_SHARE = 0.75  # of each picture's width, from the left; the rest is for val
SIDE = (0.20, 0.45)  # of the picture's shorter side
STORED = (64, 96)  # smallest and largest side of a stored crop, in pixels
FLAT, TRIES = 4.0, 20  # grey levels (0..255) that deviate less show nothing: draw again, at most so often
QUALITY = 90  # of the JPEG files


# ---------------------------------------------------------------------------------------- crops


def regions(width: int) -> dict[str, tuple[int, int]]:
    """The columns [left, right) of a picture that each split may use; the two never overlap."""
    cut = int(width * TRAIN_SHARE)
    return {"train": (0, cut), "val": (cut, width)}


def draw_box(
    size: tuple[int, int], columns: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random square (left, top, right, bottom) inside the columns of a picture of `size` (width, height).

    Its side is uniform in SIDE times the picture's shorter side, but never wider than the columns (the right
    quarter of a square picture has room for 25 %).
    """
    (width, height), (left, right) = size, columns
    shorter = min(width, height)
    smallest, largest = round(SIDE[0] * shorter), min(round(SIDE[1] * shorter), right - left)
    side = int(rng.integers(smallest, largest + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, height - side + 1))
    return x, y, x + side, y + side


def cut_crop(picture: Image.Image, columns: tuple[int, int], seed: int) -> Image.Image:
    """One crop of the picture from these columns: a random square, mirrored half of the time.

    It is cut before it is resized, so that nothing outside of the square comes in. Squares of plain sky or
    darkness are drawn again: nothing in them tells which picture they are from.
    """
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        crop = picture.crop(draw_box(picture.size, columns, rng))
        if np.asarray(crop.convert("L")).std() >= FLAT:
            break
    side = min(max(crop.width, STORED[0]), STORED[1])
    if side != crop.width:
        crop = crop.resize((side, side), Image.Resampling.BICUBIC)
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def write_crops(source: Path, folder: Path, counts: dict[str, int], seed: int) -> None:
    """All crops of one photograph, into folder/<split>/<name of the photograph>/."""
    with Image.open(source) as file:
        picture = file.copy()
    for split, columns in regions(picture.width).items():
        target = folder / split / source.stem
        target.mkdir(parents=True)
        for i in range(counts[split]):
            crop = cut_crop(picture, columns, util.derive_seed(seed, "demo", source.stem, split, i))
            crop.save(target / f"{i:03d}.jpg", quality=QUALITY)


# ---------------------------------------------------------------------------------------- the folder


def describe(pictures: list[Path], counts: dict[str, int], seed: int) -> dict:
    """All that the folder's content depends on: equal descriptions, equal folders."""
    return {
        "pictures": {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures},
        "counts": counts,
        "seed": seed,
        "settings": [TRAIN_SHARE, *SIDE, *STORED, FLAT, TRIES, QUALITY],
    }


def described_files(description: dict) -> set[str]:
    """Relative paths of all files in a folder of this description."""
    return {MANIFEST} | {
        f"{split}/{name}/{i:03d}.jpg"
        for split, count in description["counts"].items()
        for name in description["pictures"]
        for i in range(count)
    }


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files in the folder and its sub-folders."""
    return {
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    }


def is_complete(folder: Path, description: dict) -> bool:
    """Whether the folder is there with all that it should hold; False means that it may be made (again).

    Raises UserError when anything in it was not made by this script: that would be lost.
    """
    if not folder.exists():
        return False
    present = files_below(folder) if folder.is_dir() else {""}
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ours = described_files(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        found, ours = None, set()
    if not present <= ours:
        raise util.UserError(f"{folder} holds other files than the demo's; name a new folder")
    return found == description and present == ours


def make_folder(folder: Path, pictures: list[Path], description: dict) -> None:
    """Write everything beside `folder` and rename it at the end, so that half a folder is never seen."""
    beside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        (beside / MANIFEST).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        for source in pictures:
            write_crops(source, beside, description["counts"], description["seed"])
        if folder.exists():
            shutil.rmtree(folder)
        util.rename(beside, folder)
    except OSError as error:
        raise util.UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    folder = Path(os.path.abspath(args.dir))
    pictures = sorted(PICTURES.glob("*.jpg"))
    if not pictures:
        raise util.UserError(f"there are no photographs in {PICTURES}; restore them with git checkout demo")
    description = describe(pictures, {"train": args.train, "val": args.val}, args.seed)
    content = f"{len(pictures)} classes, {len(pictures) * args.train} train + {len(pictures) * args.val} val"
    if is_complete(folder, description):
        util.say(f"demo images: {args.dir} is complete ({content})")
        return
    make_folder(folder, pictures, description)
    util.say(f"demo images: wrote {args.dir} ({content}) in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    util.run_main(main, ARGS)
