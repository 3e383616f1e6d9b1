"""Unsupervised training of a convnet by DeepCluster (Caron et al., ECCV 2018).

    ./main.sh                                         the demo: train on the embedded photographs
    python main.py DIR --sobel --exp exp              the paper's settings on a folder of images
    python main.py DIR --sobel --exp exp --resume exp/checkpoint.pth.tar
    torchrun --nproc-per-node=8 main.py DIR --sobel --exp exp --sync-bn --resume auto

One epoch (section 3 of the paper): features of all images -> PCA-whitening, L2 -> k-means -> the cluster ids
are the labels of one epoch of classification with a fresh head.
"""

import argparse
import contextlib
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cache
import checkpoint
import clustering
import data
import distributed
import logbook
import models
import sampling
import shards
from features import PRECISIONS, extract_features, set_precision
from models.parallel import Share, share_among_ranks
from util import (
    AverageMeter,
    Log,
    Preempted,
    Progress,
    UserError,
    add_device_argument,
    atomic_write,
    derive_seed,
    make_folder,
    peak_memory_gib,
    run_main,
    write_json,
)

PCA_DIM = 256  # section 3.4 of the paper: PCA-reduced to 256 dimensions, whitened, L2-normalised
# A resumed run is the same run: these settings must be what they were.
FIXED_SETTINGS = (
    "arch", "sobel", "clustering", "nmb_cluster", "seed", "batch", "reassign", "sampling", "image_size",
    "feature_dtype", "scaled_decoding",
)  # fmt: skip

