"""A cache of the central crops of a data set: exact uint8 pixels in one memory-mapped file.

The feature pass sees the same crop of every image in every epoch; read from here it costs a fiftieth of
decoding it again, or less. The first pass fills the cache, in whatever processes decode. Each row is checked
when it is read: a file that was damaged, left by a crash or filled by two jobs at once gives no wrong pixels.
"""

import contextlib
import hashlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from data.decode import FULL_BITS
from data.images import ImageList
from util import UserError, clear_left_over, make_folder, try_lock

# Part of the file's name, as are the versions of the libraries that make the pixels. To be counted up when
# data.central_crop gives other pixels.
VERSION = 1
LIBRARIES = ("torch", "torchvision", "pillow", "simplejpeg")

EMPTY = 0  # checksum of a row that was never written
SALT = 0x9E3779B97F4A7C15  # checksum of black, any number but 0


def bytes_needed(n: int, size: int) -> int:
    """Size in bytes of the cache of n crops of size x size pixels."""
    return n * (_row_bytes(size) + 8)


def free_bytes(folder: str | Path) -> int:
    """Free space of the disk on which a folder lies or, where it does not exist yet, would lie."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class CropCache:
    """Central crops (N, 3, size, size) uint8 of an image list, kept in `folder`.

    A file holds N rows of pixels (size, size, 3), then N checksums; a row counts once its checksum, which is
    written after the pixels, is right. Its name is a digest of the images' paths, sizes and times of change,
    of `size` and of the versions of what computes the pixels: of a changed folder nothing old is ever served,
    a new file begins instead. Any file may be deleted at any time. Safe to hand to loader workers.

    Raises UserError where the folder cannot be written or its disk has not enough space.
    """

    def __init__(self, folder: str | Path, images: ImageList, size: int):
        self.shape = (len(images), 3, size, size)
        self.path = Path(folder) / f"crops-{size}-{_digest(images, size)}.cache"
        self._map: tuple[np.ndarray, np.ndarray] | None = None
        make_folder(folder)
        if not self._is_whole():
            needed, free = bytes_needed(len(images), size), free_bytes(folder)
            if needed > free:
                raise UserError(
                    f"the crop cache needs {needed / 2**30:.1f} GiB in {folder} but {free / 2**30:.1f} are "
                    "free: make room, choose another folder, or go without it"
                )
            self._create()

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}  # a worker maps the file itself

    def read(self, i: int) -> torch.Tensor | None:
        """Crop i, (3, size, size) uint8 laid out as (size, size, 3); None if it is not there (any more)."""
        rows, sums = self._open()
        expected = int(sums[i])
        if expected == EMPTY:
            return None
        row = rows[i].copy()  # what is checked is what is returned
        if _checksum(row) != expected:
            return None
        size = self.shape[-1]
        pixels = row.view(np.uint8)[: size * size * 3].reshape(size, size, 3)
        return torch.from_numpy(pixels.transpose(2, 0, 1))

    def write(self, i: int, crop: torch.Tensor) -> None:
        """Keep crop i, (3, size, size) uint8. Processes that write the same crop do no harm to each other."""
        if crop.shape != self.shape[1:]:
            raise ValueError(f"a crop cache of {self.shape[1:]} was given a view {tuple(crop.shape)}")
        rows, sums = self._open()
        size = self.shape[-1]
        pixels = rows[i].view(np.uint8)[: crop.numel()].reshape(size, size, 3)
        pixels[:] = crop.permute(1, 2, 0).numpy()
        sums[i] = _checksum(rows[i])

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows (N, words) and checksums (N,), uint64, mapped; a file that went away is made again."""
        if self._map is None:
            if not self._is_whole():
                self._create()
            n, row = len(self), _row_bytes(self.shape[-1]) // 8
            # A plain array: a memmap's own indexing costs as much as the copy of a row.
            words = np.asarray(np.memmap(self.path, dtype=np.uint64, mode="r+"))
            self._map = words[: n * row].reshape(n, row), words[n * row :]
        return self._map

    def _is_whole(self) -> bool:
        """Whether the file is there in its full length."""
        try:
            return os.stat(self.path).st_size == bytes_needed(len(self), self.shape[-1])
        except OSError:
            return False

    def _create(self) -> None:
        """Make the file, zeros, its space reserved: a full disk is an error here, not a crash in the middle.

        Of processes that do so at once one wins, and the others use its file.
        """
        beside = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        try:
            clear_left_over(self.path)
            with open(beside, "wb") as file:
                try_lock(file)
                os.posix_fallocate(file.fileno(), 0, bytes_needed(len(self), self.shape[-1]))
                if not self._is_whole():
                    self.path.unlink(missing_ok=True)
                    with contextlib.suppress(FileExistsError):
                        os.link(beside, self.path)
        except OSError as error:
            raise UserError(f"cannot write the crop cache {self.path}: {error.strerror}") from error
        finally:
            beside.unlink(missing_ok=True)


def open_cache(folder: str | None, images: ImageList, size: int) -> CropCache | None:
    """The cache in the folder that --crop-cache names, if it does."""
    return CropCache(Path(folder), images, size) if folder else None


def _row_bytes(size: int) -> int:
    """Bytes of a crop, in whole words of 8."""
    return -(-size * size * 3 // 8) * 8


def _checksum(row: np.ndarray) -> int:
    """A checksum of a row of uint64, never 0: their sum, which tells zeros, torn pages and flipped bits."""
    return (int(np.add.reduce(row)) + SALT) % 2**64 or SALT


def _digest(images: ImageList, size: int) -> str:
    """What the crops depend on, in 32 hex digits."""
    what = hashlib.sha256(f"{VERSION} {size} {images.scaled} {images.digest()}".encode())
    if images.bits not in (None, FULL_BITS):
        what.update(f" {images.bits} bits".encode())
    what.update(np.ascontiguousarray(images.stamps(), dtype="<i8").tobytes())
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            what.update(f" {name} {version(name)}".encode())
    return what.hexdigest()[:32]
