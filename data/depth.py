"""Which value is white in pictures of 16 bits a sample: those of microscopes and of medicine often use 12."""

from PIL import Image

import distributed
from data.decode import FORMATS, FULL_BITS, low_bytes
from data.images import ImageList
from util import Log

BITS_PER_SAMPLE = 258  # a tag of TIFF
SAMPLE = 64  # files that are looked at, spread over the data set
FULL_RANGE = ("PPM", "JPEG2000")  # Pillow stretches them to 16 bits, by what the file says


def find_bits(images: ImageList, log: Log | None = None) -> None:
    """Set images.bits, which the pictures of 16 bits a sample use, and say it where they are fewer.

    What the files say, else their largest value rounded up to a power of two, in a sample of the files; None
    where there is no such picture.
    """
    images.bits = distributed.on_main(_largest_of_sample, images)
    if images.bits is not None and images.bits < FULL_BITS and log is not None:
        log(
            f"pictures of 16 bits a sample use {images.bits} of them: {2**images.bits - 1} is taken for white"
        )


def _largest_of_sample(images: ImageList) -> int | None:
    others = [i for i, path in enumerate(images.paths) if not path.lower().endswith((".jpg", ".jpeg"))]
    found = [_bits_of(images, i) for i in others[:: max(1, -(-len(others) // SAMPLE))]]
    return max((bits for bits in found if bits is not None), default=None)


def _bits_of(images: ImageList, i: int) -> int | None:
    """8 to 16; None for pictures of other kinds, black ones, and those that cannot be decoded."""
    try:
        with images.open(i) as file:
            image = Image.open(file, formats=FORMATS)
            with images.open(i) as again:
                low = low_bytes(image, again)
                if low is not None:
                    high = max(most for _, most in image.getextrema()[:3])
                    largest = high << 8 or max(most for _, most in low.getextrema()[:3])
            if low is not None:
                return bits_for(largest)
            if not image.mode.startswith("I"):
                return None
            if image.format in FULL_RANGE:
                return FULL_BITS
            told = image.tag_v2.get(BITS_PER_SAMPLE, (FULL_BITS,))[0] if image.format == "TIFF" else FULL_BITS
            largest = 2**told - 1 if told < FULL_BITS else int(image.getextrema()[1])
    except Exception:  # whoever decodes it tells why
        return None
    return bits_for(largest)


def bits_for(largest: int) -> int | None:
    """8 to 16 for the largest value of a picture; None for a black one."""
    return min(max(largest.bit_length(), 8), FULL_BITS) if largest > 0 else None
