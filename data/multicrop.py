"""Multi-crop: several random crops of an image, of several sizes, each with colours of its own.

Caron et al., NeurIPS 2020, section 3.2 and appendix A. The blur is the true Gaussian of 23 taps that the
published runs used (the code's later version approximates it).
"""

from collections.abc import Sequence

import torch

from data.colours import PAPERS, ColourChange, Colours
from data.crops import random_resized_crop


class MultiCrop:
    """An image (3, H, W) uint8 -> its crops, a list of (3, S, S) uint8, the sizes in the order given.

    For each group g: counts[g] crops of sizes[g] pixels, of min_scales[g] to max_scales[g] of the area, ratio
    3/4 to 4/3; flipped or not; then `colours`. Each crop draws all of this anew.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sizes: Sequence[int],
        min_scales: Sequence[float],
        max_scales: Sequence[float],
        colours: Colours = PAPERS,
    ) -> None:
        groups = zip(counts, sizes, min_scales, max_scales, strict=True)
        self.crops = [
            random_resized_crop(size, (low, high), (3 / 4, 4 / 3))
            for count, size, low, high in groups
            for _ in range(count)
        ]
        self.change = ColourChange(colours)

    def __len__(self) -> int:
        return len(self.crops)

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.change(crop(image)) for crop in self.crops]
