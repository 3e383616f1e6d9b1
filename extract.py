"""Features of any layer for a folder of images: .npy with names, Parquet, or the pickle of the authors' form.

    python extract.py DIR --model exp/checkpoint.pth.tar --layer conv5 --out features/conv5
    python extract.py DIR --run exp --whitened --format parquet --out features/points

Rows are written as they come, in the order of the images: memory does not grow with their number. They lie in
OUT.npy.part meanwhile, and OUT.npy.journal says how far that is good: after a kill the same command goes on
there, with batches that begin where they would have begun, and gives the file of an uninterrupted run bit for
bit. (Parquet files are made from the finished .part: for a while both lie on the disk.)

OUT.npy comes with OUT.txt, the relative path of each row, one a line. In it a backslash is written as \\\\, a
line feed as \\n, a carriage return as \\r (`read_names` undoes that); other bytes are as in the file system.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shards
import torch
from released import FeaturesPickle
from torch.nn import functional as F

import checkpoint
import clustering
import data
import evaluation
from features import PRECISIONS, activation_batches, eval_forward, set_precision
from models import FEATURE, DeepClusterNet
from util import (
    Log,
    Progress,
    UserError,
    add_device_argument,
    atomic_write,
    choose_device,
    make_folder,
    peak_memory_gib,
    run_main,
    write_json,
)

ENDINGS = {"npy": ".npy", "parquet": ".parquet", "pickle": ".pkl"}
SYNC_SECONDS = 20.0  # at most so much work is lost by a kill
GROUP_BYTES = 8 * 2**20  # of features in a row group of a Parquet file
PAPER_SIZE, PAPER_BATCH = 224, 256  # for checkpoints that do not tell theirs

# ---------------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="extract.py", description="Write a layer's features of images to a file, in constant memory"
    )
    add_image_arguments(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--model", metavar="FILE", help="a checkpoint of main.py or of the authors")
    group.add_argument(
        "--run",
        metavar="EXP",
        help="instead of --model: the network of a run's last clustering, EXP/clustering.pth.tar",
    )
    group.add_argument(
        "--layer",
        default=FEATURE,
        help="conv<n>, conv<n>.pre, pool, fc6, fc6.pre, fc7, fc7.pre, logits, sobel (.pre: before the ReLU); "
        "maps (C, H, W) are flattened in this order (default: %(default)s, which is what is clustered)",
    )
    group.add_argument(
        "--pool", type=int, metavar="N", help="average maps to N x N first (default: they are kept whole)"
    )
    group.add_argument(
        "--whitened",
        action="store_true",
        help="the points that the run clustered: fc7.pre PCA-whitened as in the run, norm 1 (with --run)",
    )
    group = parser.add_argument_group("file")
    group.add_argument(
        "--out", required=True, metavar="OUT", help="file to write; its ending may be left out"
    )
    group.add_argument(
        "--format",
        choices=list(ENDINGS),
        default="npy",
        help="npy: OUT.npy and OUT.txt; parquet: OUT.parquet with columns path and feature; pickle: OUT.pkl, "
        "a list of (path, vector) (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="(default: %(default)s)"
    )
    group.add_argument(
        "--restart", action="store_true", help="begin anew where an unfinished file of the same name lies"
    )
    add_machine_arguments(parser)
    return parser


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and how they are looked at; assign.py has the same."""
    parser.add_argument("dir", metavar="DIR", nargs="?", help="a folder of images or a .txt file of paths")
    parser.add_argument(
        "--shards",
        metavar="PATTERN",
        help="instead of DIR: tar shards, e.g. 'train-{000000..000146}.tar'",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"side of the central crop (default: as in the run, else {PAPER_SIZE})",
    )
    parser.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out files that cannot be decoded instead of stopping with their list",
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """How it is computed; assign.py has the same."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch", type=int, help=f"images at a time (default: as in the run, else {PAPER_BATCH})"
    )
    group.add_argument("--workers", type=int, default=4, help="data loading workers (default: 4)")
    add_device_argument(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="arithmetic of the convnet (default: as in the run where this device can, else fp32)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, in one line each."""
    check_image_arguments(args)
    if bool(args.model) == bool(args.run):
        raise UserError("give the network as --model FILE or as --run EXP, one of them")
    if args.whitened and args.layer != FEATURE:
        raise UserError(f"--whitened: the run whitens {FEATURE}, not --layer {args.layer}")
    if args.pool is not None and args.pool < 1:
        raise UserError(f"--pool {args.pool}: must be at least 1")
    if args.format == "pickle" and args.dtype != "float32":
        raise UserError(f"--dtype {args.dtype}: a pickle holds float32, as the authors' do; use --format npy")
    if args.format == "parquet":
        check_pyarrow()


