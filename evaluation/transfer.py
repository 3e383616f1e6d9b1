"""What detection and segmentation share: the trained network as the trunk under a head for other tasks."""

from collections import OrderedDict

import torch
from torch import nn

from models.network import Network

PROBE = 224  # side of the image by which channels and strides of maps are seen


class Trunk(nn.Module):
    """Some maps of a network under other names, in float32, as torchvision's models take them.

    net loses its head and keeps its Sobel layer. freeze: the layers up to the last of the maps do not train.
    Their batch norms use, and leave alone, the statistics of the pre-training (`keep_statistics`).
    """

    def __init__(self, net: Network, maps: dict[str, str], freeze: bool) -> None:
        """maps: name of an activation -> its new name, the shallowest first."""
        super().__init__()
        net.top_layer = net.projection_head = net.prototypes = None
        self.net, self.maps = net, maps
        if freeze:
            net.split(list(maps)[-1])[0].requires_grad_(False)
        self.channels, self.strides = measure(net, list(maps))

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Normalised images (B, 3, H, W) -> maps (B, C, h, w) by their new names."""
        found = self.net.activations(x, self.maps)
        return OrderedDict((new, found[old].float()) for old, new in self.maps.items())


def measure(net: Network, maps: list[str]) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps, the strides as the nearest powers of two."""
    modes = {module: module.training for module in net.modules()}
    with torch.inference_mode():
        found = net.eval().activations(torch.zeros(1, 3, PROBE, PROBE), maps)
    for module, mode in modes.items():
        module.training = mode
    ratios = [torch.tensor(PROBE / found[name].shape[-1]) for name in maps]
    return [found[name].shape[1] for name in maps], [2 ** int(ratio.log2().round()) for ratio in ratios]


def keep_statistics(net: Network) -> None:
    """Put the batch norms of net into eval mode, whatever mode the rest is in."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def what_trains(freeze: bool, head: str) -> str:
    """In words, for the protocol."""
    return (
        f"{head} trained, the trunk frozen"
        if freeze
        else "all layers trained, batch norm scale and shift too"
    )


def colours_of(net: Network) -> str:
    """Mean and std that net's images are normalised by, for the protocol: those of its checkpoint."""
    return ", ".join(net.inputs.colours())