MAY_CHANGE = ("lr", "wd", "momentum", "precision", "kmeans", "sync_bn", "compile")  # but a change is told


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="PyTorch Implementation of DeepCluster",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dir", metavar="DIR", nargs="?", help="path to dataset: a folder of images or a .txt file of paths"
    )
    parser.add_argument(
        "--shards",
        metavar="PATTERN",
        default=None,
        help="instead of DIR: tar shards, e.g. 'train-{000000..000146}.tar' (tools/make_shards.py)",
    )

    group = parser.add_argument_group("network")
    group.add_argument(
        "--arch",
        "-a",
        default="alexnet",
        metavar="ARCH",
        help="CNN architecture: alexnet or vgg16 (default: alexnet)",
    )
    group.add_argument("--sobel", action="store_true", help="Sobel filtering")
    group.add_argument(
        "--init",
        metavar="PATH",
        default=None,
        help="take the weights (not the head, not the optimiser) from this checkpoint",
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the crops, cut after resizing the shorter side to 256/224 of it (default: 224)",
    )

    group = parser.add_argument_group("clustering")
    group.add_argument(
        "--clustering",
        choices=list(clustering.CLUSTERINGS),
        default="Kmeans",
        help="clustering algorithm (default: Kmeans)",
    )
    group.add_argument(
        "--nmb_cluster",
        "--k",
        type=int,
        default=10000,
        help="number of cluster for k-means (default: 10000); about ten times the number of "
        "classes that you expect",
    )
    group.add_argument(
        "--kmeans",
        choices=("faiss", "distributed"),
        default="faiss",
        help="with several processes: faiss on the first one and all its GPUs, or Lloyd's iterations with "
        "each process keeping its rows (default: faiss)",
    )
    group.add_argument(
        "--reassign",
        type=float,
        default=1.0,
        help="how many epochs of training between two consecutive reassignments of clusters (default: 1)",
    )
    group.add_argument(
        "--sampling",
        choices=list(sampling.SAMPLERS),
        default="uniform",
        help="uniform: over clusters, as in the paper; released: as the authors' code did, in "
        "proportion to cluster size (default: uniform)",
    )
    group.add_argument(
        "--feature-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how the features of all images are held in memory (default: float32)",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    group.add_argument("--wd", type=float, default=-5, help="weight decay pow (default: -5)")
    group.add_argument("--momentum", type=float, default=0.9, help="momentum (default: 0.9)")
    group.add_argument(
        "--batch", type=int, default=256, help="mini-batch size, of all processes together (default: 256)"
    )
    group.add_argument("--epochs", type=int, default=200, help="number of total epochs to run (default: 200)")
    group.add_argument(
        "--start_epoch",
        type=int,
        default=0,
        help="manual epoch number (useful on restarts from --init) (default: 0)",
    )
    group.add_argument("--seed", type=int, default=31, help="random seed (default: 31)")
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch norm over the whole batch rather than each process's part of it",
    )

    group = parser.add_argument_group("files")
    group.add_argument("--exp", default="exp", metavar="EXP", help="path to exp folder (default: exp)")
    group.add_argument(
        "--resume",
        metavar="PATH",
        default=None,
        help="path to checkpoint: continue that run exactly; auto: the latest in EXP, if any (default: None)",
    )
    group.add_argument(
        "--checkpoints",
        type=int,
        default=25000,
        help="how many iterations between two checkpoints (default: 25000)",
    )
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out files that cannot be decoded instead of stopping with their list",
    )

    group.add_argument(
        "--no-report", action="store_true", help="no report and no gallery of the clusters at the end"
    )

    group = parser.add_argument_group("machine and output")
    group.add_argument(
        "--workers", type=int, default=4, help="number of data loading workers of each process (default: 4)"
    )
    group.add_argument(
        "--crop-cache",
        metavar="FOLDER",
        default="auto",
        help="keep the exact central crops in a file there, so that feature passes after the first do not "
        "decode (150 KB an image at 224 pixels); auto: in EXP for small sets while the run lasts; off "
        "(default: auto)",
    )
    group.add_argument(
        "--scaled-decoding",
        action="store_true",
        help="decode JPEGs of 1024 pixels or more at a fraction of their size: faster, other pixels",
    )
    add_device_argument(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="arithmetic of the convnet: fp32 is exact; tf32 and fp16 (CUDA) and bf16 (CUDA, CPUs with AMX) "
        "are faster and give a slightly different run (default: fp32 on every device)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training step; on a CPU it takes a C++ compiler and gains nothing",
    )
    group.add_argument("--tensorboard", action="store_true", help="also write EXP/tensorboard")
    group.add_argument("--verbose", action="store_true", help="chatty")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train; everything that is learnt is written into args.exp. Under torchrun, one of several processes."""
    device = distributed.init(args.device)
    try:
        distributed.on_main(check_arguments, args)
        set_precision(args.precision, device)
        args.resume = distributed.on_main(find_resume, args)
        run = open_run(args, device)
        with preemptible(run):
            train_epochs(run)
    finally:
        distributed.shutdown()


def open_run(args: argparse.Namespace, device: torch.device) -> "Run":
    """Images, network and state of a new run, or of the one that args.resume names."""
    saved = checkpoint.read(args.resume) if args.resume else None
    exp = distributed.on_main(open_exp, args)
    log = Log(exp / "train.log") if distributed.is_main() else Log(quiet=True)
    images = open_images(args, saved, exp, log)
    net = models.build(args.arch, args.sobel, seed=derive_seed(args.seed, "weights"))
    if args.init:
        checkpoint.init_weights(net, args.init)
    share = Share()
    if distributed.world_size() > 1:
        share_among_ranks(net, share, args.sync_bn)
    if args.compile:
        net.compile()
    run = Run(args, net.to(device, memory_format=torch.channels_last), device, exp, log, images, share)
    if saved is not None:
        run.restore(saved)
    announce(run)
    if distributed.is_main():
        write_config(run)
    return run


def train_epochs(run: "Run") -> None:
    """The loop of the paper's section 3, until the run has its epochs."""
    args, exp = run.args, run.exp
    board = logbook.open_tensorboard(exp) if args.tensorboard and distributed.is_main() else None
    if run.epoch >= args.epochs:
        run.log(f"nothing to do: this run has its {run.epoch} epochs; ask for more with --epochs")
    while run.epoch < args.epochs:
        if not run.clustered:
            features = run.features()
            run.cluster(features)
            del features  # N x 4096 is held only while it is clustered
            run.fresh_head()
        run.train()
        record = run.finish_epoch()
        if board is not None:
            logbook.to_tensorboard(board, record)
    run.drop_cache()
    run.log(
        f"done: {run.epoch} epochs. Weights: {exp}/checkpoint.pth.tar  log: {exp}/log.jsonl  "
        f"clusters: {exp}/assignments.csv, {exp}/clusters"
    )
    if distributed.is_main() and not args.no_report:
        write_pictures(run)


def write_pictures(run: "Run") -> None:
    """The report and the gallery of the run; a failure there does not undo the training."""
    from visu.clusters import write_gallery
    from visu.report import write_report

    a, exp = run.assignment, run.exp
    try:
        write_gallery(
            run.images, a.labels, a.distances, exp / "clusters.html", num_clusters=a.num_clusters,
            seed=run.args.seed, name=exp.resolve().name, log=run.log,
        )  # fmt: skip
        run.log(f"gallery of the clusters: {exp}/clusters.html")
        png, page = write_report(exp)
        run.log(f"report: {page}, {png}")
    except UserError as error:
        run.log(f"no report: {error}")


