"""The networks of the paper: `build("alexnet", sobel=True, num_clusters=10000)`."""

from models.alexnet import alexnet
from models.trunk import FEATURE, FEATURE_DIM, DeepClusterNet
from models.vgg16 import vgg16
from util import UserError

ARCHITECTURES = {"alexnet": alexnet, "vgg16": vgg16}

__all__ = ["ARCHITECTURES", "FEATURE", "FEATURE_DIM", "DeepClusterNet", "build"]


def build(arch: str, sobel: bool, num_clusters: int | None = None, seed: int | None = None) -> DeepClusterNet:
    """A freshly initialised network; num_clusters None leaves out the head.

    seed fixes the initial weights whatever happened before. Raises UserError for an unknown arch.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"--arch {arch}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch](sobel, num_clusters, seed)
