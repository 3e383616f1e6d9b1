"""Multi-crop: several random crops of an image, of several sizes, each with colours of its own.

Caron et al., NeurIPS 2020, section 3.2 and appendix A. By torchvision's transforms on uint8 pixels; the blur
is the true Gaussian of 23 taps that the published runs used (the code's later version approximates it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from data.crops import Transform, random_resized_crop

BLUR_TAPS = 23
BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Colours:
    """How the colours of a crop change: probabilities and strength.

    strength 1 is the paper's: brightness, contrast and saturation by up to 0.8, hue by up to 0.2.
    """

    strength: float = 1.0
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.5


def colour_transform(size: int, colours: Colours) -> list[Transform]:
    """What changes the colours of a crop of `size` pixels; a step of probability 0 is left out."""
    s, taps = colours.strength, min(BLUR_TAPS, 2 * (size // 2) - 1)
    jitter = colours.jitter if s > 0 else 0.0
    steps: list[tuple[float, Transform]] = [
        (jitter, v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)),
        (colours.grey, v2.Grayscale(num_output_channels=3)),
        (colours.blur, v2.GaussianBlur(taps, BLUR_SIGMA)),
    ]
    return [v2.RandomApply([step], p) for p, step in steps if p > 0]


class MultiCrop:
    """An image (3, H, W) uint8 -> its crops, a list of (3, S, S) uint8, the sizes in the order given.

    For each group g: counts[g] crops of sizes[g] pixels, of min_scales[g] to max_scales[g] of the area, ratio
    3/4 to 4/3; flipped or not; then `colours`. Each crop draws all of this anew. `only` makes some of them.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sizes: Sequence[int],
        min_scales: Sequence[float],
        max_scales: Sequence[float],
        colours: Colours = Colours(),
    ) -> None:
        groups = zip(counts, sizes, min_scales, max_scales, strict=True)
        self.crops: list[list[Transform]] = []
        for count, size, low, high in groups:
            crop = random_resized_crop(size, (low, high), (3 / 4, 4 / 3))
            self.crops += [[crop, *colour_transform(size, colours)]] * count

    def __len__(self) -> int:
        return len(self.crops)

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [_apply(steps, image) for steps in self.crops]


def _apply(steps: list[Transform], image: torch.Tensor) -> torch.Tensor:
    for step in steps:
        image = step(image)
    return functional.to_dtype(image, torch.uint8)