@contextlib.contextmanager
def preemptible(run: "Run") -> Iterator[None]:
    """While the block runs, SIGTERM and SIGUSR1 (SLURM's warning) end the run so that it can be continued.

    In training a checkpoint is written after the iteration that is being made. Elsewhere the last one is
    still what the run goes on from, and it ends at once. Raises Preempted.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return

    def stop(number: int, _: Any) -> None:
        run.stop_asked = True
        if not run.training:
            raise Preempted(f"{signal.Signals(number).name}: go on with --resume auto")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------- before any long work


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    shards.check_source(args.dir, args.shards)
    if args.arch not in models.ARCHITECTURES:
        raise UserError(f"--arch {args.arch}: unknown; choose one of {', '.join(models.ARCHITECTURES)}")
    if args.clustering == "Kmeans" and args.nmb_cluster < 2:
        raise UserError(f"--nmb_cluster {args.nmb_cluster}: k-means needs at least 2 clusters")
    smallest = {"batch": 1, "epochs": 1, "checkpoints": 1, "start_epoch": 0, "workers": 0, "seed": 0}
    for name, least in (smallest | {"image_size": 16}).items():
        flag, value = f"--{name.replace('image_size', 'image-size')}", getattr(args, name)
        if value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise UserError(f"--lr {args.lr}: must be a positive number (the paper: 0.05)")
    if not 0 <= args.momentum < 1:
        raise UserError(f"--momentum {args.momentum}: must be in [0, 1) (the paper: 0.9)")
    if not math.isfinite(args.wd):
        raise UserError(f"--wd {args.wd}: must be a power of ten such as -5, for 10**-5")
    if not (math.isfinite(args.reassign) and args.reassign > 0):
        raise UserError(f"--reassign {args.reassign}: must be a positive number of epochs")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: the run ends at --epochs {args.epochs}")
    if args.kmeans == "distributed" and args.clustering != "Kmeans":
        raise UserError(f"--kmeans distributed: not with --clustering {args.clustering}")
    if args.batch < distributed.world_size():
        raise UserError(f"--batch {args.batch}: is of all {distributed.world_size()} processes together")
    if args.resume and args.resume != "auto" and args.init:
        raise UserError("--resume and --init: a resumed run has its own weights; give one of them")
    if args.resume and args.start_epoch:
        raise UserError(
            "--start_epoch with --resume: the checkpoint knows its epoch; leave --start_epoch out"
        )


def find_resume(args: argparse.Namespace) -> str | None:
    """The checkpoint that --resume names; for `auto` the newest one in EXP, if there is one."""
    if args.resume != "auto":
        return args.resume
    exp = Path(args.exp)
    found = [*exp.glob("checkpoints/checkpoint_*.pth.tar"), *exp.glob("checkpoint.pth.tar")]
    return str(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None


def open_exp(args: argparse.Namespace) -> Path:
    """The folder of the run; it must be writable, and empty of other runs unless this one is resumed."""
    exp = Path(args.exp)
    if args.resume is None or run_folder(args.resume).resolve() != exp.resolve():
        for name in ("checkpoint.pth.tar", "clusters", "log.jsonl", "checkpoints/checkpoint_0.pth.tar"):
            if (exp / name).exists():
                raise UserError(
                    f"--exp {exp}: holds another run ({name}); continue it with --resume "
                    f"{exp}/checkpoint.pth.tar, or choose another folder"
                )
    make_folder(exp)
    make_folder(exp / "checkpoints")
    return exp


def run_folder(path: str | Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def open_images(
    args: argparse.Namespace, saved: dict[str, Any] | None, exp: Path, log: Log
) -> data.ImageList:
    """The images of the run: listed, enough for k, their headers checked, as many as the resumed run had."""
    images = shards.list_source(args.dir, args.shards, args.scaled_decoding)
    check_enough(images, args)
    if saved is not None and saved.get("skipped"):
        images = drop(images, np.isin(list(images.paths), saved["skipped"]))
    cores = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    if args.workers > cores:
        of = "this machine" if distributed.world_size() == 1 else "each process"
        log(f"warning: --workers {args.workers}, but {of} has {cores} core(s); {cores} would do")
    bad = distributed.on_main(data.check_headers, images, workers=max(args.workers, 1))
    return leave_out_bad(images, bad, args, exp, log)


def source_of(args: argparse.Namespace) -> str:
    """What the user named the images by."""
    return args.dir or args.shards


def check_enough(images: data.ImageList, args: argparse.Namespace) -> None:
    if args.clustering == "Kmeans" and args.nmb_cluster > len(images):
        raise UserError(
            f"--nmb_cluster {args.nmb_cluster}: more clusters than images, {source_of(args)} has "
            f"{len(images)}; use --k with about ten times the number of classes that you expect"
        )
    if len(images) < 2:
        raise UserError(f"{source_of(args)}: {len(images)} image is not enough to cluster")


def drop(images: data.ImageList, mask: np.ndarray) -> data.ImageList:
    return images.keep(~mask) if mask.any() else images


def leave_out_bad(
    images: data.ImageList, bad: list[tuple[int, str]], args: argparse.Namespace, exp: Path, log: Log
) -> data.ImageList:
    """Images without the bad ones (`--skip-bad-images`), or a UserError that lists them."""
    if not bad:
        return images
    names = exp / "bad_images.txt"
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    lines += [f"{images.path(i)}\t{reason}" for i, reason in bad]
    if distributed.is_main():
        with atomic_write(names) as file:
            file.writelines(f"{line}\n" for line in dict.fromkeys(lines))
    if not args.skip_bad_images:
        raise data.cannot_decode(images, bad, names)
    log(f"left out {len(bad)} of {len(images)} images that cannot be decoded, listed in {names}")
    mask = np.zeros(len(images), dtype=bool)
    mask[[i for i, _ in bad]] = True
    images = drop(images, mask)
    check_enough(images, args)
    return images


def announce(run: "Run") -> None:
    """Say what is about to happen, and what memory it takes."""
    args, n = run.args, len(run.images)
    classes = "no class folders" if run.images.classes is None else f"{len(run.images.class_names)} classes"
    size = n * run.net.feature_dim * np.dtype(args.feature_dtype).itemsize / 2**30
    processes = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    k = f", k {args.nmb_cluster}" if args.clustering == "Kmeans" else ""
    run.log(f"{n} images in {source_of(args)} ({classes}, for the log only)")
    run.log(
        f"{args.arch}{' with Sobel' if args.sobel else ''} at {args.image_size} px on {run.device} "
        f"({args.precision}){processes}, {args.clustering}{k}, {args.sampling} sampling, epochs "
        f"{run.epoch} to {args.epochs}; features take {size:.2f} GiB"
    )
    if args.verbose:
        run.log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


def write_config(run: "Run") -> None:
    """EXP/config.json: what was asked for, on which images, by which versions; pictures read it."""
    sources = {"dir": run.args.dir, "shards": run.args.shards}
    write_json(run.exp / "config.json", {
        "args": vars(run.args) | {name: value and os.path.abspath(value) for name, value in sources.items()},
        "images": {
            "root": os.path.abspath(run.images.root),
            "number": len(run.images),
            "classes": run.images.class_names,
        },
        "device": str(run.device),
        "versions": versions(),
        "command": sys.argv,
    })  # fmt: skip


# ------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """The state of a training: what a checkpoint holds, and the steps of an epoch that change it.

    clustered says whether the clustering of this epoch is done, so that training is what comes next; position
    counts the iterations done since, iteration those of the whole training. assignment is the last one made.
    """

    args: argparse.Namespace
    net: models.DeepClusterNet
    device: torch.device
    exp: Path
    log: Log
    images: data.ImageList
    share: Share
    epoch: int = 0
    clustered: bool = False
    position: int = 0
    iteration: int = 0
    assignment: clustering.Assignment | None = None
    whitening: clustering.PCAWhitening | None = None
    record: dict[str, Any] = field(default_factory=dict)  # what is known of this epoch's log line
    meter: AverageMeter = field(default_factory=AverageMeter)
    skipped: list[str] = field(default_factory=list)  # images left out because they cannot be decoded

    def __post_init__(self) -> None:
        self.epoch = self.args.start_epoch
        self.body = sgd(self.net, self.args, self.args.momentum)
        self.head: torch.optim.SGD | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.args.precision == "fp16")
        self.cluster_log: logbook.ClusterLog | None = None
        self.crops: cache.CropCache | None = None
        self.training = self.stop_asked = False  # for signals that come meanwhile

    # -- 1. features

    def features(self) -> np.ndarray:
        """Features of this process's images in data-set order: (N, 4096), before the last ReLU, in eval mode.

        One process has all images; of several, each has consecutive ones.
        """
        args, start = self.args, time.monotonic()
        rows = distributed.shard(len(self.images))
        view = data.CentralView(self.images, args.image_size, cache=self.open_cache())
        loader = data.make_loader(
            view, args.batch, args.workers, sampler=rows, pin_memory=self.device.type == "cuda"
        )
        label = f"epoch {self.epoch} features" + (" of rank 0" if distributed.world_size() > 1 else "")
        progress = Progress(len(rows), label, log=self.log)
        features, broken = extract_features(
            self.net, loader, models.FEATURE, len(rows), self.device, args.precision,
            np.dtype(args.feature_dtype), progress, first=rows.start,
        )  # fmt: skip
        progress.close()
        broken = sorted(i for part in distributed.gather_objects(broken) for i in part)
        self.record = {"epoch": self.epoch, "seconds": {"features": time.monotonic() - start}}
        return self.without_broken(features, broken, rows) if broken else features

    def open_cache(self) -> cache.CropCache | None:
        """The file of central crops that feature passes after the first read, where there is to be one."""
        folder = self.cache_folder()
        if self.crops is None and folder is not None:
            size = self.args.image_size
            if self.args.crop_cache == "auto":
                room = distributed.on_main(cache.free_bytes, self.exp)
                if not cache.automatic(len(self.images), size, room):
                    return None
            distributed.on_main(make_folder, folder)
            self.crops = cache.CropCache(folder, self.images, size)
        return self.crops

    def cache_folder(self) -> Path | None:
        choice = self.args.crop_cache
        return {"auto": self.exp / "crops", "off": None}.get(choice, Path(choice))

    def drop_cache(self) -> None:
        """Delete the cache that nobody asked for; one that has a folder of its own stays for the next run."""
        self.crops = None
        if self.args.crop_cache == "auto" and distributed.is_main():
            shutil.rmtree(self.exp / "crops", ignore_errors=True)

    def without_broken(self, features: np.ndarray, broken: list[int], rows: range) -> np.ndarray:
        """Images that turn out to be undecodable leave the run before its first training step, or stop it.

        features: those of the images `rows`; broken: images of all processes.
        """
        bad = [(i, data.broken_reason(self.images, i)) for i in broken]
        if self.iteration > 0:
            raise UserError(
                f"{self.images.path(broken[0])}: was readable before and is no longer: {bad[0][1]}"
            )
        kept = np.setdiff1d(np.arange(rows.start, rows.stop), broken) - rows.start
        names = list(self.images.paths)
        self.images = leave_out_bad(self.images, bad, self.args, self.exp, self.log)
        self.skipped += [names[i] for i in broken]
        self.crops = None  # it has rows for images that are no longer there
        for start in range(0, len(kept), 1024):  # in place: kept[i] >= i, so no row is overwritten unread
            rows = kept[start : start + 1024]
            features[start : start + len(rows)] = features[rows]
        return features[: len(kept)]

    # -- 2. to 4. preprocessing, clustering, labels

    def cluster(self, features: np.ndarray) -> None:
        """PCA-whitening, L2, clustering; logs the assignment against the last one and the classes."""
        args, start, previous = self.args, time.monotonic(), self.assignment
        progress = Progress(2, f"epoch {self.epoch} clustering", unit="step", log=self.log)
        progress.update(0, "PCA-whitening")
        self.whitening, x = clustering.preprocess(features, PCA_DIM, self.device, sharded=True)
        if x.shape[1] < PCA_DIM:
            self.log(f"PCA keeps {x.shape[1]} dimensions: the features have no more (the paper: {PCA_DIM})")
        middle = time.monotonic()
        progress.update(1, args.clustering)
        seed = derive_seed(args.seed, "clustering", self.epoch)
        points = None
        if args.kmeans == "distributed":
            self.assignment = clustering.kmeans_distributed(x, args.nmb_cluster, seed, device=self.device)
        else:
            points = distributed.gather_rows(x)  # N x 256, on the first process
            self.assignment = distributed.on_main(self.cluster_points, points, seed)
        progress.clear()
        self.clustered = True
        self.record["seconds"] |= {"pca": middle - start, "clustering": time.monotonic() - middle}
        self.record |= {
            "clustering_loss": self.assignment.objective,
            "pca_dims": x.shape[1],
            "clusters": clustering.cluster_sizes(self.assignment),
        }
        others = {
            "previous": None if previous is None else previous.labels,  # figure 2b
            "classes": self.images.classes,  # figure 2a
        }
        for what, labels in others.items():
            if labels is not None:
                scores = clustering.compare(self.assignment.labels, labels)
                self.record |= {f"{name}_{what}": value for name, value in scores.items()}
        if distributed.is_main():
            self.write_assignment(points)
        self.tell_clusters()

    def cluster_points(self, x: np.ndarray, seed: int) -> clustering.Assignment:
        """Cluster all points (N, d) in this process, with the cores of those that wait for it."""
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        try:
            cluster = clustering.CLUSTERINGS[self.args.clustering]
            return cluster(x, k=self.args.nmb_cluster, seed=seed, device=self.device)
        finally:
            faiss.omp_set_num_threads(threads)

    def write_assignment(self, points: np.ndarray | None) -> None:
        """Append to EXP/clusters, rewrite EXP/assignments.csv and EXP/clustering.pth.tar.

        The last one is what assigning other images takes: PCA and centroids fit the weights of this moment,
        which the training that follows changes. PIC has no centroids: its points (N, d) are kept, and an
        image goes to the cluster of the nearest one.
        """
        if self.cluster_log is None:
            self.cluster_log = logbook.ClusterLog(self.exp / "clusters")
        self.cluster_log.append(self.assignment.lists())
        self.write_csv()
        weights = self.net.state_dict()
        pic = self.args.clustering == "PIC"
        checkpoint.save(self.exp / checkpoint.CLUSTERING, {
            "epoch": self.epoch,
            "arch": self.args.arch,
            "state_dict": {name: w for name, w in weights.items() if not name.startswith("top_layer.")},
            "whitening": self.whitening.state_dict(),
            "assignment": self.assignment.state_dict(),
            "points": torch.from_numpy(points) if pic else None,
            "paths": list(self.images.paths),
            "args": vars(self.args),
        })  # fmt: skip

    def write_csv(self) -> None:
        logbook.write_assignments(
            self.exp / "assignments.csv",
            list(self.images.paths),
            self.assignment.labels,
            self.assignment.distances,
        )

    def tell_clusters(self) -> None:
        """One line on the clustering, and a warning when it collapses."""
        record, sizes = self.record, self.record["clusters"]
        nmi = "".join(
            f"  NMI to {name} {record[f'nmi_{what}']:.3f} (AMI {record[f'ami_{what}']:.3f})"
            for what, name in (("previous", "last epoch"), ("classes", "classes"))
            if f"nmi_{what}" in record
        )
        self.log(
            f"epoch {self.epoch} clustering loss {self.assignment.objective:.6g}  {sizes['nonempty']} of "
            f"{self.assignment.num_clusters} clusters filled, sizes {sizes['min']} to {sizes['max']}{nmi}  "
            f"{record['seconds']['pca'] + record['seconds']['clustering']:.1f} s"
        )
        if sizes["max"] > len(self.images) / 2:
            self.log(
                f"warning: collapse, the largest cluster holds {sizes['max']} of {len(self.images)} images; "
                "try a lower --lr, another --k, or colour instead of --sobel"
            )

    def fresh_head(self) -> None:
        """A new head N(0, 0.01) with one output per cluster, and its own optimiser without momentum."""
        self.net.set_head(self.assignment.num_clusters, derive_seed(self.args.seed, "head", self.epoch))
        self.head = sgd(self.net.top_layer, self.args, momentum=0.0)

    # -- 5. training

    def train(self) -> None:
        """What is left of this epoch's pass over int(reassign * N) images, with checkpoints on the way."""
        args, start, before = self.args, time.monotonic(), self.meter.count
        total = max(int(args.reassign * len(self.images)), 1)
        draw = sampling.SAMPLERS[args.sampling]
        draws = draw(self.assignment.labels, total, derive_seed(args.seed, "sampling", self.epoch))
        view = data.TrainView(self.images, args.image_size, args.seed, self.epoch)
        sampler = sampling.ShareSampler(
            draws, args.batch, self.position, distributed.rank(), distributed.world_size()
        )
        loader = data.make_loader(
            view, args.batch, args.workers, batch_sampler=sampler, pin_memory=self.device.type == "cuda"
        )
        left = max(total - self.position * args.batch, 0)
        progress = Progress(left, f"epoch {self.epoch} training", log=self.log)
        self.training = True
        try:
            train_epoch(
                across_ranks(self.net), (self.body, self.head),
                deal(loader, sampler, self.share, args.image_size),
                torch.from_numpy(self.assignment.labels), self.device, args.precision, self.before_step,
                self.meter, progress, self.share, self.scaler, lambda: self.stop_asked,
            )  # fmt: skip
        except Preempted:
            self.save(self.exp / "checkpoint.pth.tar")
            raise
        finally:
            self.training = False
        if not args.sync_bn:  # each process has its own running statistics: the first one's are the network's
            distributed.broadcast_tensors(self.net.buffers())
        progress.close(f"loss {self.meter.avg:.4f}")
        seconds = time.monotonic() - start
        self.record["seconds"]["train"] = seconds
        self.record["images_per_second"] = {
            "features": round(len(self.images) / self.record["seconds"]["features"], 1),
            "train": round((self.meter.count - before) / seconds, 1),
        }

    def before_step(self) -> int:
        """Called before each step: writes a periodic checkpoint when one is due; gives the step's seed."""
        if self.iteration % self.args.checkpoints == 0:
            n = self.iteration // self.args.checkpoints
            self.save(self.exp / "checkpoints" / f"checkpoint_{n}.pth.tar")
        if self.args.verbose and self.position and self.position % 100 == 0:
            self.log(f"epoch {self.epoch} iteration {self.position} mean loss {self.meter.avg:.4f}")
        self.position += 1
        self.iteration += 1
        return derive_seed(self.args.seed, "step", self.iteration)

    # -- 6. log and checkpoint

    def finish_epoch(self) -> dict[str, Any]:
        """Write the epoch's log line and checkpoint, and stand before the next epoch; returns the record."""
        record, loss = self.record, self.meter.avg
        log_k = math.log(max(self.assignment.num_clusters, 2))
        record |= {"loss": loss, "loss_over_log_k": loss / log_k, "iteration": self.iteration}
        record["seconds"]["total"] = sum(record["seconds"].values())
        record["seconds"] = {name: round(value, 2) for name, value in record["seconds"].items()}
        record["peak_memory_gib"] = round(peak_memory_gib(), 3)
        if self.device.type == "cuda":
            record["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        if self.epoch >= 2 and loss > 0.98 * log_k:
            self.log(
                f"warning: the loss {loss:.3f} is stuck at log k = {log_k:.3f}: the cluster ids are not "
                "being learnt; try another --lr or a smaller --k"
            )
        self.epoch, self.clustered, self.position = self.epoch + 1, False, 0
        self.record, self.meter = {}, AverageMeter()
        if distributed.is_main():
            logbook.append_line(self.exp / "log.jsonl", record)
        self.save(self.exp / "checkpoint.pth.tar")
        return record

    def save(self, path: Path) -> None:
        """Everything from which the run goes on exactly; `epoch` is the one to go on with."""
        if not distributed.is_main():
            return
        assignment = self.assignment
        checkpoint.save(path, {
            "epoch": self.epoch,
            "arch": self.args.arch,
            "state_dict": self.net.state_dict(),
            "optimizer": self.body.state_dict(),
            "optimizer_head": self.head.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clustered": self.clustered,
            "position": self.position,
            "iteration": self.iteration,
            "assignment": assignment.state_dict(),
            "whitening": self.whitening.state_dict(),
            "record": self.record,
            "loss": {"sum": self.meter.sum, "count": self.meter.count},
            "clusters_size": self.cluster_log.size,
            "images": {"number": len(self.images), "digest": self.images.digest()},
            "skipped": self.skipped,
            "args": vars(self.args),
            "versions": versions(),
        })  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on after a checkpoint that `save` wrote. Raises UserError where it is not this run's."""
        path = Path(self.args.resume)
        check_same_run(saved, self.args, self.images, self.log)
        self.assignment = clustering.Assignment.from_state_dict(saved["assignment"])
        self.whitening = clustering.PCAWhitening.from_state_dict(saved["whitening"])
        self.net.set_head(self.assignment.num_clusters, seed=0)
        checkpoint.load_weights(self.net, checkpoint.model_weights(saved, path)[1], path)
        self.head = sgd(self.net.top_layer, self.args, momentum=0.0)
        for optimizer, name in ((self.body, "optimizer"), (self.head, "optimizer_head")):
            groups = optimizer.state_dict()["param_groups"]  # lr, momentum and wd of the command line stand
            optimizer.load_state_dict({"state": saved[name]["state"], "param_groups": groups})
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.clustered = saved["epoch"], saved["clustered"]
        self.position, self.iteration = saved["position"], saved["iteration"]
        self.record, self.skipped = saved["record"], saved["skipped"]
        self.meter.sum, self.meter.count = saved["loss"]["sum"], saved["loss"]["count"]
        distributed.on_main(self.restore_files, run_folder(path), saved["clusters_size"])
        self.log(f"resuming {path} in epoch {self.epoch} after {self.iteration} iterations")

    def restore_files(self, origin: Path, clusters_size: int) -> None:
        """Bring the logs, and the list of assignments, to what the checkpoint had seen."""
        self.cluster_log = logbook.continue_logs(self.exp, origin, clusters_size, self.epoch)
        self.write_csv()


def check_same_run(saved: dict[str, Any], args: argparse.Namespace, images: data.ImageList, log: Log) -> None:
    """A checkpoint goes on only with the settings and images it was made with; says which differ."""
    needed = ("assignment", "whitening", "optimizer", "optimizer_head", "clusters_size", "args", "images")
    missing = [name for name in needed if name not in saved]
    if missing:
        raise UserError(
            f"--resume {args.resume}: holds no {missing[0]}, so it is not a checkpoint of a run of this "
            "program; to start from its weights use --init"
        )
    was = saved["args"]
    for name in FIXED_SETTINGS:
        if name == "nmb_cluster" and args.clustering == "PIC":
            continue  # not used
        if name in was and was[name] != getattr(args, name):
            raise UserError(
                f"--resume {args.resume}: was run with {name} {was.get(name)}, not {getattr(args, name)}; "
                "give the same, or start a new run from its weights with --init"
            )
    if saved["images"]["number"] != len(images):
        raise UserError(
            f"--resume {args.resume}: was run on {saved['images']['number']} images, "
            f"{source_of(args)} has {len(images)}"
        )
    if saved["images"]["digest"] != images.digest():
        raise UserError(
            f"--resume {args.resume}: was run on other images, the names in {source_of(args)} differ"
        )
    for name, value in vars(args).items():
        if name in MAY_CHANGE and was.get(name, value) != value:
            log(f"note: {name} was {was.get(name)} and is {value} from here on")


def versions() -> dict[str, str]:
    """What computed this: a resumed run is the same bit for bit only with the same."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "faiss": faiss.__version__,
    }


# ------------------------------------------------------------------------------- one training pass


def sgd(module: nn.Module, args: argparse.Namespace, momentum: float) -> torch.optim.SGD:
    """SGD over the parameters of module that train (not Sobel): constant args.lr, decay 10**args.wd."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=args.lr, momentum=momentum, weight_decay=10**args.wd, fused=True)


def across_ranks(net: models.DeepClusterNet) -> nn.Module:
    """net, or around it what averages its gradients over the processes. Made anew for every fresh head."""
    if distributed.world_size() == 1:
        return net
    device = next(net.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=devices, forward_sync_buffers=False)


def deal(
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    sampler: sampling.ShareSampler,
    share: Share,
    size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of every global batch, at the end maybe nothing; `share` says meanwhile which part."""
    batches = iter(loader)
    for share.total, share.rows in sampler.shares():
        if share.rows:
            yield next(batches)
        else:
            yield torch.zeros((0, 3, size, size), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)


def train_epoch(
    net: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    labels: torch.Tensor,
    device: torch.device,
    precision: str,
    before_step: Callable[[], int],
    meter: AverageMeter,
    progress: Progress | None = None,
    share: Share | None = None,
    scaler: torch.amp.GradScaler | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Cross-entropy of the cluster ids, one SGD step a batch, dropout on; the mean loss goes into meter.

    batches yields (uint8 crops (B, 3, S, S), image indexes (B,)), of several processes the rows of the
    global batch that `share` tells; labels (N,) int64 in data-set order; before_step() gives the seed of the
    step's dropout. Raises UserError at a loss that is not finite, and Preempted, on every process after the
    same step, once stop() is true on one.
    """
    net.train()
    autocast = set_precision(precision, device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    for step, (images, index) in enumerate(batches):
        torch.manual_seed(before_step())
        total = len(index) if share is None else share.total
        x = data.normalise(images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        target = labels[index].to(device, non_blocking=True)
        with autocast:
            loss = F.cross_entropy(net(x).float(), target, reduction="sum") / total
        summed = distributed.all_reduce(torch.tensor([loss.item(), float(stop())], dtype=torch.float64))
        value, stopped = summed.tolist()
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at iteration {step} of this pass; the last checkpoint is still good: "
                "resume from it with a lower --lr"
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss * distributed.world_size()).backward()  # gradients are averaged over processes
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        meter.update(value, total)
        if progress is not None:
            progress.update(total, f"loss {meter.avg:.4f}")
        if stopped:
            raise Preempted("stopped by a signal, the checkpoint is written: go on with --resume auto")


if __name__ == "__main__":
    run_main(main, get_parser())
