"""What is cut out of an image: the views of the paper and of its evaluations, with torchvision's pixels."""

import functools
from collections.abc import Callable

import torch
from torch.nn.functional import interpolate, pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

# The paper resizes the shorter side to 256 and crops 224; other sizes keep that proportion.
RESIZE_RATIO = 256 / 224

Transform = Callable[[torch.Tensor], torch.Tensor]


def _resized_side(size: int) -> int:
    """The shorter side that goes with a crop of `size` pixels: 256 for 224."""
    return round(size * RESIZE_RATIO)


def central_crop(size: int) -> Transform:
    """The paper's view for features: resize the shorter side (to 256 for 224), crop the centre."""
    return functools.partial(_central_crop, size=size)


def random_resized_crop(size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Transform:
    """A random crop of a share of the area in `scale` and a width / height in `ratio`, flipped or not."""
    return functools.partial(_random_crop, boxes=v2.RandomResizedCrop(size, scale, ratio), size=size)


def train_crop(size: int) -> Transform:
    """The paper's view for training: a random crop of 8 to 100% of the area, resized, flipped or not."""
    return random_resized_crop(size, (0.08, 1.0), (3 / 4, 4 / 3))


def voc_train_crop(size: int) -> Transform:
    """Training view of VOC classification: a random square of 10 to 50% of the area, flipped or not."""
    return random_resized_crop(size, (0.1, 0.5), (1.0, 1.0))


def probe_train_crop(size: int) -> Transform:
    """Training view of the linear probe: Resize(256), CenterCrop(256), RandomCrop(224), flip, to scale."""
    side = _resized_side(size)
    crops = [v2.CenterCrop(side), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([functools.partial(_resize, side=side), *crops])


def ten_crops(size: int) -> Transform:
    """Resize(256), then four corners and the centre, and their mirror images: (10, 3, size, size)."""
    return v2.Compose([functools.partial(_resize, side=_resized_side(size)), v2.TenCrop(size), torch.stack])


def whole_image(short: int, long: int) -> Transform:
    """The image resized to `fitted`: nothing is cut off."""
    return functools.partial(_whole_image, short=short, long=long)


def fitted(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side becomes `short`, or less: the longer is at most `long`.

    As torchvision's detectors resize, but that no side becomes 0.
    """
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


def masked_crop(size: int) -> Transform:
    """Training view of segmentation, of (4, H, W): the colours and a mask of labels, cut alike.

    As torchvision's reference: the shorter side becomes 0.5 to 2 times 520/480 of the crop's, the image is
    flipped or not, and a crop is taken, filled up with black and label 255 where the image is smaller.
    """
    return functools.partial(_masked_crop, size=size)


def colours_and_mask(short: int, long: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Test view of segmentation, of (4, H, W): [colours resized to `fitted`, the mask (1, H, W) as it is]."""
    return functools.partial(_colours_and_mask, short=short, long=long)


def segmentation_side(size: int) -> int:
    """The shorter side of whole images that goes with a segmentation crop of `size` pixels: 520 for 480."""
    return round(size * 520 / 480)


VOID = 255  # the label of pixels that do not count

# What follows gives torchvision's pixels. Decoding empties the processor's caches, so that the first call of
# anything after it costs several times what it costs in a loop of its own: there are few calls here.


def _central_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    image = _resize(image, _resized_side(size))
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def _random_crop(image: torch.Tensor, boxes: v2.RandomResizedCrop, size: int) -> torch.Tensor:
    """torchvision's RandomResizedCrop, which draws the box, and RandomHorizontalFlip."""
    box = boxes.make_params([image])
    rows = slice(box["top"], box["top"] + box["height"])
    columns = slice(box["left"], box["left"] + box["width"])
    view = _resize_to(image[:, rows, columns], size, size)
    return view.flip(-1) if torch.rand(1).item() < 0.5 else view


def _resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize the shorter side of (3, H, W) to `side`; of an image over 16 times as long as wide, its middle.

    Resized whole, a strip of 1 x 60000 pixels would take 12 GB, of which crops use next to nothing.
    """
    short, long = sorted(image.shape[1:])
    if long > 16 * short:
        keep = 16 * short
        keep += (long - keep) % 2  # the same parity, so that the middle stays the middle
        image = functional.center_crop(image, [min(keep, image.shape[1]), min(keep, image.shape[2])])
        long = keep
    length = int(side * long / short)
    return _resize_to(image, *((side, length) if image.shape[1] <= image.shape[2] else (length, side)))


def _resize_to(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (3, H, W) uint8 bilinearly with antialiasing, as torchvision's resize."""
    if image.shape[1:] == (height, width):
        return image
    if not RESIZES_UINT8:
        return functional.resize(image, [height, width])
    shape, strides = image.shape, image.stride()
    # The batch of one gets the stride of a whole image: else torch does not see that the channels lie last.
    whole = max(shape[0] * strides[0], shape[1] * strides[1], shape[2] * strides[2])
    batch = image.as_strided((1, *shape), (whole, *strides))
    return interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def _whole_image(image: torch.Tensor, short: int, long: int) -> torch.Tensor:
    return _resize_to(image, *fitted(*image.shape[1:], short, long))


def _colours_and_mask(image: torch.Tensor, short: int, long: int) -> list[torch.Tensor]:
    return [_whole_image(image[:3], short, long), image[3:]]


def _masked_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    side = segmentation_side(size)
    short = int(torch.randint(side // 2, 2 * side + 1, ()))
    height, width = fitted(*image.shape[1:], short, 16 * short)
    colours = _resize_to(image[:3], height, width)
    mask = interpolate(image[None, 3:], (height, width), mode="nearest-exact")[0]
    if torch.rand(1).item() < 0.5:
        colours, mask = colours.flip(-1), mask.flip(-1)
    missing = (0, max(size - width, 0), 0, max(size - height, 0))
    whole = torch.cat([pad(colours, missing), pad(mask, missing, value=VOID)])
    top, left = (int(torch.randint(0, side - size + 1, ())) for side in whole.shape[1:])
    return whole[:, top : top + size, left : left + size]


# On other processors torchvision computes in float32.
RESIZES_UINT8 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
