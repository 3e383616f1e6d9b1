"""From image files to tensors: folders, decoding, crops, the two views of a data set, normalisation.

An image list names the files in a fixed order; image i is the i-th of it everywhere. Items are uint8 and
carry their index: labels live in the main process as one array, gathered by index, so no worker holds them.
"""

import functools
import hashlib
import io
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from util import UserError, derive_seed

if TYPE_CHECKING:
    from cache import CropCache

try:
    import simplejpeg
except ImportError:  # without it Pillow decodes everything: the same pixels, a third slower
    simplejpeg = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The paper resizes the shorter side to 256 and crops 224; other sizes keep that proportion.
RESIZE_RATIO = 256 / 224

# Photographs whose shorter side reaches this may be decoded at half their size or less, on request.
LARGE_SIDE = 1024

# Formats that Pillow opens but that are not pictures made of pixels (EPS runs another program), and stubs.
NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

Image.init()
# JPEG first: it is what most folders hold, and formats are tried in order.
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_RASTER, key=lambda name: (name != "JPEG", Image.ID.index(name))))
EXTENSIONS = frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS)

# Pillow remarks on odd metadata and on images that are large but within its limit. Neither is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ---------------------------------------------------------------------------------------- lists of images


class PackedPaths(Sequence[str]):
    """Strings in one bytes object; a list of a million `str` gets copied, page by page, into each worker."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]])

    def digest(self) -> str:
        """Hex SHA-256 of the strings in order."""
        return hashlib.sha256(self._bytes + self._ends.astype("<i8").tobytes()).hexdigest()


class ImageList:
    """The images of a data set in a fixed order.

    root: folder the paths start from; paths: N relative paths; classes: (N,) int64 ids into class_names, or
    None where the folder has none. Classes serve logs and evaluations; DeepCluster never trains on them.
    scaled, False unless set: decode large photographs at a fraction of their size (see `decode`).
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        classes: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ):
        self.root = root
        self.paths = PackedPaths(paths)
        self.classes = classes
        self.class_names = class_names
        self.scaled = False

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        """The full path of image i."""
        return self.root / self.paths[i]

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i as a buffered file."""
        return open(self.path(i), "rb")

    def read(self, i: int) -> bytes:
        """The bytes of image i."""
        return _read(os.path.join(self.root, self.paths[i]))

    def stamps(self) -> np.ndarray:
        """(N, 3) int64 that change when a file does: its size, mtime and ctime (ns); -1 where it is gone."""
        stamps = np.full((len(self), 3), -1, dtype=np.int64)
        for i in range(len(self)):
            try:
                status = os.stat(os.path.join(self.root, self.paths[i]))
            except OSError:
                continue
            stamps[i] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return stamps

    def decode(self, i: int) -> torch.Tensor:
        """Image i as `decode` gives it: (3, H, W) uint8 RGB, upright. Raises ImageError."""
        try:
            return _decode(self.read(i), self.scaled)
        except Exception as error:
            raise ImageError(self.path(i), _reason(error)) from error

    def keep(self, mask: np.ndarray) -> "ImageList":
        """The images where mask (N,) bool is true, in the same order; class ids keep their meaning."""
        mask = np.asarray(mask, dtype=bool)
        kept = [self.paths[i] for i in np.flatnonzero(mask)]
        classes = None if self.classes is None else self.classes[mask]
        images = ImageList(self.root, kept, classes, self.class_names)
        images.scaled = self.scaled
        return images

    def digest(self) -> str:
        """Hex digest of the relative paths in order: equal exactly when image i means the same file."""
        return self.paths.digest()


def list_images(source: str | Path) -> ImageList:
    """List the images of a folder, or those that a text file names (one path a line).

    In a folder: every file with an ending that Pillow reads, sub-folders and linked folders included, hidden
    ones left out, in the order of torchvision's ImageFolder (class folder, then folder, then file name). In a
    text file: its order; paths are absolute or relative to its folder; blank lines and lines starting with #
    are skipped. Classes are the first-level sub-folders if there are two or more and no image lies beside
    them.

    Raises UserError if the source does not exist, holds no image, or names files that do not exist.
    """
    source = Path(source)
    if source.is_dir():
        root, paths = source, _scan(source)
        if not paths:
            raise UserError(
                f"no image found in {source}: looked there and in all its sub-folders for files ending in "
                f".jpg, .png or another of the {len(EXTENSIONS)} endings Pillow reads (hidden files left out)"
            )
    elif source.exists():
        root, paths = _read_path_list(source)
    else:
        raise UserError(f"{source} does not exist (expected a folder of images or a text file of paths)")
    return ImageList(root, paths, *classes_of(paths))


def _scan(root: Path) -> list[str]:
    """Relative paths of all images under root, in ImageFolder's order."""
    found = list(_walk(str(root), "", frozenset()))
    found.sort(key=lambda entry: (entry[0].split("/", 1)[0], entry[0]))
    return [f"{folder}/{name}" if folder else name for folder, names in found for name in names]


