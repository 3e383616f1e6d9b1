"""Features of any layer for images: .npy with names, Parquet, or a pickle of the authors' form.

    python extract.py DIR --model exp/checkpoint.pth.tar --layer conv5 --out features/conv5
    python extract.py DIR --run exp --whitened --format parquet --out features/points

Rows are written as they come, in the order of the images: memory does not grow with their number. They lie in
OUT.npy.part meanwhile (evaluation/store.py): after a kill the same command goes on there, with batches that
begin where they would have begun, and gives the file of an uninterrupted run bit for bit. Parquet files and
pickles are made from the finished .part: for a while both lie on the disk.

OUT.npy comes with OUT.txt, the relative path of each row, one a line. In it a backslash is written as \\\\, a
line feed as \\n, a carriage return as \\r (formats.rows.read_names undoes that); other bytes are as they are.
"""

import argparse

from commandline import OWN_SIZE, Parser, add_data, add_image_size, add_machine, at_least


def get_parser() -> Parser:
    """The flags of extract.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_data(parser)
    add_features(parser.add_argument_group("features"))
    add_file(parser.add_argument_group("file"))
    add_computing(parser.add_argument_group("machine"))
    return parser


def add_features(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="FILE", help="a checkpoint of ours or of the authors; random:ARCH")
    group.add_argument(
        "--run",
        metavar="EXP",
        help="instead of --model: the network of a run's last clustering, EXP/clustering.pth.tar",
    )
    group.add_argument(
        "--layer",
        help="an activation of the network, e.g. conv5, fc7, layer4, avgpool (an unknown one is answered by "
        "their list; .pre: before the ReLU); maps (C, H, W) are flattened in this order (default: what is "
        "clustered)",
    )
    group.add_argument(
        "--pool",
        type=at_least(1),
        metavar="N",
        help="average maps to N x N first; small N for small files (default: they are kept whole)",
    )
    group.add_argument(
        "--whitened",
        action="store_true",
        help="the points that the run clustered: its layer, transformed as in the run, e.g. PCA-whitened and "
        "of norm 1 (with --run)",
    )


def add_file(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", required=True, metavar="OUT", help="file to write; its ending may be left out"
    )
    group.add_argument(
        "--format",
        choices=("npy", "parquet", "pickle"),
        default="npy",
        help="npy: OUT.npy and OUT.txt; parquet: OUT.parquet with columns path and feature; pickle: OUT.pkl, "
        "a list of (path, vector)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="float16 takes half the room and keeps 3 digits",
    )
    group.add_argument(
        "--restart", action="store_true", help="begin anew where an unfinished file of the same name lies"
    )


def add_computing(group: argparse._ArgumentGroup) -> None:
    """How it is computed, by default as in the run; assign.py has the same."""
    add_image_size(group, None, OWN_SIZE)
    group.add_argument(
        "--batch", type=at_least(1), help="images at a time (default: as in the run, else 256)"
    )
    add_machine(group, precision=None)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import hashlib
import importlib.util
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import data
from data import ImageList
from evaluation.store import Store
from features import Pass, Settings, ToPoints, activation_batches, bits_of, layer_shape, read_clustering
from formats.rows import FORMS, Files
from models import weights
from models.network import Network
from training.machine import peak_memory_gib
from util import Log, Progress, UserError, choose_device, make_folder, run_main

WAY_OUT = "give what it was made with, or another --out, or begin anew with --restart"


def main(args: argparse.Namespace) -> Path:
    """Write the file; returns its path."""
    check(args)
    files = Files.of(args.out, args.format)
    device, log = choose_device(args.device), Log()
    rows = open_rows(args, device)
    make_folder(files.final.parent)
    inputs = [rows.path] if rows.on_disk else []
    images = data.open_images(
        args.dir, args.shards, bad_list=files.bad, skip_bad=args.skip_bad_images, log=log,
        all_splits=args.all_splits,
        scaled=rows.settings.scaled, bits=rows.bits, workers=args.workers,
        enough=partial(check_images, outputs=files.written(), inputs=inputs),
    )  # fmt: skip
    log(rows.net.inputs.tell(args.image_size))
    log(f"{len(images)} images in {images.name}; {rows}, on {device} ({rows.settings.precision})")
    with Store(
        files.array, rows.width, args.dtype, what_decides(rows, images), WAY_OUT, args.restart
    ) as store:
        files.clear_left_over()
        go_on(store, images, log)
        check_room(files, store, len(images), rows.width * np.dtype(args.dtype).itemsize)
        write_rows(store, rows, images, args.workers, log)
        data.leave_out(images, data.reasons(images, store.broken), files.bad, args.skip_bad_images, log)
        check_images(images)
        FORMS[args.format](store, files.final, images.paths, rows.about())
    names = f", their names in {files.names}" if args.format == "npy" else ""
    log(
        f"{files.final}: {len(images)} rows of {rows.width} {args.dtype}{names}; peak memory "
        f"{peak_memory_gib():.2f} GiB"
    )
    return files.final


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if bool(args.model) == bool(args.run):
        raise UserError("give the network as --model FILE or as --run EXP, one of them")
    if args.whitened and args.pool:
        raise UserError(f"--pool {args.pool}: not with --whitened, whose points are no maps")
    if args.format == "pickle" and args.dtype != "float32":
        raise UserError(f"--dtype {args.dtype}: a pickle holds float32, as the authors' do; use --format npy")
    # Looked for only: with it loaded, extraction takes 0.3 GiB more.
    if args.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("--format parquet needs pyarrow: pip install -r requirements-extra.txt")


def check_images(images: ImageList, outputs: Iterable[Path] = (), inputs: Iterable[str | Path] = ()) -> None:
    """UserError where no image is left, and where one of the outputs is read."""
    if not len(images):
        raise UserError(f"{images.name}: none of the {len(images.skipped)} images can be decoded")
    data.refuse_overwriting(images, outputs, inputs)


# ---------------------------------------------------------------------------------------- what a row is


@dataclass
class Rows:
    """How an image becomes a row: the network in the file `path`, its layer, what is made of the activation.

    to_points: how a run made points of it, or None; shape: what one image gives, (C, H, W) or (D,); bits: of
    16-bit grey pictures, where the run tells.
    """

    path: str
    net: Network
    layer: str
    pool: int | None
    to_points: ToPoints | None
    settings: Settings
    dtype: str
    device: torch.device
    shape: tuple[int, ...]
    bits: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.layer} ({' x '.join(map(str, self.shape))}) of {self.net.arch} in {self.path}, "
            f"{self.settings.image_size} px, batches of {self.settings.batch}"
        )

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    @property
    def on_disk(self) -> bool:
        """Whether the network is in a file, and not random."""
        return not self.path.startswith("random:")

    def of(self, values: torch.Tensor | None) -> np.ndarray:
        """Activations (n, ...) on the device -> rows (n, D) in the dtype of the file; None: no rows."""
        if values is None:
            return np.empty((0, self.width), self.dtype)
        if self.to_points is not None:
            points, _ = self.to_points(values.flatten(1).cpu().numpy(), self.device)
            return points.astype(self.dtype, copy=False)
        if self.pool is not None:
            values = F.adaptive_avg_pool2d(values, self.pool)
        # What float16 cannot hold becomes infinite here, and is found afterwards.
        return values.flatten(1).to(getattr(torch, self.dtype)).cpu().numpy()

    def about(self) -> dict[str, Any]:
        """What stands in the metadata of a Parquet file."""
        return {
            "model": self.path,
            "arch": self.net.arch,
            "sobel": self.net.sobel is not None,
            "layer": self.layer,
            "shape": "x".join(map(str, self.shape)),
            "whitened": self.to_points is not None,
            "image_size": self.settings.image_size,
            "precision": self.settings.precision,
        }


def open_rows(args: argparse.Namespace, device: torch.device) -> Rows:
    """Look up the network, the layer and the settings, and check them."""
    path, state = args.model, {}
    if args.run or args.whitened:
        path, state = read_clustering(args.run or args.model)
    elif not path.startswith("random:"):
        state = checkpoint.read(path)
    to_points = ToPoints.from_state_dict(state["transform"]) if args.whitened else None
    layer = args.layer
    if args.whitened:
        layer = state["layer"]
        if args.layer not in (None, layer):
            raise UserError(f"--whitened: the run clustered {layer}, not --layer {args.layer}")
    run, bits = state.get("args"), bits_of(state)
    del state  # its weights are read into the network
    net = weights.load(path, [layer] if layer else []).to(device)
    layer = layer or net.feature
    run = run if isinstance(run, dict) else {}
    settings = Settings.choose(run, device, args.image_size, args.batch, args.precision)
    shape = pooled(layer_shape(net, layer, settings.image_size), args.pool, layer)
    shape = (to_points.dim(math.prod(shape)),) if to_points else shape
    return Rows(str(path), net, layer, args.pool, to_points, settings, args.dtype, device, shape, bits)


def pooled(shape: tuple[int, ...], pool: int | None, layer: str) -> tuple[int, ...]:
    """The shape after --pool. Raises UserError where there is nothing to pool."""
    if pool is None:
        return shape
    if len(shape) != 3:
        raise UserError(f"--pool {pool}: {layer} is a vector of {shape[0]} numbers, not a map")
    if pool > min(shape[1:]):
        raise UserError(f"--pool {pool}: the maps of {layer} are only {shape[1]} x {shape[2]}")
    return (shape[0], pool, pool)


def what_decides(rows: Rows, images: ImageList) -> dict[str, Any]:
    """Everything on which a bit of the rows depends."""
    network = rows.path
    if rows.on_disk:
        with open(rows.path, "rb") as file:
            network = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "network": network,
        "list of images": images.digest(),
        "state of the images": hashlib.sha256(images.stamps().tobytes()).hexdigest(),
        "bits": images.bits,
        "layer": rows.layer,
        "pool": rows.pool,
        "whitened": rows.to_points is not None,
        "device": rows.device.type,
        "torch": str(torch.__version__),
        **vars(rows.settings),
    }


# ---------------------------------------------------------------------------------------- the pass


def go_on(store: Store, images: ImageList, log: Log) -> None:
    """Say what an earlier call has done; begin anew if images that it could not decode can be decoded."""
    if any(data.broken_reason(images, i) is None for i in store.broken):
        log(f"{store.part}: images that could not be decoded now can: beginning anew")
        store.restart()
    if store.done:
        log(f"going on with {store.part}: {store.done} of {len(images)} images are done")


def write_rows(store: Store, rows: Rows, images: ImageList, workers: int, log: Log) -> None:
    """Append the rows of the images that are not done."""
    view = data.PlainView(images, data.central_crop(rows.settings.image_size))
    how = Pass(rows.settings.batch, workers, rows.device, rows.settings.precision)
    left = range(store.done, len(images))
    progress = Progress(len(left), f"{rows.layer} features", log=log)
    for found, index, broken in activation_batches(rows.net, [rows.layer], view, how, left):
        block = rows.of(found.get(rows.layer))
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            half = rows.dtype == "float16"
            way = "float16 ends at 65504, use --dtype float32" if half else "the network has diverged"
            raise UserError(f"{images.path(index[finite.argmin()])}: its feature is not finite; {way}")
        store.append(block, len(index) + len(broken), broken)
        progress.update(len(index) + len(broken))
    progress.close()


def check_room(files: Files, store: Store, images: int, row: int) -> None:
    """UserError where the disk cannot hold the result; row: bytes of one."""
    twice = 0 if files.form == "npy" else images
    need, free = (images - store.done + twice) * row, shutil.disk_usage(files.final.parent).free
    if need > free:
        raise UserError(
            f"--out {files.final}: {need / 2**30:.1f} GiB are still to be written, {free / 2**30:.1f} are "
            "free; choose another disk, --dtype float16, or --pool for maps"
        )


if __name__ == "__main__":
    run_main(main, ARGS)