def check_image_arguments(args: argparse.Namespace) -> None:
    shards.check_source(args.dir, args.shards)
    for name, least in {"image_size": 16, "batch": 1, "workers": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_pyarrow() -> None:
    """UserError where pyarrow is missing. Imported later: with it loaded, extraction takes 0.3 GiB more."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("--format parquet needs pyarrow: pip install -r requirements-extra.txt")


# ---------------------------------------------------------------------------------------- network and images


@dataclass
class Settings:
    """What decides a feature's bits besides the weights: as asked for, else as in the run, else the paper's.

    feature_dtype is what the run held features in, scaled whether it decoded large JPEGs at a fraction.
    """

    image_size: int
    batch: int
    precision: str
    feature_dtype: str
    scaled: bool

    @classmethod
    def choose(cls, args: argparse.Namespace, run: dict[str, Any], device: torch.device) -> "Settings":
        """run: the settings in a checkpoint; the authors' files have none. UserError if device cannot."""
        precision = args.precision or possible_precision(run.get("precision", "fp32"), device)
        set_precision(precision, device)
        return cls(
            args.image_size or run.get("image_size", PAPER_SIZE),
            args.batch or run.get("batch", PAPER_BATCH),
            precision,
            run.get("feature_dtype", "float32"),
            bool(run.get("scaled_decoding", False)),
        )


def possible_precision(precision: str, device: torch.device) -> str:
    """The run's precision where this device computes in it; fp32, which is more exact, elsewhere."""
    try:
        set_precision(precision, device)
    except UserError:
        return "fp32"
    return precision


def read_clustering(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """(path, content) of the clustering.pth.tar of a run; source is the run's folder or that file.

    Raises UserError, with the way out, for anything else, such as a checkpoint: the PCA in that was computed
    from weights that training has changed since.
    """
    path = Path(source)
    if path.is_dir():
        path = path / checkpoint.CLUSTERING
        if not path.is_file():
            raise UserError(
                f"{path} is missing: main.py writes it after each clustering; give the folder of such a run, "
                "or continue an older one for an epoch (--resume, --epochs)"
            )
    state = checkpoint.read(path)
    if not all(state.get(name) for name in ("state_dict", "whitening", "assignment", "paths", "args")):
        raise UserError(
            f"{path}: holds no PCA and centroids that fit its weights; give the folder of a run of main.py, "
            f"in which {checkpoint.CLUSTERING} does"
        )
    return path, state


def open_images(args: argparse.Namespace, scaled: bool) -> data.ImageList:
    """The images of DIR or --shards; files that are no images stop here unless --skip-bad-images is given."""
    images = shards.list_source(args.dir, args.shards, scaled)
    if not args.skip_bad_images:
        refuse_bad(images, data.check_headers(images, workers=max(args.workers, 1)), args.out)
    return images


def refuse_bad(images: data.ImageList, bad: list[tuple[int, str]], out: str | Path) -> None:
    """UserError that names the images (index, reason) that cannot be decoded, if there are any."""
    if not bad:
        return
    names = Path(f"{out}.bad_images.txt")
    make_folder(names.parent)
    with atomic_write(names) as file:
        file.writelines(f"{images.path(i)}\t{reason}\n" for i, reason in bad)
    raise data.cannot_decode(images, bad, names)


def feature_batches(
    net: DeepClusterNet,
    images: data.ImageList,
    layer: str,
    settings: Settings,
    workers: int,
    device: torch.device,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, torch.Tensor, list[int]]]:
    """Batch by batch, from image `first` on: (indexes (n,), activations (n, ...) float32, broken images)."""
    view = data.CentralView(images, settings.image_size)
    loader = data.make_loader(
        view, settings.batch, workers, sampler=range(first, len(images)), pin_memory=device.type == "cuda"
    )
    forward = eval_forward(net, [layer])
    for found, index in activation_batches(forward, loader, device, settings.precision):
        good = index >= 0
        values = found[layer] if bool(good.all()) else found[layer][good.to(found[layer].device)]
        yield index[good].numpy(), values, (-1 - index[~good]).tolist()


def whiten(
    features: torch.Tensor, pca: clustering.PCAWhitening, dtype: str, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 4096) -> the points (n, d) float32 that a run clusters, and their norms (n,) before."""
    points = pca.apply(features.cpu().numpy().astype(dtype, copy=False), device)
    norms = np.linalg.norm(points.astype(np.float64), axis=1)
    return clustering.normalise_rows(points), norms


def layer_shape(net: DeepClusterNet, layer: str, size: int) -> tuple[int, ...]:
    """The shape of one image's activation: (C, H, W) or (D,)."""
    with torch.inference_mode():
        blank = data.normalise(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        return tuple(net.eval().activations(blank, [layer])[layer].shape[1:])


# ---------------------------------------------------------------------------------------- files that grow


class NpyFile:
    """A .npy file to which rows (D,) are appended; its header tells how many there are only at the end.

    path: a file beside the final one; size: go on after so many bytes of it.
    """

    def __init__(self, path: Path, width: int, dtype: str, size: int | None = None) -> None:
        self.width, self.dtype = width, np.dtype(dtype)
        self.file = open(path, "w+b" if size is None else "r+b")
        if size is None:
            self._write_header(0)
        self.start = self._header_size()
        if size is not None:
            self.file.truncate(size)
            self.file.seek(size)

    def append(self, names: Iterable[str], rows: np.ndarray) -> None:
        """Add rows (n, D); the names of a .npy file lie in another one."""
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)

    def sync(self) -> int:
        """Everything so far is on the disk when this returns; the size to go on from."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def finish(self) -> None:
        """Bring the header to the number of rows and close the file."""
        rows = (self.sync() - self.start) // (self.width * self.dtype.itemsize)
        self.file.seek(0)
        self._write_header(rows)
        if self.file.tell() != self.start:  # numpy leaves room for any number of rows
            raise RuntimeError("the header of the .npy file grew over the rows")
        self.sync()
        self.file.close()

    def close(self) -> None:
        self.file.close()

    def _write_header(self, rows: int) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def _header_size(self) -> int:
        self.file.seek(0)
        np.lib.format.read_magic(self.file)
        np.lib.format.read_array_header_1_0(self.file)
        return self.file.tell()


class PickleFile:
    """released.FeaturesPickle, a batch at a time."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.pickle = FeaturesPickle(path, size)
        self.sync, self.finish, self.close = self.pickle.sync, self.pickle.close, self.pickle.file.close

    def append(self, names: Iterable[str], rows: np.ndarray) -> None:
        for name, row in zip(names, rows):
            self.pickle.append(name, row)


def npy_to_parquet(source: Path, path: Path, names: Iterable[str], dtype: str, about: dict[str, Any]) -> None:
    """A Parquet file of the rows (N, D) in a .npy file: `path` string, `feature` fixed-size list of dtype.

    about goes into the metadata of the schema, one entry a setting. Names that are not UTF-8 have \\xNN for
    their odd bytes. Constant memory; the file appears when it is complete.
    """
    import pyarrow as pa
    import pyarrow.parquet

    names = iter(names)
    with open(source, "rb") as file, atomic_write(path, "wb") as out:
        np.lib.format.read_magic(file)
        (number, width), _, _ = np.lib.format.read_array_header_1_0(file)
        values = pa.float16() if dtype == "float16" else pa.float32()
        schema = pa.schema(
            [pa.field("path", pa.string(), False), pa.field("feature", pa.list_(values, width), False)],
            metadata={name: str(value) for name, value in about.items()},
        )
        step = max(1, GROUP_BYTES // (width * np.dtype(dtype).itemsize))
        with pyarrow.parquet.ParquetWriter(
            out, schema, use_dictionary=False, write_statistics=["path"]
        ) as writer:
            for start in range(0, number, step):
                count = min(step, number - start)
                flat = pa.array(np.fromfile(file, dtype, count * width), values)
                paths = [os.fsencode(next(names)).decode("utf-8", "backslashreplace") for _ in range(count)]
                features = pa.FixedSizeListArray.from_arrays(flat, width)
                writer.write_table(
                    pa.table([pa.array(paths, pa.string()), features], schema=schema), row_group_size=count
                )


def write_names(path: Path, names: Iterable[str]) -> None:
    """One name a line; a backslash, line feed and carriage return as \\\\, \\n and \\r."""
    table = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r"})
    with atomic_write(path) as file:
        file.writelines(f"{name.translate(table)}\n" for name in names)


def read_names(path: str | Path) -> list[str]:
    """The names that `write_names` wrote."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        lines = [line.removesuffix("\n").split(r"\\") for line in file]
    return ["\\".join(p.replace(r"\n", "\n").replace(r"\r", "\r") for p in parts) for parts in lines]


# ---------------------------------------------------------------------------------------- going on


@dataclass
class Journal:
    """How far an extraction is: the first `done` images are dealt with, in the first `size` bytes of .part.

    settings: everything that decides a bit of the result; broken: images that could not be decoded.
    """

    path: Path
    settings: dict[str, Any]
    done: int = 0
    size: int | None = None
    broken: list[int] = field(default_factory=list)

    def write(self) -> None:
        write_json(self.path, {name: getattr(self, name) for name in ("settings", "done", "size", "broken")})

    def continue_from_file(self, part: Path) -> bool:
        """Take what an earlier call left; False if it left nothing. UserError if that had other settings."""
        if not (self.path.is_file() and part.is_file()):
            return False
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            other = [name for name in self.settings if saved["settings"].get(name) != self.settings[name]]
            done, size, broken = saved["done"], saved["size"], saved["broken"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: damaged; begin anew with --restart") from None
        if other:
            was, now = (str(s.get(other[0]))[:20] for s in (saved["settings"], self.settings))
            raise UserError(
                f"{part}: is the beginning of another extraction ({other[0]} was {was} and is {now}); give "
                "what it was made with, or another --out, or begin anew with --restart"
            )
        if part.stat().st_size < size:
            raise UserError(f"{part}: shorter than it was; begin anew with --restart")
        self.done, self.size, self.broken = done, size, broken
        return True


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- extraction


@dataclass
class Extraction:
    """Images -> rows in a file: what main was asked for, looked up and checked.

    run: the settings in the checkpoint; pca: None unless --whitened; shape: what one image gives.
    """

    args: argparse.Namespace
    device: torch.device
    log: Log
    model: Path
    net: DeepClusterNet
    settings: Settings
    pca: clustering.PCAWhitening | None
    shape: tuple[int, ...]
    base: Path  # OUT without its ending
    out: Path
    images: data.ImageList

    @property
    def part(self) -> Path:
        return self.out.with_name(f"{self.out.name}.part")

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    def rows(self, values: torch.Tensor) -> np.ndarray:
        """Activations (n, ...) on a device -> rows (n, D) in the dtype of the file."""
        args = self.args
        if self.pca is not None:
            points, _ = whiten(values, self.pca, self.settings.feature_dtype, self.device)
            return points.astype(args.dtype, copy=False)
        if args.pool is not None:
            values = F.adaptive_avg_pool2d(values, args.pool)
        # What float16 cannot hold becomes infinite here, and is found afterwards.
        return values.flatten(1).to(getattr(torch, args.dtype)).cpu().numpy()

    def what_decides(self) -> dict[str, Any]:
        """Everything on which a bit of the file depends, for the journal."""
        return {
            "model": file_digest(self.model),
            "images": self.images.digest(),
            "times of the images": hashlib.sha256(self.images.stamps().tobytes()).hexdigest(),
            "layer": self.args.layer,
            "pool": self.args.pool,
            "whitened": self.args.whitened,
            "dtype": self.args.dtype,
            "device": self.device.type,
            "torch": str(torch.__version__),
            **vars(self.settings),
        }

    def about(self) -> dict[str, Any]:
        """What stands in the metadata of a Parquet file."""
        return {
            "model": self.model,
            "arch": self.net.arch,
            "sobel": self.net.sobel is not None,
            "layer": self.args.layer,
            "shape": "x".join(map(str, self.shape)),
            "whitened": self.args.whitened,
            "image_size": self.settings.image_size,
            "precision": self.settings.precision,
        }

    def open_journal(self) -> Journal:
        """A new journal, or that of an earlier call whose work can be used."""
        path = self.out.with_name(f"{self.out.name}.journal")
        journal = Journal(path, self.what_decides())
        if self.args.restart or not journal.continue_from_file(self.part):
            path.unlink(missing_ok=True)
            return journal
        if any(data.broken_reason(self.images, i) is None for i in journal.broken):
            self.log(f"{self.part}: images that could not be decoded now can: beginning anew")
            return Journal(path, journal.settings)
        self.log(f"going on with {self.part}: {journal.done} of {len(self.images)} images are done")
        return journal

    def check_room(self, journal: Journal) -> None:
        """UserError where the disk cannot hold the result; Parquet is written from the finished .part."""
        row = self.width * np.dtype(self.args.dtype).itemsize
        more = len(self.images) if self.args.format == "parquet" else 0
        need, free = (len(self.images) - journal.done + more) * row, shutil.disk_usage(self.out.parent).free
        if need > free:
            raise UserError(
                f"--out {self.out}: {need / 2**30:.1f} GiB are still to be written, {free / 2**30:.1f} are "
                "free; choose another disk, --dtype float16, or --pool for maps"
            )

    def open_file(self, journal: Journal) -> "NpyFile | PickleFile":
        """The file to append to: new, or with what the journal vouches for."""
        try:
            if self.args.format == "pickle":
                return PickleFile(self.out, journal.size)
            return NpyFile(self.part, self.width, self.args.dtype, journal.size)
        except OSError as error:
            raise UserError(f"cannot write {self.part}: {error.strerror or error}") from error

    def write_rows(self, file: "NpyFile | PickleFile", journal: Journal) -> None:
        """Append the rows of the images that are not done; the journal follows every SYNC_SECONDS."""
        images, last = self.images, time.monotonic()
        progress = Progress(len(images) - journal.done, f"{self.args.layer} features", log=self.log)
        batches = feature_batches(
            self.net, images, self.args.layer, self.settings, self.args.workers, self.device, journal.done
        )
        for index, values, broken in batches:
            rows = self.rows(values)
            self.refuse_infinite(rows, index)
            file.append([images.paths[i] for i in index], rows)
            journal.broken += broken
            journal.done += len(index) + len(broken)
            progress.update(len(index) + len(broken))
            if time.monotonic() - last >= SYNC_SECONDS or journal.done == len(images):
                journal.size = file.sync()
                journal.write()
                last = time.monotonic()
        progress.close()

    def refuse_infinite(self, rows: np.ndarray, index: np.ndarray) -> None:
        """UserError for a feature that is no finite number."""
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            half = self.args.dtype == "float16"
            way = "float16 ends at 65504, use --dtype float32" if half else "the network has diverged"
            raise UserError(f"{self.images.path(index[finite.argmin()])}: its feature is not finite; {way}")

    def finish(self, file: "NpyFile | PickleFile", journal: Journal) -> None:
        """Give the complete file its name and write what belongs beside it; say what there is."""
        args, images, left_out = self.args, self.images, journal.broken
        if left_out and not args.skip_bad_images:
            refuse_bad(images, [(i, reason_of(images, i)) for i in left_out], self.base)
        if len(left_out) == len(images):
            raise UserError(f"{args.dir or args.shards}: none of the {len(images)} images can be decoded")
        keep = np.setdiff1d(np.arange(len(images)), left_out)
        names = (images.paths[i] for i in keep)
        file.finish()
        if args.format == "npy":
            write_names(self.base.with_name(f"{self.base.name}.txt"), names)
            os.replace(self.part, self.out)
        elif args.format == "parquet":
            npy_to_parquet(self.part, self.out, names, args.dtype, self.about())
            self.part.unlink()
        journal.path.unlink(missing_ok=True)
        self.log(
            f"{self.out}: {len(keep)} rows of {self.width} {args.dtype}"
            + (f", their names in {self.base}.txt" if args.format == "npy" else "")
            + (f"; left out {len(left_out)} images that cannot be decoded" if left_out else "")
            + f"; peak memory {peak_memory_gib():.2f} GiB"
        )


def reason_of(images: data.ImageList, i: int) -> str:
    """Why image i, which could not be decoded in the pass, cannot."""
    return data.broken_reason(images, i) or "could not be read for a moment, call again"


def open_extraction(args: argparse.Namespace) -> Extraction:
    """Look up everything that is needed, and check it, before the first image is decoded."""
    device = choose_device(args.device)
    if args.run or args.whitened:
        model, state = read_clustering(args.run or args.model)
    else:
        model, state = Path(args.model), checkpoint.read(args.model)
    pca = clustering.PCAWhitening.from_state_dict(state["whitening"]) if args.whitened else None
    run = state.get("args")
    del state  # the network is read once more, layer and all checked
    net = evaluation.open_network(str(model), [args.layer])
    settings = Settings.choose(args, run if isinstance(run, dict) else {}, device)
    shape = (pca.dim,) if pca else pooled(layer_shape(net, args.layer, settings.image_size), args)
    ending = ENDINGS[args.format]
    base = Path(args.out.removesuffix(ending))
    out = base.with_name(base.name + ending)
    make_folder(out.parent)
    images = open_images(args, settings.scaled)
    return Extraction(args, device, Log(), model, net.to(device), settings, pca, shape, base, out, images)


def pooled(shape: tuple[int, ...], args: argparse.Namespace) -> tuple[int, ...]:
    """The shape after --pool. Raises UserError where there is nothing to pool."""
    if args.pool is None:
        return shape
    if len(shape) != 3:
        raise UserError(f"--pool {args.pool}: {args.layer} is a vector of {shape[0]} numbers, not a map")
    if args.pool > min(shape[1:]):
        raise UserError(f"--pool {args.pool}: the maps of {args.layer} are only {shape[1]} x {shape[2]}")
    return (shape[0], args.pool, args.pool)


def main(args: argparse.Namespace) -> Path:
    """Write the file; returns its path."""
    check_arguments(args)
    work = open_extraction(args)
    shape = " x ".join(map(str, work.shape))
    work.log(
        f"{len(work.images)} images in {args.dir or args.shards}; {args.layer} ({shape}) of {work.net.arch} "
        f"in {work.model}, {work.settings.image_size} px, batches of {work.settings.batch}, on {work.device} "
        f"({work.settings.precision})"
    )
    journal = work.open_journal()
    work.check_room(journal)
    file = work.open_file(journal)
    try:
        work.write_rows(file, journal)
        work.finish(file, journal)
    finally:
        file.close()
    return work.out


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