def _walk(root: str, folder: str, above: frozenset) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to root, sorted image names in it) for every folder that holds images.

    Linked folders are followed; `above` holds the (device, inode) of the folders on the way down, and one
    that is met again below itself ends the descent.
    """
    here = os.path.join(root, folder)
    try:
        status = os.stat(here)
        with os.scandir(here) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {here}: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    names = sorted(entry.name for entry in entries if _looks_like_image(entry))
    if names:
        yield folder, names
    for entry in entries:
        if entry.is_dir():
            below = f"{folder}/{entry.name}" if folder else entry.name
            yield from _walk(root, below, above | {identity})


def _looks_like_image(entry: os.DirEntry) -> bool:
    """Whether an entry is an image by its ending; a dangling link counts, to be reported as broken."""
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        return False
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def _read_path_list(source: Path) -> tuple[Path, list[str]]:
    """The common folder of the files that a text file names, and their paths relative to it."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is neither a folder nor a text file of paths that can be read") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{source} names no image (expected a path a line)")
    folder = os.path.abspath(source.parent)
    full = [os.path.normpath(os.path.join(folder, line)) for _, line in lines]
    missing = [i for i, path in enumerate(full) if not os.path.isfile(path)]
    if missing:
        number, line = lines[missing[0]]
        raise UserError(
            f"{source} names {len(missing)} file(s) that do not exist, the first is {line} (line {number})"
        )
    root = os.path.commonpath([os.path.dirname(path) for path in full])
    return Path(root), [path[len(root) :].lstrip("/") for path in full]


