"""Which feature map of a network the pictures are of, and how files are named after it."""

import re

from torch import nn

from features import layer_shape
from models.network import Network
from util import UserError


def choose_map(net: Network, conv: int, layer: str | None) -> str:
    """The map that --layer, else --conv names: `conv<N>`; --conv 1 is any network's first map.

    Raises UserError where the network has no such map.
    """
    if layer is not None:
        name, flag = layer, f"--layer {layer}"
    else:
        name, flag = net.maps[0] if conv == 1 else f"conv{conv}", f"--conv {conv}"
    if name not in net.maps:
        raise UserError(f"{flag}: {net.arch} has the maps {', '.join(net.maps)}; name one with --layer")
    return name


def file_stem(name: str) -> str:
    """What the files of a map start with: layer5 for conv5, layer3 for layer3, layera for a."""
    return "layer" + re.sub("^(conv|layer)", "", name)


def width(net: Network, name: str, size: int) -> int:
    """Number of filters of a map, of images of size x size pixels."""
    return layer_shape(net, name, size)[0]


def first_conv(net: Network) -> nn.Conv2d:
    """The first convolution behind Sobel, if there is one."""
    convolutions, _ = net.parts()
    return next(module for module in convolutions.modules() if isinstance(module, nn.Conv2d))
