"""What stands between an activation and its classifier: the poolings of the linear probes."""

import math

from torch import nn

from util import UserError

# AlexNet's average pooling at 224 pixels as the authors have it: (window = stride, padding).
ALEXNET_POOLING = {"conv1": (6, 3), "conv2": (4, 0), "conv3": (3, 1), "conv4": (3, 1), "conv5": (2, 0)}
# VGG-16's in DeeperCluster, window = stride, no padding: its probe of conv1, conv2 ... conv13.
VGG_WINDOWS = (18, 18, 14, 14, 9, 9, 9, 6, 6, 6, 3, 3, 3)
SWAV_WINDOW = 6  # of stride 1, on a ResNet's last map
MAX_VALUES = 10_000  # of `grid`: the largest square of a pooled map under this


def make_pooling(
    arch: str, layer: str, shape: tuple[int, ...], how: str = "grid", last: str = ""
) -> nn.Module:
    """The pooling of one activation, (C, H, W) or (D,), of a network. Vectors stay as they are.

    how: one of POOLINGS. last: the name of the network's last map. Raises UserError for a layer that `how`
    does not know.
    """
    return nn.Identity() if len(shape) == 1 else POOLINGS[how](arch, layer, shape, last)


def grid(arch: str, layer: str, shape: tuple[int, ...], last: str = "") -> nn.Module:
    """AlexNet at 224 pixels: the authors' windows (padding counts as zeros).

    They leave 9600 or 9216 values, the largest squares under 10,000. Other networks, and AlexNet at sizes
    where the windows would leave another number: adaptive average pooling to the largest square under 10,000,
    not larger than the map. (At 64 pixels the windows would see 4 x 4 of conv 2's 7 x 7 places.)
    """
    channels, side = shape[0], min(shape[1:])
    largest = max(math.isqrt((MAX_VALUES - 1) // channels), 1)
    if arch == "alexnet":
        window, padding = ALEXNET_POOLING[layer]
        if (side + 2 * padding - window) // window + 1 == largest:
            return nn.AvgPool2d(window, window, padding)
    return nn.AdaptiveAvgPool2d(min(side, largest))


def windows(arch: str, layer: str, shape: tuple[int, ...], last: str = "") -> nn.Module:
    """DeeperCluster's windows on VGG-16, what is left at the border cut off; a smaller map is one window."""
    number = int(layer.removeprefix("conv")) if layer.removeprefix("conv").isdecimal() else 0
    if not arch.startswith("vgg16") or not number:
        raise UserError(
            f"--pooling windows: made for VGG-16's convolutions, not {layer} of {arch}; give grid"
        )
    return nn.AvgPool2d(min(VGG_WINDOWS[number - 1], *shape[1:]))


def whole(arch: str, layer: str, shape: tuple[int, ...], last: str = "") -> nn.Module:
    """The mean of each channel."""
    return nn.AdaptiveAvgPool2d(1)


def overlapping(arch: str, layer: str, shape: tuple[int, ...], last: str = "") -> nn.Module:
    """SwAV's: windows of 6 x 6 at every place of the last map (224 pixels: 2 x 2); others as `grid`."""
    if layer != last:
        return grid(arch, layer, shape)
    return nn.AvgPool2d(min(SWAV_WINDOW, *shape[1:]), stride=1)


POOLINGS = {"grid": grid, "windows": windows, "global": whole, "overlapping": overlapping}
