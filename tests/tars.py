"""Shards for the tests of data/shards.py and of tools/make_shards.py."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tools import make_shards

ROOT = Path(__file__).resolve().parents[1]
PICTURES = sorted((ROOT / "demo" / "pictures").glob("*.jpg"))


def write_folder(root: Path) -> Path:
    """Two classes of small JPEGs and a PNG, with names that webdataset's keys would mix up."""
    for i, picture in enumerate(PICTURES[:10]):
        path = root / ("dog" if i % 3 else "a cat") / f"{i}.{i % 2}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.open(picture).convert("RGB").resize((90 + i, 70)).save(path, quality=90)
    Image.open(PICTURES[0]).convert("RGB").resize((30, 44)).save(root / "dog" / "4.png")
    Image.open(PICTURES[1]).convert("L").resize((30, 44)).save(root / "dog" / "ü.0.PNG", "PNG")
    os.symlink(root / "dog" / "4.png", root / "dog" / os.fsdecode(b"\xff.png"))  # no UTF-8
    return root


def write(folder: Path, out: Path, *options: str) -> list[Path]:
    arguments = [str(folder), str(out / "train-%03d.tar"), "--workers", "0", *options]
    return make_shards.main(make_shards.get_parser().parse_args(arguments))


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
