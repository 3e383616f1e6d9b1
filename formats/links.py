"""Images by cluster as folders of links or copies, nearest to the centroid first."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import ImageList
from util import UserError, rename, try_lock

LONGEST_NAME = 255  # bytes of a file name


def write_links(
    images: ImageList,
    labels: np.ndarray,
    distances: np.ndarray,
    out: str | Path,
    num_clusters: int,
    relative: bool = False,
    copy: bool = False,
) -> None:
    """OUT/<cluster>/<rank>_<name>: links to the images, or copies, nearest to the centroid first.

    Cluster and rank have leading zeros, so that listings are in order; the rank keeps images of one name
    apart. labels and distances (N,) as images. OUT, new or empty, appears when it is complete.
    """
    out = Path(os.path.realpath(out))
    root, width = os.path.realpath(images.root), len(str(num_clusters - 1))
    order = np.lexsort((distances, labels))
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    try:
        with folder_beside(out) as beside:
            for members in np.split(order, starts):
                folder = beside / f"{labels[members[0]]:0{width}d}"
                folder.mkdir()
                digits = len(str(len(members) - 1))
                for rank, i in enumerate(members.tolist()):
                    name = ranked_name(f"{rank:0{digits}d}_", images.paths[i])
                    target = os.path.join(root, images.paths[i])
                    if copy:
                        (folder / name).write_bytes(images.read(i))
                    else:
                        os.symlink(os.path.relpath(target, folder) if relative else target, folder / name)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error


def ranked_name(rank: str, path: str) -> str:
    """The rank and the file's name, which loses the end of its stem if both are too long for a file name."""
    stem, ending = map(os.fsencode, os.path.splitext(os.path.basename(path)))
    return rank + os.fsdecode(stem[: LONGEST_NAME - len(rank) - len(ending)] + ending)


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A new folder that gets the name `out`, which is free or an empty folder, when the block ends well.

    Those of processes that died are removed; one whose process lives is locked by it.
    """
    for path in out.parent.glob(f"{glob.escape(out.name)}.tmp-*"):
        with locked(path) as free:
            if free:
                shutil.rmtree(path)
    beside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    beside.mkdir()
    with locked(beside):
        try:
            yield beside
            rename(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether this process alone has the folder, for as long as the block lasts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield try_lock(handle)
    finally:
        os.close(handle)
