"""From the bytes of a file to pixels: (3, H, W) uint8 RGB, upright."""

import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from util import UserError

try:
    import simplejpeg
except ImportError:  # without it Pillow decodes everything: the same pixels, a third slower
    simplejpeg = None

# Photographs whose shorter side reaches this may be decoded at half their size or less, on request.
LARGE_SIDE = 1024

LARGEST_FILE = 2**30  # bytes; Pillow's limit is near 2**28 pixels

FULL_BITS = 16  # of a sample, in pictures of more than 8; ImageList.bits tells where fewer are used

# Formats that Pillow opens but that are not pictures made of pixels (EPS runs another program), and stubs.
NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

Image.init()
# JPEG first: it is what most folders hold, and formats are tried in order.
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_RASTER, key=lambda name: (name != "JPEG", Image.ID.index(name))))
# Of JPEG files, which Pillow opens but does not list: several pictures in one file, and other spellings.
JPEG_TOO = {".mpo", ".jps", ".jif", ".jfi", ".pjp", ".pjpeg"}
EXTENSIONS = (
    frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS) | JPEG_TOO
)

# Pillow remarks on odd metadata and on images that are large but within its limit. Neither is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(UserError):
    """A file that cannot be decoded: `path: reason`.

    A DataLoader raises a worker's error again as type(error)(text of the whole traceback); from that one
    argument the message is found again in the last line.
    """

    def __init__(self, path: str | Path, reason: str | None = None):
        if reason is None:
            message = str(path).strip().rsplit("\n", 1)[-1].rpartition("ImageError: ")[2]
            path, _, reason = message.rpartition(": ")
        self.path = str(path)
        self.reason = reason.replace(": ", ", ")  # so that the last ": " is the one after the path
        super().__init__(f"{self.path}: {self.reason}")

    @classmethod
    def of(cls, path: str | Path, error: Exception) -> "ImageError":
        """The error that says of the file at path what went wrong."""
        return cls(path, reason_of(error))


def decode_file(path: str | Path, scaled: bool = False) -> torch.Tensor:
    """Decode an image file to (3, H, W) uint8 RGB, upright by its EXIF orientation, laid out as (H, W, 3).

    Any mode: alpha is dropped, of 16 bits a sample the upper 8 are taken, of an animation the first frame.
    Raises ImageError for a file that is no image, is truncated, or holds more pixels than Pillow's
    limit against decompression bombs (2 * Image.MAX_IMAGE_PIXELS).

    scaled: decode a JPEG with a shorter side of at least 1024 at a half, quarter or eighth of its size, so
    that 512 pixels or more remain of that side: faster, but not the same pixels. Others are not affected.
    """
    try:
        return decode_bytes(read_file(path), scaled)
    except Exception as error:  # Pillow meets hostile bytes with nearly any of them
        raise ImageError(path, reason_of(error)) from error


def read_file(path: str | Path) -> bytes:
    """A file's bytes, in the fewest calls to the system. Raises ValueError for more than LARGEST_FILE."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        check_size(size)
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def check_size(size: int) -> None:
    """Raise ValueError for so many bytes of a file where no image has as many."""
    if size > LARGEST_FILE:
        raise ValueError(f"the file has {size} bytes, more than an image that Pillow's limit lets in")


def decode_bytes(content: bytes, scaled: bool, bits: int = FULL_BITS) -> torch.Tensor:
    """`decode_file` of a file's content; of 16 bits a sample with so many in use the upper 8 of those."""
    if not content:
        raise ValueError(EMPTY)
    pixels = _decode_jpeg(content, scaled)
    if pixels is None:
        pixels = _decode_by_pillow(content, bits)
    return torch.from_numpy(pixels.transpose(2, 0, 1))


EMPTY = "the file is empty"


