"""Semantic segmentation on a VOC folder: images with masks, FCN by torchvision on a network, mean IoU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from data import VOID, ImageError, ImageList
from evaluation.transfer import Trunk, keep_statistics
from evaluation.voc import check_files, check_folders, mean, read_names
from models.network import Network

FOLDERS = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass")
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
DILATED = ("layer3", "layer4")  # stages of a ResNet that keep the size of their map, as torchvision's FCN

# ---------------------------------------------------------------------------------------- the data set


class MaskedImages(ImageList):
    """Images with a mask each: image i is (4, H, W) uint8, RGB and the label of every pixel.

    Labels are 0 (background) to 20, or VOID. name: of the list; masks: the folder of their PNG files.
    """

    def __init__(self, vocdir: Path, split: str, names: list[str]) -> None:
        super().__init__(vocdir / "JPEGImages", [f"{name}.jpg" for name in names])
        self.masks, self.split = vocdir / "SegmentationClass", split
        self.name = str(vocdir)

    def mask_path(self, i: int) -> Path:
        """The file of mask i."""
        return self.masks / Path(self.paths[i]).with_suffix(".png")

    def decode(self, i: int) -> torch.Tensor:
        """Raises ImageError where image or mask cannot be read, or do not belong together."""
        image, path = super().decode(i), self.mask_path(i)
        try:
            mask = read_mask(path)
        except Exception as error:  # Pillow meets hostile bytes with nearly any of them
            raise ImageError.of(path, error) from error
        if mask.shape != image.shape[1:]:
            raise ImageError(
                path,
                f"{mask.shape[1]} x {mask.shape[0]} pixels, its image {image.shape[2]} x {image.shape[1]}",
            )
        return torch.cat([image, torch.from_numpy(mask)[None]])


def read_mask(path: Path) -> np.ndarray:
    """Labels (H, W) uint8 of a mask: the indexes into its palette, or its grey values.

    Raises ValueError for colours without a palette and for labels that VOC does not have.
    """
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}, not the indexes of a palette")
        mask = np.array(image)
    wrong = np.setdiff1d(mask, [*range(len(CLASSES)), VOID])
    if len(wrong):
        raise ValueError(f"label {wrong[0]}, not 0 to {len(CLASSES) - 1} or {VOID} (void)")
    return mask


def open_masks(vocdir: str | Path) -> tuple[MaskedImages, MaskedImages]:
    """The images of train and of val. Raises UserError for a missing folder, list, image or mask."""
    vocdir = Path(vocdir)
    check_folders(vocdir, *FOLDERS)
    found = []
    for split in ("train", "val"):
        path = vocdir / "ImageSets" / "Segmentation" / f"{split}.txt"
        check_files([path], vocdir)
        images = MaskedImages(vocdir, split, read_names(path))
        check_files([images.path(i) for i in range(len(images))], path.name)
        check_files([images.mask_path(i) for i in range(len(images))], path.name)
        found.append(images)
    return tuple(found)


# ---------------------------------------------------------------------------------------- the network


class Segmenter(nn.Module):
    """A fully convolutional head by torchvision on the last map of net: Long et al., CVPR 2015.

    The last two stages of a ResNet are dilated instead of halved. freeze: the head trains alone. Batch norms
    of net use and keep their statistics; the head has one of its own.
    """

    def __init__(self, net: Network, freeze: bool, seed: int) -> None:
        super().__init__()
        dilate(net)
        net.split(net.maps[-1])[1].requires_grad_(False)  # what nothing here stands on
        self.trunk = Trunk(net, {net.maps[-1]: "out"}, freeze)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = FCNHead(self.trunk.channels[0], len(CLASSES))

    @property
    def net(self) -> Network:
        """The network at the bottom."""
        return self.trunk.net

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        keep_statistics(self.net)
        return self

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, 21, *size), bilinearly from the map's."""
        logits = self.head(self.trunk(x)["out"]).float()
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def dilate(net: Network) -> None:
    """Let the stages DILATED, where net has them, keep the size of their map: strides become dilations.

    Every value that the map had is still there, at every so many rows and columns.
    """
    rate = 1
    for stage in (getattr(net, name) for name in DILATED if name in net.maps):
        strided = False
        for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
            sides, stride = conv.kernel_size, conv.stride[0]
            conv.stride = (1, 1)
            if sides != (1, 1):
                conv.dilation = (rate, rate)
                conv.padding = tuple(rate * (side // 2) for side in sides)
            if stride > 1 and not strided:  # the shortcut beside has the same stride
                rate, strided = rate * stride, True


def segmentation_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, C, H, W), the mean over an image's pixels that count, summed over images.

    mask (B, H, W) int64; VOID counts nowhere, and an image of nothing else adds 0.
    """
    each = F.cross_entropy(logits, mask, ignore_index=VOID, reduction="none").sum((1, 2))
    return (each / (mask != VOID).sum((1, 2)).clamp(min=1)).sum()


# ---------------------------------------------------------------------------------------- mean IoU


def count_pixels(predicted: torch.Tensor, mask: torch.Tensor, classes: int = len(CLASSES)) -> torch.Tensor:
    """(classes, classes) int64: pixels of each class (row) that were taken for each (column), without VOID.

    predicted and mask: labels of one shape.
    """
    counts = mask != VOID
    pairs = mask[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)


def mean_iou(pixels: torch.Tensor, class_names: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """IoU of each class over all pixels of the set, their mean, and the share of right pixels, in percent.

    pixels: as `count_pixels` gives, summed. A class without a pixel in the masks has none (None) and is left
    out of the mean.
    """
    pixels = pixels.double()
    right, there, taken = pixels.diag(), pixels.sum(1), pixels.sum(0)
    iou = (100 * right / (there + taken - right)).tolist()
    by_class = {name: value if n else None for name, value, n in zip(class_names, iou, there.tolist())}
    accuracy = (100 * right.sum() / pixels.sum()).item() if pixels.sum() else None
    return {"unit": "percent", "mIoU": mean(by_class), "pixel accuracy": accuracy, "IoU": by_class}
