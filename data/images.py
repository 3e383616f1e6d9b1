"""The images of a data set in a fixed order: image i is the i-th of the list everywhere.

Labels live in the main process as one array, gathered by index, so no worker holds them.
"""

import copy
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from data.decode import EXTENSIONS, FULL_BITS, ImageError, decode_bytes, read_file
from data.scan import scan
from util import UserError


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
    scaled, False unless set: decode large photographs at a fraction of their size (see `decode_file`). bits:
    that pictures of 16 a sample use (data/depth.py), None: all. name: what the user calls it. files: what the
    list was read from, besides the images: a text file or shards. skipped: paths of images that were left out
    (`drop`). notes: lines on what was passed over when it was listed.
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
        self.bits: int | None = None
        self.name = str(root)
        self.files: list[str] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> Path:
        """The full path of image i."""
        return self.root / self.paths[i]

    @property
    def folder(self) -> str | None:
        """The real path of the folder that the paths are files in; None where images lie in shards."""
        return os.path.realpath(self.root)

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i as a buffered file."""
        return open(self.path(i), "rb")

    def read(self, i: int) -> bytes:
        """The bytes of image i."""
        return read_file(os.path.join(self.root, self.paths[i]))

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
        """Image i as `decode_bytes` gives it: (3, H, W) uint8 RGB, upright. Raises ImageError."""
        try:
            return decode_bytes(self.read(i), self.scaled, self.bits or FULL_BITS)
        except Exception as error:
            raise ImageError.of(self.path(i), error) from error

    def drop(self, indexes: Sequence[int]) -> None:
        """Leave images out of the list itself, for everything that holds it; `skipped` keeps their paths."""
        mask = np.ones(len(self), dtype=bool)
        mask[list(indexes)] = False
        self.skipped += [self.paths[i] for i in np.flatnonzero(~mask)]
        self._keep(mask)

    def _keep(self, mask: np.ndarray) -> None:
        """Cut everything that has an entry an image to those where mask (N,) is true."""
        self.paths = PackedPaths([self.paths[i] for i in np.flatnonzero(mask)])
        self.classes = None if self.classes is None else self.classes[mask]

    def renumber(self, ids: Sequence[int], class_names: list[str]) -> None:
        """Class c becomes class ids[c] of class_names."""
        self.classes, self.class_names = np.array(ids, dtype=np.int64)[self.classes], class_names

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to find again: how many images, their digest, those left out, bits."""
        return {
            "number": len(self), "digest": self.digest(), "skipped": list(self.skipped), "bits": self.bits
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave out what was left out then. Raises UserError unless the rest are the same images."""
        gone = np.flatnonzero(np.isin(list(self.paths), state["skipped"])) if state["skipped"] else []
        if len(gone):
            self.drop(gone)
        self.skipped = list(state["skipped"])
        self.bits = state.get("bits", self.bits and FULL_BITS)  # before it was looked at, all were taken
        if len(self) != state["number"]:
            raise UserError(f"the run had {state['number']} images, {self.name} has {len(self)}")
        if self.digest() != state["digest"]:
            raise UserError(f"the run had other images: the names in {self.name} differ")

    def keep(self, mask: np.ndarray) -> "ImageList":
        """The images where mask (N,) bool is true, in the same order; class ids keep their meaning."""
        images = copy.copy(self)
        images._keep(np.asarray(mask, dtype=bool))
        images.skipped = []
        return images

    def digest(self) -> str:
        """Hex digest of the relative paths in order: equal exactly when image i means the same file."""
        return self.paths.digest()


def list_images(source: str | Path, skip_unread: bool = False, all_splits: bool = False) -> ImageList:
    """List the images of a folder, or those that a text file names (one path a line).

    In a folder: every file with an ending that Pillow reads, sub-folders and linked folders included, hidden
    ones left out, in the order of torchvision's ImageFolder (class folder, then folder, then file name). In a
    text file: its order; paths are absolute or relative to its folder; blank lines and lines starting with #
    are skipped. Classes are the first-level sub-folders if there are two or more and no image lies beside
    them. `notes` of the list tells what was passed over: other files, folders of systems and of runs.

    skip_unread: leave out folders that cannot be read, with a note. all_splits: a folder that holds train/
    and val/ is meant to be one set. Raises UserError if either is the case and not asked for, if the source
    does not exist, holds no image, or names files that do not exist.
    """
    source, notes = Path(source), []
    if source.is_dir():
        root, (paths, notes) = source, _scan_folder(source, skip_unread, all_splits)
    elif source.exists():
        root, paths = _read_path_list(source)
    else:
        raise UserError(f"{source} does not exist (expected a folder of images or a text file of paths)")
    images = ImageList(root, paths, *classes_of(paths))
    images.name, images.notes = str(source), notes
    images.files = [] if source.is_dir() else [str(source)]
    return images


def _scan_folder(source: Path, skip_unread: bool, all_splits: bool) -> tuple[list[str], list[str]]:
    """(relative paths of the images below a folder, lines on what was passed over)."""
    found = scan(str(source))
    notes = found.notes()
    if found.unread:
        what = f"{len(found.unread)} folder(s) below {source} cannot be read ({found.unread_folders()})"
        if not skip_unread:
            raise UserError(f"{what}; make them readable, or leave them out with --skip-bad-images")
        notes.append(f"warning: left out, {what}")
    paths = found.paths()
    if not paths:
        passed_over = "".join(f"; {note}" for note in notes)
        raise UserError(
            f"no image found in {source}: looked there and in all its sub-folders for files ending in "
            f".jpg, .png or another of the {len(EXTENSIONS)} endings Pillow reads (hidden files left out)"
            + passed_over
        )
    splits = found.splits()
    if splits and not all_splits:
        raise UserError(
            f"{source} holds {' and '.join(f'{split}/' for split in splits)}, which would become one set "
            f"with these as classes: give {source / 'train'}, or take all of it with --all-splits"
        )
    return paths, notes


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
