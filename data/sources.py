"""Which images a command works on: named in one way, listed, looked at, the bad ones told or left out."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
from data.decode import ImageError, check_header
from data.depth import find_bits
from data.images import ImageList, list_images
from data.shards import list_shards
from util import Log, UserError, atomic_write, make_folder

Bad = list[tuple[int, str]]  # (index of an image, why it cannot be decoded)


def list_source(
    folder: str | None,
    shards: str | None = None,
    scaled: bool = False,
    skip_bad: bool = False,
    all_splits: bool = False,
) -> ImageList:
    """The images of DIR or of --shards PATTERN; scaled: large JPEGs are decoded at a fraction of their size.

    Raises UserError unless the images are named in one of the two ways.
    """
    if (folder is None) == (shards is None):
        raise UserError("give the images as DIR or as --shards PATTERN, one of them")
    images = list_shards(shards) if shards else list_images(folder, skip_bad, all_splits)
    images.scaled = scaled
    return images


def open_images(
    folder: str | None,
    shards: str | None = None,
    *,
    bad_list: str | Path,
    skip_bad: bool = False,
    all_splits: bool = False,
    scaled: bool = False,
    bits: int | None = None,
    workers: int = 1,
    enough: Callable[[ImageList], None] | None = None,
    log: Log | None = None,
) -> ImageList:
    """The images of DIR or of shards, their headers looked at; the one way to images for all commands.

    Of several processes the first one looks. Files that are no images stop here with a UserError, and
    bad_list, a file, names them all; with skip_bad they are left out, as are folders that cannot be read.
    all_splits: DIR may hold train/ and val/. bits: of 16 bits a sample, as a run has found them; None: these
    images tell. The log is told what was passed over. enough(images) may refuse
    to go on: it is asked before anything is read, and again if images were left out.
    """
    images = list_source(folder, shards, scaled, skip_bad, all_splits)
    return look_at(images, bad_list, skip_bad=skip_bad, bits=bits, workers=workers, enough=enough, log=log)


def look_at(
    images: ImageList,
    bad_list: str | Path,
    *,
    skip_bad: bool = False,
    bits: int | None = None,
    workers: int = 1,
    enough: Callable[[ImageList], None] | None = None,
    log: Log | None = None,
) -> ImageList:
    """Look at the headers of listed images; returns them. The second half of open_images, which see."""
    for note in images.notes if log is not None else []:
        log(note)
    if enough is not None:
        enough(images)
    bad = distributed.on_main(check_headers, images, max(workers, 1))
    leave_out(images, bad, bad_list, skip_bad, log)
    if bad and enough is not None:
        enough(images)
    if bits is None:
        find_bits(images, log)
    else:
        images.bits = bits
    return images


def refuse_overwriting(images: ImageList, outputs: Iterable[Path], inputs: Iterable[str | Path] = ()) -> None:
    """UserError where one of the files `outputs` is read: an image, what the list was read from, an input."""
    there = [path for path in outputs if path.exists()]
    read = [(path, str(name)) for path in there for name in (*images.files, *inputs) if same_file(path, name)]
    if there and not read and images.folder is not None:
        names = {os.path.relpath(os.path.realpath(path), images.folder): path for path in there}
        read = [(names[name], name) for name in images.paths if name in names][:1]
    if read:
        raise UserError(f"{read[0][0]} would be overwritten, but is read: {read[0][1]}; choose another --out")


def same_file(a: str | Path, b: str | Path) -> bool:
    """Whether two paths name one file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def check_headers(images: ImageList, workers: int) -> Bad:
    """Open the header of every file: those that are no image, empty, or bombs, in order.

    Cheap next to decoding, and therefore blind to damage further on. workers: number of threads.
    """

    def check(start: int) -> Bad:
        broken = []
        for i in range(start, min(start + 1000, len(images))):
            try:
                with images.open(i) as file:
                    check_header(file)
            except Exception as error:
                broken.append((i, ImageError.of(images.path(i), error).reason))
        return broken

    with ThreadPoolExecutor(workers) as pool:
        return [found for part in pool.map(check, range(0, len(images), 1000)) for found in part]


def leave_out(
    images: ImageList, bad: Bad, bad_list: str | Path, skip_bad: bool, log: Log | None = None
) -> None:
    """Take the bad images out of the list itself, or raise a UserError that tells the first ones.

    bad_list gets a line `path<tab>reason` for each, behind those that it has already.
    """
    if not bad:
        return
    names = Path(bad_list)
    if distributed.is_main():
        write_bad_list(images, bad, names)
    if not skip_bad:
        raise cannot_decode(images, bad, names)
    if log is not None:
        log(f"left out {len(bad)} of {len(images)} images that cannot be decoded, listed in {names}")
    images.drop([i for i, _ in bad])


def write_bad_list(images: ImageList, bad: Bad, names: Path) -> None:
    make_folder(names.parent)
    lines = names.read_text("utf-8", "surrogateescape").splitlines() if names.is_file() else []
    lines += [f"{images.path(i)}\t{reason}" for i, reason in bad]
    with atomic_write(names) as file:
        file.writelines(f"{line}\n" for line in dict.fromkeys(lines))


def cannot_decode(images: ImageList, bad: Bad, listed_in: str | Path) -> UserError:
    """The error that names the first of the bad images and the file that lists them all."""
    some = "; ".join(f"{images.path(i)}: {reason}" for i, reason in bad[:10])
    more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    return UserError(
        f"{len(bad)} of {len(images)} images cannot be decoded ({some}{more}), listed in {listed_in}; mend "
        "or remove them, or leave them out with --skip-bad-images"
    )


def reasons(images: ImageList, broken: Sequence[int]) -> Bad:
    """(index, why) of images that could not be decoded, in order of the indexes."""
    return [(i, broken_reason(images, i) or "could not be read for a moment") for i in sorted(broken)]


def broken_reason(images: ImageList, i: int) -> str | None:
    """Decode image i again and say why it cannot be decoded; None if it can."""
    try:
        images.decode(i)
    except ImageError as error:
        return error.reason
    return None
