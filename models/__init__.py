"""The networks, by name: `build("alexnet", sobel=True, num_clusters=10000)`; `load(path)` from a file."""

from collections.abc import Callable
from functools import partial

from models import alexnet, resnet, vgg16
from models.network import Network
from util import UserError

# name -> function of (sobel, seed) that gives the network without a head
ARCHITECTURES: dict[str, Callable[..., Network]] = {
    "alexnet": alexnet.build,
    "vgg16": vgg16.build,
    "vgg16wide": partial(vgg16.build, wide=True),
    "resnet18": resnet.resnet18,
    "resnet18s": partial(resnet.resnet18, small=True),
    "resnet50": resnet.resnet50,
    "resnet50w2": partial(resnet.resnet50, width=2),
    "resnet50w4": partial(resnet.resnet50, width=4),
    "resnet50w5": partial(resnet.resnet50, width=5),
    "vgg16folded": vgg16.folded_vgg16,
}

__all__ = ["ARCHITECTURES", "Network", "build"]


def build(
    arch: str, sobel: bool = False, num_clusters: int | None = None, seed: int | None = None
) -> Network:
    """A freshly initialised network; num_clusters None leaves out the head.

    seed fixes the initial weights whatever happened before. Raises UserError for an unknown arch.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"--arch {arch}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    net = ARCHITECTURES[arch](sobel=sobel, seed=seed)
    if num_clusters is not None:
        net.set_head(num_clusters, seed)
    return net