def reason_of(error: Exception) -> str:
    """Why a file could not be opened or decoded, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels, refused as a decompression bomb"
    return str(error).split("\n")[0] or type(error).__name__


def _decode_jpeg(jpeg: bytes, scaled: bool) -> np.ndarray | None:
    """(H, W, 3) uint8 by simplejpeg, whose pixels equal Pillow's; None for what Pillow is to decode.

    That is every other format, CMYK (simplejpeg's pixels differ by 1), bombs and irregular files: Pillow
    alone decides what is refused.
    """
    if simplejpeg is None or not jpeg.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        too_large = Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS
        if colours not in ("Gray", "YCbCr") or too_large:
            return None
        fraction = _fraction(min(height, width)) if scaled else 1
        if fraction == 1:
            pixels = simplejpeg.decode_jpeg(jpeg, strict=True)
        else:
            sides = {"min_height": -(-height // fraction), "min_width": -(-width // fraction)}
            pixels = simplejpeg.decode_jpeg(jpeg, strict=True, min_factor=fraction, **sides)
    except ValueError:
        return None
    if _has_app1(jpeg):  # Pillow reads the orientation, so that both decoders agree
        pixels = _upright(pixels, _orientation(Image.open(io.BytesIO(jpeg), formats=["JPEG"])))
    return pixels


def _fraction(short: int) -> int:
    """By how much to shrink while decoding: 1, 2, 4 or 8, the fast ones, keeping 512 of the shorter side."""
    return next((by for by in (8, 4, 2) if short >= by * LARGE_SIDE // 2), 1)


def _has_app1(jpeg: bytes) -> bool:
    """Whether a JPEG carries Exif or XMP (marker APP1, before the pixels); true also if the walk fails."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1] not in (0xDA, 0xE1, 0xFF):
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg[at : at + 2] != b"\xff\xda"


def _decode_by_pillow(content: bytes, bits: int) -> np.ndarray:
    """(H, W, 3) uint8 of any image; the first frame of an animation."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header; refuses bombs
    low = low_bytes(image, io.BytesIO(content)) if bits < FULL_BITS else None
    pixels = _to_rgb(image, bits) if low is None else upper_bits(np.asarray(image), np.asarray(low), bits)
    # The tag is read after the pixels: Pillow turns TIFF files itself while loading and then drops the tag.
    return _upright(pixels, _orientation(image))


def _to_rgb(image: Image.Image, bits: int) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode.

    Pillow clips numbers above 255 (modes I;16, I, F), which turns 16-bit pictures white. Integers are taken
    to use so many bits; floats as 0 to 255, or as 0 to 1 where none is larger.
    """
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), posinf=255.0, neginf=0.0)
        grey = np.clip(grey * 255 if grey.max() <= 1 else grey, 0, 255).astype(np.uint8)
    elif image.mode.startswith("I"):
        grey = np.clip(np.asarray(image) >> (bits - 8), 0, 255).astype(np.uint8)
    else:
        image.load()  # or it would be held twice: of RGB too convert makes a copy
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return np.repeat(grey[:, :, None], 3, axis=2)


def low_bytes(image: Image.Image, file: BinaryIO) -> Image.Image | None:
    """Of a colour picture of 16 bits a sample, whose upper bytes Pillow keeps: the picture of the lower.

    image: as opened, not loaded; file: the same file again. Read in the wrong order of bytes Pillow keeps
    the others. None for any other picture.
    """
    raw = {tile[3] if isinstance(tile[3], str) else (tile[3] or [None])[0] for tile in image.tile}
    if len(raw) != 1 or not (found := re.fullmatch("(RGB[AX]?;16)([BLN])", str(*raw))):
        return None
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[found[2]]
    low = Image.open(file, formats=FORMATS)
    for i, tile in enumerate(low.tile):
        args = found[1] + order if isinstance(tile[3], str) else (found[1] + order, *tile[3][1:])
        low.tile[i] = type(tile)(*tile[:3], args) if hasattr(tile, "_fields") else (*tile[:3], args)
    return low


def upper_bits(high: np.ndarray, low: np.ndarray, bits: int) -> np.ndarray:
    """(H, W, 3) uint8: the upper 8 of so many bits of colours in two bytes each, both (H, W, 3 or more)."""
    high, low = high[..., :3], low[..., :3]
    values = (high << (FULL_BITS - bits)) | (low >> (bits - 8))  # bytes: what is above them falls off
    values[high >> (bits - 8) > 0] = 255
    return values


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8 (1: upright, also where metadata is missing or damaged)."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, 3) pixels that were stored with this EXIF orientation upright (EXIF 2.32, tag 0x0112)."""
    if orientation in (5, 7):  # rows and columns swapped
        pixels = pixels.swapaxes(0, 1)
    clockwise = {3: 2, 6: 1, 7: 2, 8: 3}.get(orientation, 0)  # quarter turns
    pixels = np.rot90(pixels, -clockwise)
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def check_header(file: BinaryIO) -> None:
    """Raise an exception unless the buffered file begins as an image that may be decoded."""
    if not file.peek(1):
        raise ValueError(EMPTY)
    Image.open(file, formats=FORMATS)