def classes_of(paths: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Class ids (N,) int64 and sorted class names from relative paths; (None, None) where there are none.

    Classes are the first-level folders, if there are two or more and no path lies beside them.
    """
    first = [path.split("/", 1)[0] if "/" in path else "" for path in paths]
    names = sorted(set(first))
    if len(names) < 2 or names[0] == "":
        return None, None
    ids = {name: i for i, name in enumerate(names)}
    return np.array([ids[name] for name in first], dtype=np.int64), names


# ---------------------------------------------------------------------------------------- decoding


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


def decode(path: str | Path, scaled: bool = False) -> torch.Tensor:
    """Decode an image file to (3, H, W) uint8 RGB, upright by its EXIF orientation, laid out as (H, W, 3).

    Any mode: alpha is dropped, 16-bit content is brought to 8 bit by >> 8, of an animation the first frame is
    taken. Raises ImageError for a file that is no image, is truncated, or holds more pixels than Pillow's
    limit against decompression bombs (2 * Image.MAX_IMAGE_PIXELS).

    scaled: decode a JPEG with a shorter side of at least 1024 at a half, quarter or eighth of its size, so
    that 512 pixels or more remain of that side: faster, but not the same pixels. Others are not affected.
    """
    try:
        return _decode(_read(path), scaled)
    except Exception as error:  # Pillow meets hostile bytes with nearly any of them
        raise ImageError(path, _reason(error)) from error


def _read(path: str | Path) -> bytes:
    """A file's bytes, in the fewest calls to the system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _decode(content: bytes, scaled: bool) -> torch.Tensor:
    """`decode` of a file's content."""
    if not content:
        raise ValueError(EMPTY)
    pixels = _decode_jpeg(content, scaled)
    if pixels is None:
        pixels = _decode_by_pillow(content)
    return torch.from_numpy(pixels.transpose(2, 0, 1))


EMPTY = "the file is empty"


def _reason(error: Exception) -> str:
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


def _decode_by_pillow(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of any image; the first frame of an animation."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header; refuses bombs
    pixels = _to_rgb(image)
    # The tag is read after the pixels: Pillow turns TIFF files itself while loading and then drops the tag.
    return _upright(pixels, _orientation(image))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode.

    Pillow clips numbers above 255 (modes I;16, I, F), which turns 16-bit pictures white. Integers are taken
    as 16-bit; floats as 0 to 255, or as 0 to 1 where none is larger.
    """
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), posinf=255.0, neginf=0.0)
        grey = np.clip(grey * 255 if grey.max() <= 1 else grey, 0, 255).astype(np.uint8)
    elif image.mode.startswith("I"):
        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(grey[:, :, None], 3, axis=2)


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


def check_headers(images: ImageList, workers: int) -> list[tuple[int, str]]:
    """Open the header of every file: (index, reason) of those that are no image, empty, or bombs, in order.

    Cheap next to decoding, and therefore blind to damage further on. workers: number of threads.
    """

    def check(start: int) -> list[tuple[int, str]]:
        broken = []
        for i in range(start, min(start + 1000, len(images))):
            try:
                with images.open(i) as file:
                    if not file.peek(1):
                        raise ValueError(EMPTY)
                    Image.open(file, formats=FORMATS)
            except Exception as error:
                broken.append((i, ImageError(images.path(i), _reason(error)).reason))
        return broken

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [found for part in pool.map(check, range(0, len(images), 1000)) for found in part]


def cannot_decode(images: ImageList, bad: list[tuple[int, str]], listed_in: str | Path) -> UserError:
    """The error that names the first of the bad images (index, reason) and the file that lists them all."""
    some = "; ".join(f"{images.path(i)}: {reason}" for i, reason in bad[:10])
    more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    return UserError(
        f"{len(bad)} of {len(images)} images cannot be decoded ({some}{more}), listed in {listed_in}; mend "
        "or remove them, or leave them out with --skip-bad-images"
    )


def broken_reason(images: ImageList, i: int) -> str | None:
    """Decode image i again and say why it cannot be decoded; None if it can."""
    try:
        images.decode(i)
    except ImageError as error:
        return error.reason
    return None


# ---------------------------------------------------------------------------------------- crops

Transform = Callable[[torch.Tensor], torch.Tensor]


def _resized_side(size: int) -> int:
    """The shorter side that goes with a crop of `size` pixels: 256 for 224."""
    return round(size * RESIZE_RATIO)


def central_crop(size: int) -> Transform:
    """The paper's view for features: resize the shorter side (to 256 for 224), crop the centre."""
    return functools.partial(_central_crop, size=size)


def train_crop(size: int) -> Transform:
    """The paper's view for training: a random crop of 8 to 100% of the area, resized, flipped or not."""
    return functools.partial(_random_crop, size=size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))


def voc_train_crop(size: int) -> Transform:
    """Training view of VOC classification: a random square of 10 to 50% of the area, flipped or not."""
    return functools.partial(_random_crop, size=size, scale=(0.1, 0.5), ratio=(1.0, 1.0))


def probe_train_crop(size: int) -> Transform:
    """Training view of the linear probe: Resize(256), CenterCrop(256), RandomCrop(224), flip, to scale."""
    side = _resized_side(size)
    crops = [v2.CenterCrop(side), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([functools.partial(_resize, side=side), *crops])


def ten_crops(size: int) -> Transform:
    """Resize(256), then four corners and the centre, and their mirror images: (10, 3, size, size)."""
    return v2.Compose([functools.partial(_resize, side=_resized_side(size)), v2.TenCrop(size), torch.stack])


# What follows gives torchvision's pixels. Decoding empties the processor's caches, so that the first call of
# anything after it costs several times what it costs in a loop of its own: there are few calls here.


def _central_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    image = _resize(image, _resized_side(size))
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def _random_crop(
    image: torch.Tensor, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> torch.Tensor:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, drawing the same numbers."""
    top, left, height, width = _draw_box(image.shape[1], image.shape[2], scale, ratio)
    view = _resize_to(image[:, top : top + height, left : left + width], size, size)
    return view.flip(-1) if torch.rand(1).item() < 0.5 else view


def _draw_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width), as RandomResizedCrop draws it.

    Its share of the area is uniform in `scale`, the logarithm of width / height uniform in that of `ratio`;
    after ten boxes that do not fit, the largest central one of a permitted ratio.
    """
    (lowest, scales), (narrowest, ratios) = _float32_ranges(scale, ratio)
    for _ in range(10):
        u, v = torch.rand(2).tolist()
        # As torch does it: multiplied and added in one step, rounded to float32 once.
        area = height * width * float(np.float32(u * scales + lowest))
        shape = float(np.float32(math.exp(np.float32(v * ratios + narrowest))))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,)).item()
            return top, torch.randint(width - w + 1, (1,)).item(), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@functools.cache
def _float32_ranges(
    scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(start, length) of the ranges of scale and of log ratio, each rounded to float32 as torch does."""
    low, high = np.float32(scale)
    narrow, wide = (np.float32(math.log(limit)) for limit in np.float32(ratio))
    return (float(low), float(high - low)), (float(narrow), float(wide - narrow))


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


# On other processors torchvision computes in float32.
RESIZES_UINT8 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


# ---------------------------------------------------------------------------------------- views and loader


class CentralView(Dataset):
    """Item i: (uint8 view of image i, i). `transform` defaults to central_crop(size).

    An image that cannot be decoded gives (zeros, -1 - i), so that one pass can list all of them. A cache of
    central crops, cache.CropCache, gives the views that it holds and takes in the others.
    """

    def __init__(
        self,
        images: ImageList,
        size: int,
        transform: Transform | None = None,
        cache: "CropCache | None" = None,
    ):
        if cache is not None and (transform is not None or cache.shape != (len(images), 3, size, size)):
            raise ValueError("a crop cache holds central crops of all the images, of one size")
        self.images = images
        self.size = size
        self.transform = transform or central_crop(size)
        self.cache = cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        view = None if self.cache is None else self.cache.read(i)
        if view is not None:
            return view, i
        try:
            view = self.transform(self.images.decode(i))
        except ImageError:
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return self.transform(blank), -1 - i
        if self.cache is not None:
            self.cache.write(i, view)
        return view, i


class TrainView(Dataset):
    """Item (position, i): (uint8 random view of image i, i). `transform` defaults to train_crop(size).

    The randomness depends on (seed, epoch, position in the epoch) alone, not on workers, order or history.
    Raises ImageError for an image that cannot be decoded.
    """

    def __init__(
        self, images: ImageList, size: int, seed: int, epoch: int, transform: Transform | None = None
    ):
        self.images = images
        self.seed = seed
        self.epoch = epoch
        self.transform = transform or train_crop(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        """The items of a batch, as a loader asks for them."""
        # All seeds first: between two images each would take five times as long.
        seeds = [derive_seed(self.seed, "crop", self.epoch, position) for position, _ in items]
        with torch.inference_mode():  # 30 us less an image: torch prepares nothing for gradients
            return [(self._view(i, seed), i) for seed, (_, i) in zip(seeds, items)]

    def _view(self, i: int, seed: int) -> torch.Tensor:
        image = self.images.decode(i)
        # As torch.random.fork_rng and manual_seed, but those would also seed CUDA (and take 10 us longer).
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            return self.transform(image)
        finally:
            torch.set_rng_state(before)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    sampler: Sampler | Iterable | None = None,
    pin_memory: bool = False,
    batch_sampler: Sampler | None = None,
) -> DataLoader:
    """Batches of (views (B, ..., 3, S, S) uint8 in channels_last memory, indexes (B,) int64).

    In the order of the data set, or of the sampler, the last batch may be short; or in the batches of
    batch_sampler. Set pin_memory where the batches go to a GPU.
    """
    return DataLoader(
        dataset,
        batch_size=1 if batch_sampler is not None else batch_size,
        sampler=sampler,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
    )


def _collate(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack views as they lie in memory, (H, W, 3): no transposition here, nor later in the convolutions."""
    views, indexes = default_collate([(view.movedim(-3, -1), i) for view, i in items])
    return views.movedim(-1, -3), indexes


def init_worker(_: int) -> None:
    """Leave signals to the main process, which may have a checkpoint to write.

    But not the SIGTERM of the main process itself: at its exit it sends one to each worker that is left over,
    and waits for it. (torch has already set the worker to one thread.)
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def normalise(batch: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 3, S, S) -> float32 normalised by ImageNet's mean and std, same device and memory layout.

    (x / 255 - mean) / std as one multiply-add, x * scale + bias.
    """
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    scale = (1 / (255 * std)).to(batch.device, torch.float32)
    bias = (-mean / std).to(batch.device, torch.float32)
    return batch.to(torch.float32, copy=True).mul_(scale).add_(bias)
