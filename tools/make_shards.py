"""Write a folder of images as WebDataset shards, as they are or shrunk once and for all.

    python tools/make_shards.py imagenet/train 'shards/train-%06d.tar' --size-mb 300
    python tools/make_shards.py imagenet/train 'small/train-%06d.tar' --resize 256 --quality 95 --workers 8
    python main.py --shards 'shards/train-{000000..000475}.tar' ...

Without --resize the files' bytes are copied unchanged: a run on the shards equals a run on the folder, bit
for bit. With it, images whose shorter side is longer are resized and stored upright as JPEG: several times
cheaper to decode, but no longer quite the same pixels. Each sample is a running number with the image and,
where the folder has classes, its class id (.cls); the images' paths stand in the member __paths__.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commandline import Parser, add_all_splits, add_bad_images, at_least, positive, within


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("dir", metavar="DIR", help="folder of images, or a text file of paths")
    parser.add_argument(
        "pattern", metavar="PATTERN", help="the shards, numbered by %%d: 'out/train-%%06d.tar'"
    )
    parser.add_argument("--size-mb", type=positive, default=300, help="size of a shard in MB")
    parser.add_argument(
        "--resize",
        type=at_least(1),
        metavar="SIDE",
        help="resize the shorter side to this where it is longer, e.g. 256 (default: copy the bytes)",
    )
    parser.add_argument(
        "--quality", type=within(1, 100), default=95, help="of resized images' JPEG, 1 to 100"
    )
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that decode and resize")
    add_all_splits(parser)
    add_bad_images(parser)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import contextlib
import glob
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

import data
from data.shards import PATHS_MEMBER, check_name, import_webdataset
from util import Log, Progress, UserError, atomic_write, make_folder, run_main, try_lock


def main(args: argparse.Namespace) -> list[Path]:
    """Write the shards; returns their paths."""
    first, second = (shard_path(args.pattern, number) for number in (0, 1))
    if first == second or first.suffix != ".tar":
        raise UserError(f"{args.pattern}: give a numbered name that ends in .tar, as in 'train-%06d.tar'")
    import_webdataset()
    log = Log()
    images = data.list_source(args.dir, skip_bad=args.skip_bad_images, all_splits=args.all_splits)
    for note in images.notes:
        log(note)
    data.find_bits(images, log)
    if len(set(images.paths)) < len(images):
        raise UserError(f"{args.dir} names an image twice; in shards each image has a name of its own")
    for path in images.paths:
        check_name(path, args.dir)
    make_folder(first.parent)
    progress = Progress(len(images), "images", log=log)
    with unfinished(args.pattern) as begin:
        encoded = Encoded(images, args.resize, round(args.quality))
        samples = read_samples(encoded, args.workers, args.skip_bad_images, log, progress)
        written = write_shards(samples, args.pattern, round(args.size_mb * 1e6), begin)
        progress.close()
        if not written:
            raise UserError(f"{args.dir}: no image could be decoded, nothing was written")
    size = sum(path.stat().st_size for path in written)
    log(f"{len(written)} shard(s), {size / 1e6:.1f} MB: {written[0]} to {written[-1].name}")
    return written


def shard_path(pattern: str, number: int) -> Path:
    """The path of a shard; UserError where the pattern has no place for its number."""
    try:
        return Path(pattern % number)
    except (TypeError, ValueError):
        raise UserError(f"{pattern}: give one %d for the shard's number, as in 'train-%06d.tar'") from None


# ---------------------------------------------------------------------------------------- reading


class Encoded(Dataset):
    """Item i: (the bytes of image i to store, None), or (None, why image i cannot be decoded).

    Every image is decoded, to find broken ones here and not in the middle of a run.
    """

    def __init__(self, images: data.ImageList, side: int | None, quality: int):
        self.images, self.side, self.quality = images, side, quality

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[bytes | None, str | None]:
        try:
            image = self.images.decode(i)
        except data.ImageError as error:
            return None, error.reason
        if self.side is not None and min(image.shape[1:]) > self.side:
            return to_jpeg(functional.resize(image, [self.side]), self.quality), None
        with self.images.open(i) as file:
            return file.read(), None


def to_jpeg(image: torch.Tensor, quality: int) -> bytes:
    """(3, H, W) uint8 -> the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def read_samples(
    encoded: Encoded, workers: int, skip_bad: bool, log: Log, progress: Progress
) -> Iterator[tuple[str, bytes, int | None]]:
    """(relative path, bytes, class id or None) of every image that can be decoded, in order."""
    images = encoded.images
    loader = DataLoader(encoded, batch_size=None, num_workers=workers, worker_init_fn=data.init_worker)
    for i, (content, reason) in enumerate(loader):
        if content is not None:
            yield images.paths[i], content, None if images.classes is None else int(images.classes[i])
        elif skip_bad:
            progress.clear()
            log(f"left out {images.path(i)}: {reason}")
        else:
            raise UserError(f"{images.path(i)}: {reason}; mend or remove it, or use --skip-bad-images")
        progress.update()


