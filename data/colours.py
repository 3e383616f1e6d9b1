"""How the colours of a crop change: jitter, grey, blur, with torchvision's draws and pixels, in less time.

Pixels are whole numbers in float32 while the steps follow one another, so that each step rounds as
torchvision's does on uint8; the blur is two products of matrices.
"""

import functools
from dataclasses import dataclass

import torch
from torchvision.transforms import v2

BLUR_TAPS = 23
BLUR_SIGMA = (0.1, 2.0)
GREY = (0.2989, 0.587, 0.114)  # of red, green, blue


@dataclass(frozen=True)
class Colours:
    """How the colours of a crop change: probabilities and strength.

    strength 1 is the paper's: brightness, contrast and saturation by up to 0.8, hue by up to 0.2.
    """

    strength: float = 1.0
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.5


PAPERS = Colours()


class ColourChange:
    """A crop (3, S, S) uint8 -> the crop in other colours; what has probability 0 is left out.

    Draws what RandomApply of torchvision's ColorJitter, Grayscale and GaussianBlur, in this order, would.
    """

    def __init__(self, colours: Colours) -> None:
        s = colours.strength
        self.jitter, self.grey, self.blur = colours.jitter if s > 0 else 0.0, colours.grey, colours.blur
        self._jitter = v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)

    def __call__(self, crop: torch.Tensor) -> torch.Tensor:
        x = None  # the pixels as floats, once something changes them
        if self._drawn(self.jitter):
            x = jittered(as_floats(crop), **self._jitter.make_params([]))
        if self._drawn(self.grey):
            x = as_floats(crop) if x is None else x
            x = grey_of(x).expand(x.shape)
        if self._drawn(self.blur):
            sigma = torch.empty(1).uniform_(*BLUR_SIGMA).item()
            x = blurred(as_floats(crop) if x is None else x, sigma)
        return crop if x is None else x.to(torch.uint8)

    def _drawn(self, probability: float) -> bool:
        return probability > 0 and torch.rand(1).item() < probability


def as_floats(crop: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W), however it lies in memory -> float32, a plane after the other."""
    return crop.contiguous().float()


def grey_of(x: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (H, W)."""
    r, g, b = x
    return r.mul(GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).floor_()


def jittered(
    x: torch.Tensor,
    fn_idx: torch.Tensor,
    brightness_factor: float,
    contrast_factor: float,
    saturation_factor: float,
    hue_factor: float,
) -> torch.Tensor:
    """The four changes of (3, H, W) in the order fn_idx of torchvision's ColorJitter, in place."""
    for which in fn_idx.tolist():
        if which == 0:
            x.mul_(brightness_factor)
        elif which == 1:
            mean = grey_of(x).mean().item()
            x.mul_(contrast_factor).add_(mean * (1 - contrast_factor))
        elif which == 2:
            grey = grey_of(x)
            x.mul_(saturation_factor).add_(grey, alpha=1 - saturation_factor)
        else:
            x = with_hue(x, hue_factor)
            continue
        x.clamp_(0, 255).floor_()
    return x


def with_hue(x: torch.Tensor, factor: float) -> torch.Tensor:
    """(3, H, W) with the hue turned by `factor` of a circle; saturation and value of HSV stay."""
    r, g, b = x
    top, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    # In sixths of a circle, from red at 0; without chroma anything will do.
    hue = torch.where(top == r, g - b, torch.where(top == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue.div_(chroma.clamp(min=1)).add_(6 * factor)
    hue.sub_((hue / 6).floor_(), alpha=6)
    out = torch.empty_like(x)
    torch.sub(hue, 3, out=out[0]).abs_().sub_(1)
    torch.sub(hue, 2, out=out[1]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=out[2]).abs_().neg_().add_(2)
    out.clamp_(0, 1).mul_(chroma).add_(low)
    return out.mul_(255.999 / 255).floor_()  # as torchvision brings [0, 1] to 0 .. 255


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """(3, S, S) convolved with a Gaussian of BLUR_TAPS taps, mirrored at the border; rounded."""
    size = x.shape[-1]
    taps = min(BLUR_TAPS, 2 * (size // 2) - 1)
    offsets = torch.arange(taps) - taps // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, taps)
    rows = torch.zeros(size, size).scatter_add_(1, _mirrored(size, taps), weights)
    along = (x.reshape(-1, size) @ rows.T).view(3, size, size)
    return torch.matmul(rows, along).round_()


@functools.cache
def _mirrored(size: int, taps: int) -> torch.Tensor:
    """Which pixels the taps around each pixel of a row take, (size, taps) int64."""
    places = torch.arange(size)[:, None] + torch.arange(taps) - taps // 2
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)
