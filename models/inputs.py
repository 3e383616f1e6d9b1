"""What a network was trained to see: the side of its images, mean and standard deviation of their colours."""

from dataclasses import dataclass
from typing import Any

import torch

from util import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SWAV_STD = (0.228, 0.224, 0.225)  # of SwAV's and DeepCluster-v2's released networks and of runs of their code
PAPER_SIZE = 224  # for checkpoints that do not tell theirs

Colours = tuple[float, float, float]


@dataclass(frozen=True)
class Inputs:
    """How images are shown to a network.

    recorded: the side in pixels as its checkpoint has it, unchecked; None where it tells of none. mean, std:
    of red, green and blue in 0..1.
    """

    recorded: Any = None
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD

    def size(self, asked: int | None = None) -> int:
        """The side to show images at: the one asked for, else as in training, else 224.

        Raises UserError for a record that no run has.
        """
        return asked or setting({"image_size": self.recorded}, "image_size", range(16, 4097), PAPER_SIZE)

    def tell(self, asked: int | None = None) -> str:
        """One line: size and colours, and where they are from."""
        source = "as in the checkpoint" if self.recorded is not None else "the checkpoint does not tell"
        source = "--image-size" if asked else source
        mean, std = self.colours()
        return f"images at {self.size(asked)} px ({source}), mean {mean}, std {std}"

    def colours(self) -> tuple[str, str]:
        """Mean and std in words."""
        return tuple(" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))

    def state_dict(self) -> dict[str, list[float]]:
        """Mean and std, for a checkpoint; the size stands among its settings."""
        return {"mean": list(self.mean), "std": list(self.std)}


def inputs_of(state: dict[str, Any], weights: dict[str, torch.Tensor], path: Any) -> Inputs:
    """What a checkpoint's dict tells; weights: its parameters by our names.

    Runs that do not tell mean and std had ImageNet's. Files of others that hold a projection head are of
    SwAV's code, whose std of red is 0.228. Raises UserError for mean and std that cannot be.
    """
    run = state.get("args")
    if not isinstance(run, dict):
        swav = any(name.startswith("projection_head.") for name in weights)
        return Inputs(std=SWAV_STD) if swav else Inputs()
    told = state.get("inputs", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    try:
        mean, std = (tuple(float(value) for value in told[name]) for name in ("mean", "std"))
        possible = len(mean) == len(std) == 3 and all(0 <= x <= 1 for x in mean + std) and min(std) > 0
    except (KeyError, TypeError, ValueError):
        possible = False
    if not possible:
        raise UserError(f"{path}: damaged, its inputs are not a mean and a std of three colours")
    return Inputs(recorded_size(run), mean, std)


def recorded_size(run: dict[str, Any]) -> Any:
    """The side of the images in the settings of a run, of several crops the largest; None: it tells none."""
    crops = run.get("size_crops")
    whole = isinstance(crops, list) and crops and all(type(side) is int for side in crops)
    size = run.get("image_size")
    return max(crops) if size is None and whole else size


def setting(run: dict[str, Any], name: str, possible: range, default: int) -> int:
    """A number among a run's settings; UserError for one that cannot be."""
    value = default if run.get(name) is None else run[name]
    if type(value) is not int or value not in possible:
        raise UserError(
            f"--{name.replace('_', '-')}: the run's own is {str(value)[:20]!r}, not a number from "
            f"{possible.start} to {possible.stop - 1}; give it as a flag"
        )
    return value