# ---------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def unfinished(pattern: str) -> Iterator[Callable[[Path], None]]:
    """begin(shard), to be called before a shard is written: what a call has made goes where it ends early.

    At once, or where it was killed when the next one begins: FIRST_SHARD.unfinished names the shards until
    the last is whole. Raises UserError where shards of that name are there, or another process writes them.
    """
    first = shard_path(pattern, 0)
    journal = first.with_name(f"{first.name}.unfinished")
    with open(journal, "ab+", buffering=0) as file:  # nothing is left to write where a write fails
        if try_lock(file) is False:
            raise UserError(f"{first}: another process is writing these shards")

        def begin(shard: Path) -> None:
            if shard.exists():
                raise UserError(
                    f"{shard} exists already: choose another name, or remove the shards that are there"
                )
            file.write(os.fsencode(f"{shard.name}\n"))
            os.fsync(file.fileno())

        try:
            clear(file, pattern)
            yield begin
        except BaseException:
            clear(file, pattern)
            raise
        finally:
            journal.unlink()


def clear(journal: BinaryIO, pattern: str) -> None:
    """Remove the shards that the journal names, and what was begun of them; empty it."""
    journal.seek(0)
    for number, name in enumerate(os.fsdecode(journal.read()).split("\n")):
        shard = shard_path(pattern, number)
        if shard.name == name:
            for path in (shard, *shard.parent.glob(f"{glob.escape(name)}.tmp-*")):
                path.unlink(missing_ok=True)
    journal.truncate(0)


def write_shards(
    samples: Iterator[tuple[str, bytes, int | None]],
    pattern: str,
    max_bytes: int,
    begin: Callable[[Path], None],
) -> list[Path]:
    """Write samples into numbered shards of about max_bytes each; none is ever half there under its name."""
    written: list[Path] = []
    first = 0  # index of the shard's first sample
    for sample in samples:
        path = shard_path(pattern, len(written))
        begin(path)
        with atomic_write(path, "wb") as file:
            first += write_shard(file, itertools.chain([sample], samples), first, max_bytes)
        written.append(path)
    return written


def write_shard(
    file: BinaryIO, samples: Iterator[tuple[str, bytes, int | None]], first: int, max_bytes: int
) -> int:
    """Write samples until the shard is full or there are no more; returns how many."""
    paths: list[str] = []
    with import_webdataset().TarWriter(file, encoder=False, mtime=0) as writer:
        while writer.tarstream.offset < max_bytes:
            path, content, label = next(samples, (None, None, None))
            if path is None:
                break
            sample = {"__key__": f"{first + len(paths):08d}", ending_of(path, content): content}
            if label is not None:
                sample["cls"] = str(label).encode()
            writer.write(sample)
            paths.append(path)
        add_paths(writer.tarstream, paths)
    return len(paths)


def ending_of(path: str, content: bytes) -> str:
    """The ending under which an image is stored: its own, jpg for a JPEG, and where it has none."""
    ending = os.path.splitext(path)[1].lower()
    return ending[1:] if ending in data.EXTENSIONS and not content.startswith(b"\xff\xd8\xff") else "jpg"


def add_paths(tar: tarfile.TarFile, paths: list[str]) -> None:
    """Store the images' paths in order, as JSON; webdataset skips a member of such a name."""
    content = json.dumps(paths).encode()
    member = tarfile.TarInfo(PATHS_MEMBER)
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_main(main, ARGS)
