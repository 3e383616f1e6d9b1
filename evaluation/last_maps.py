"""Photographs at their own size, whole or inside the box of a query -> a network's last map of each.

Pixels as the paper's code has them: Pillow's decoder and its bilinear resize, and no turn by EXIF, because
the boxes of queries are in pixels of the file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.models import VGG16_Weights, vgg16

from data import FORMATS, IMAGENET_MEAN, Batch, ImageError, ImageList, make_loader
from features import Pass, activations_of
from models import weights
from models.network import Network
from util import UserError

PRETRAINED = "pretrained"  # the name of torchvision's supervised VGG-16
SMALLEST_SIDE = 16  # pixels: what the convolutions need; a smaller view is padded
MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # nearly 0 once it is normalised


@dataclass(frozen=True)
class Item:
    """An image to describe: whole, or only its box (x min, y min, x max, y max) in pixels of the file."""

    path: Path
    box: tuple[float, float, float, float] | None = None


def stamps_digest(items: Sequence[Item]) -> str:
    """Hex SHA-256 that changes when one of the files does: its size or its times."""
    stamps = ImageList(Path(), [str(item.path) for item in items]).stamps()
    return hashlib.sha256(stamps.tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------- pixels


def open_rgb(path: Path) -> Image.Image:
    """The pixels of a file as they lie in it. Raises ImageError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow meets damaged bytes with nearly any of them
        raise ImageError.of(path, error) from error


def resized_view(item: Item, image: Image.Image, size: int) -> torch.Tensor:
    """The longer side brought to `size`, then the item's box, scaled alike, cut out: (3, H, W) uint8.

    A view below SMALLEST_SIDE is padded to the right and below. Raises ImageError for a box without a pixel.
    """
    factor = size / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    if item.box is not None:
        left, top, right, bottom = (round(value * factor) for value in item.box)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if left >= right or top >= bottom:
            raise ImageError(item.path, f"the box {item.box} of its query holds no pixel")
        resized = resized.crop((left, top, right, bottom))
    if min(resized.size) < SMALLEST_SIDE:
        padded = Image.new("RGB", tuple(max(side, SMALLEST_SIDE) for side in resized.size), MEAN_COLOUR)
        padded.paste(resized)
        resized = padded
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


class Views(Dataset):
    """Item i: (views (3, H, W) uint8 of items[i], one for each size, i), or (None, i) for a broken one."""

    def __init__(self, items: Sequence[Item], sizes: Sequence[int]):
        self.items, self.sizes = items, sizes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[list[torch.Tensor] | None, int]:
        try:
            return self.views(i), i
        except ImageError:
            return None, i

    def views(self, i: int) -> list[torch.Tensor]:
        """Raises ImageError for an image that cannot be decoded, and for a box without a pixel."""
        image = open_rgb(self.items[i].path)
        return [resized_view(self.items[i], image, size) for size in self.sizes]


# ---------------------------------------------------------------------------------------- maps


def last_maps(
    net: Network, items: Sequence[Item], sizes: Sequence[int], how: Pass
) -> Iterator[list[torch.Tensor]]:
    """For each item its last maps (C, h, w) float32 on the device, one for each size.

    One image a batch, for their sizes differ. net is on the device. Raises ImageError for the first one that
    cannot be decoded: a figure without it would be of another benchmark.
    """
    layer = net.maps[-1]
    passes = activations_of(net, [layer], single_views(items, sizes, how), how.device, how.precision)
    maps = (found[layer][0] for found, _ in passes)
    while of_image := list(islice(maps, len(sizes))):
        yield of_image


def single_views(items: Sequence[Item], sizes: Sequence[int], how: Pass) -> Iterator[Batch]:
    """A batch for each size of each item."""
    views = Views(items, sizes)
    for batch in make_loader(views, 1, min(how.workers, len(items)), how.device):
        for i in batch.broken:
            views.views(i)  # says what is wrong
            raise ImageError(items[i].path, "could not be read for a moment, call again")
        for view in batch.views:
            yield batch._replace(views=view)


def open_model(name: str | None, device: torch.device) -> Network:
    """The network of a checkpoint, of random:ARCH or of torchvision ('pretrained'), on the device."""
    if not name:
        raise UserError(f"--model is missing: give a checkpoint, or '{PRETRAINED}' for torchvision's VGG-16")
    net = pretrained_vgg16() if name == PRETRAINED else weights.load(name)
    return net.to(device, memory_format=torch.channels_last)


def pretrained_vgg16() -> Network:
    """The convolutions of torchvision's VGG-16, trained with ImageNet's labels, up to the last ReLU."""
    found = VGG16_Weights.IMAGENET1K_V1
    try:
        supervised = vgg16(weights=found, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"--model {PRETRAINED}: torchvision's VGG-16 cannot be had here ({reason}); "
            f"put {found.url} into {folder}, or give a checkpoint"
        ) from error
    layers = supervised.features[:-1]  # without the last pooling
    last = "conv13"
    return Network(
        "torchvision's vgg16",
        {"features": layers},
        {f"features.{len(layers) - 1}": last},
        maps=[last],
        feature=last,
        output=last,
        feature_dim=512,
        convs=1,
    ).eval()


def model_digest(name: str) -> str:
    """What identifies the weights: the hex SHA-256 of the file; the name of those that need none."""
    if name == PRETRAINED:
        return str(VGG16_Weights.IMAGENET1K_V1)
    if name.startswith("random:"):
        return name
    if not Path(name).is_file():
        raise UserError(f"{name}: no such checkpoint file")
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
