"""What lies below a folder: images, and what is passed over, each kind told in one line."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data.decode import EXTENSIONS
from util import UserError

# Thumbnails, metadata and deleted files that systems put beside pictures (lower case); hidden ones go anyway.
OF_SYSTEMS = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",  # NAS boxes
    "__macosx", "$recycle.bin", "system volume information", "lost+found", "found.000",
}  # fmt: skip
SPLITS = {"val", "valid", "validation", "test"}  # what stands beside train/
DRAWN = ".drawn"  # marks a folder that pictures of a network were drawn into (visu/)
TOLD = 6  # endings, or folders, that a line names


@dataclass
class Scan:
    """What a walk met; folders are relative to its root, "" being the root itself."""

    images: list[tuple[str, list[str]]] = field(default_factory=list)  # (folder, sorted names in it)
    endings: Counter[str] = field(default_factory=Counter)  # of files that are no images
    of_systems: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)  # (folder, why)

    def paths(self) -> list[str]:
        """Relative paths of the images in ImageFolder's order: class folder, then folder, then name."""
        found = sorted(self.images, key=lambda entry: (entry[0].split("/", 1)[0], entry[0]))
        return [f"{folder}/{name}" if folder else name for folder, names in found for name in names]

    def splits(self) -> list[str]:
        """The folders in the root that look like train/ and val/ of one data set, if both hold images."""
        first = {folder.split("/", 1)[0] for folder, _ in self.images}
        return ["train", *sorted(first & SPLITS)] if "train" in first and first & SPLITS else []

    def notes(self) -> list[str]:
        """A line for each kind of thing that was passed over."""
        lines = []
        if self.endings:
            what = [f"{count} {ending}" for ending, count in self.endings.most_common()]
            lines.append(f"passed over {self.endings.total()} files by their ending: {_some(what)}")
        for folders, what in (
            (self.of_systems, "of thumbnails, metadata or deleted files"),
            (self.runs, "of runs of this repository, or of pictures that it drew"),
        ):
            if folders:
                lines.append(f"left out {len(folders)} folder(s) {what}: {_some(folders)}")
        return lines

    def unread_folders(self) -> str:
        """The folders that cannot be read and why, the first ones."""
        return _some([f"{folder}: {reason}" for folder, reason in self.unread], "; ")


def _some(names: list[str], between: str = ", ") -> str:
    more = [f"and {len(names) - TOLD} more"] if len(names) > TOLD else []
    return between.join([*names[:TOLD], *more])


def scan(root: str) -> Scan:
    """Walk down from root; UserError where root itself cannot be read, or holds a run."""
    found = Scan()
    _walk(root, "", frozenset(), found)
    if found.unread and found.unread[0][0] == "":
        raise UserError(f"cannot read the folder {root}: {found.unread[0][1]}")
    if "" in found.runs:
        raise UserError(
            f"{root} is the folder of a run, not of images: what is written there are pictures too; give "
            "the images' own folder as DIR, and another one as --exp"
        )
    return found


def _walk(root: str, folder: str, above: frozenset, found: Scan) -> None:
    """Add what lies in `folder` and below to found.

    Linked folders are followed; `above` holds the (device, inode) of the folders on the way down, and one
    that is met again below itself ends the descent.
    """
    here = os.path.join(root, folder)
    try:
        status = os.stat(here)
        with os.scandir(here) as entries:
            entries = list(entries)
    except OSError as error:
        found.unread.append((folder, (error.strerror or str(error)).lower()))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    if is_run(entry.name for entry in entries):
        found.runs.append(folder)
        return
    images = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = f"{folder}/{entry.name}" if folder else entry.name
        kind = _kind(entry)
        if kind == "image":
            images.append(entry.name)
        elif kind == "folder" and entry.name.lower() in OF_SYSTEMS:
            found.of_systems.append(path)
        elif kind == "folder":
            _walk(root, path, above | {identity}, found)
        elif kind == "file":
            found.endings[_ending(entry.name) or "without one"] += 1
    if images:
        found.images.append((folder, images))


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with these names in it is of a run, an evaluation, or pictures that were drawn.

    The lock alone is no mark: it is left behind where a run is refused.
    """
    names = set(names)
    if {"config.json", "log.jsonl"} <= names or DRAWN in names:
        return True
    locked = [
        name[1:].removesuffix(".pth.tar.lock")
        for name in names
        if name.startswith(".") and name.endswith(".pth.tar.lock")
    ]
    return any({f"{name}.pth.tar", f"{name}.jsonl"} & names for name in locked)


def _kind(entry: os.DirEntry) -> str:
    """image, folder, file or "" for what is neither; a link that leads nowhere is what its name says."""
    image = _ending(entry.name) in EXTENSIONS
    try:
        if entry.is_dir():
            return "folder"
        there = entry.is_file() or (image and not os.path.exists(entry.path))
    except OSError:  # a link to itself: an image is told as broken, anything else as a folder is
        return "image" if image else "folder"
    if not there:
        return ""
    return "image" if image else "file"


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
