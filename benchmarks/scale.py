"""What does an epoch cost at scale? A model of it, checked here against runs that it has not seen.

    python benchmarks/scale.py                     # fit to small runs of main.py, predict others, compare
    python benchmarks/scale.py --paper             # the tables of docs/scale.md
    python benchmarks/scale.py --check docs/scale.md    # are these the tables that it holds?

On paper: seconds and memory of every phase from counted FLOPs and bytes, from rates measured on our two cores
(MEASURED) and from data sheets and assumptions for what we do not have (PEAK, ASSUMED). The formulae are the
functions of the first half.

By simulation: main.py trains a small network on small images on this machine with several N, k, widths of
the features, batches and numbers of processes. The seconds of each phase, which it writes into log.jsonl, are
fitted by the terms that the formulae have (non-negative least squares on relative errors). Then it runs in
configurations that the fit has not seen, and prediction and measurement are printed side by side.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.trunk import DeepClusterNet, Pool, conv_block

import clustering
import demo
import main as training
import models
from clustering import KMEANS_ITERATIONS
from util import UserError, run_main

ROOT = Path(__file__).resolve().parent.parent
PCA_DIM = training.PCA_DIM
SEARCHES = KMEANS_ITERATIONS + 1  # one more for the labels

# ------------------------------------------------------------------- rates: ours, data sheets, assumptions

# Seconds an image, on one x86-64 core (with AVX-512). benchmarks/decode.py, sampler.py.
MEASURED = {
    "decode central": 1.34e-3,  # JPEG of 500 x 375 -> central crop of 224
    "decode training": 1.39e-3,  # -> random resized crop
    "shards central": 0.38e-3,  # the same from shards whose images were resized to 256 (tools/make_shards.py)
    "shards training": 0.63e-3,
    "cached crop": 0.020e-3,  # central crop from the crop cache, warm
    "labels and logs": 1.25e-6,  # sampler, NMI to the last epoch, `clusters`, and 0.98 of it assignments.csv
}
JPEG_BYTES = 110e3  # an ImageNet photograph on average
SHARD_BYTES = 43e3  # the same, its shorter side resized to 256, quality 95
CROP_BYTES = 3 * 224**2

# One H100 SXM, dense, FLOP/s and bytes/s from its data sheet; NVLink and network in each direction.
PEAK = {"fp32": 67e12, "tf32": 495e12, "bf16": 989e12, "fp64": 67e12}
HBM, NVLINK = 3.35e12, 450e9
NETWORK = 50e9  # 400 Gb/s a node
GPU_MEMORY = 80e9

# Not measured by us: no GPU has been at hand.
ASSUMED = {
    ("alexnet", "fp32"): 0.60, ("alexnet", "tf32"): 0.30, ("alexnet", "bf16"): 0.25,  # share of the peak
    ("vgg16", "fp32"): 0.70, ("vgg16", "tf32"): 0.45, ("vgg16", "bf16"): 0.40,
    "k-means": 0.40,  # share of the fp32 peak, the search for the nearest centroid included
    "covariance": 0.20,  # share of the fp64 peak: narrow products
    "links": 0.80,  # share of the stated speed of NVLink, network and HBM
    "gloo": 2e9,  # bytes/s of arrays that are gathered in host memory
    "pageable": 10e9,  # bytes/s from ordinary host memory to a GPU, each GPU
    "host sums": 20e9,  # bytes/s at which one process adds points up to centroids
    "eigenvectors": 2.5,  # seconds for 4096 x 4096 in float64 on a GPU
    "disk": 6e9,  # bytes/s a node
    "page cache": 1e12,  # bytes a node: what is smaller is read from the disk in the first epoch only
    "checkpoint": 1e9,  # bytes/s of one process writing a checkpoint
    "overlap": 2 / 3,  # share of the step, its backward part, behind which gradients are exchanged
}  # fmt: skip


# ------------------------------------------------------------------------------------- what is counted


@dataclass(frozen=True)
class Network:
    """FLOPs and bytes of a network, for one image where not said otherwise. A multiply-add is 2 FLOPs."""

    forward: float  # to the features, without the head
    train: float  # forward and backward, without the head
    body: int  # parameters without the head
    dim: int  # length of a feature
    saved: float  # bytes that the forward pass keeps for the backward pass in float32


@functools.cache
def count(arch: str, size: int = 224) -> Network:
    """Count a network's FLOPs and bytes by running it on the meta device, which computes nothing."""
    batch = 8
    with torch.device("meta"):
        net = models.build(arch, sobel=True).train()
        images = torch.empty(batch, 3, size, size)
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net.activations(images, [models.FEATURE])
    with FlopCounterMode(display=False) as train:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = net(images)
        out.sum().backward()
    return Network(
        forward=forward.get_total_flops() / batch,
        train=train.get_total_flops() / batch,
        body=sum(p.numel() for p in net.parameters() if p.requires_grad),
        dim=net.feature_dim,
        saved=sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in own) / batch,
    )


@dataclass(frozen=True)
class Job:
    """What is trained, on what. gpus: in each of `nodes` machines; cores: for each GPU."""

    images: int
    k: int
    nodes: int
    gpus: int
    batch: int
    arch: str = "alexnet"
    precision: str = "bf16"
    kmeans: str = "distributed"
    cached: bool = False  # central crops from the crop cache
    shards: bool = False  # images resized to 256 in shards
    cores: int = 16
    reassign: float = 1.0

    @property
    def jpeg_bytes(self) -> float:
        return SHARD_BYTES if self.shards else JPEG_BYTES

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def network(self) -> Network:
        return count(self.arch)

    @property
    def speed(self) -> float:
        """FLOP/s of one GPU in the convnet."""
        return PEAK[self.precision] * ASSUMED[self.arch, self.precision]

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.k * (self.network.dim + 1)

    @property
    def steps(self) -> float:
        return self.reassign * self.images / self.batch


# ------------------------------------------------------------------------------------ seconds of a phase


def all_reduce(size: float, job: Job) -> float:
    """Sum `size` bytes over all ranks: a ring in each node over NVLink, one over the nodes' network.

    2 (g-1)/g size / NVLink + 2 (m-1)/m size / network; g GPUs a node, m nodes.
    """
    inside = 2 * (job.gpus - 1) / job.gpus * size / (NVLINK * ASSUMED["links"])
    across = 2 * (job.nodes - 1) / job.nodes * size / (NETWORK * ASSUMED["links"])
    return inside + across


def pass_bytes(job: Job, view: str) -> float:
    """What a pass reads: JPEGs, or crops of 224 x 224 x 3 bytes from the cache. view: central, training."""
    if view == "central":
        return job.images * (CROP_BYTES if job.cached else job.jpeg_bytes)
    return job.reassign * job.images * job.jpeg_bytes


def reading(job: Job, view: str) -> float:
    """bytes / (nodes disk); 0 for what a node's memory keeps from epoch to epoch."""
    kept = job.images * job.jpeg_bytes + (job.images * CROP_BYTES if job.cached else 0)
    if kept / job.nodes <= ASSUMED["page cache"]:
        return 0.0
    return pass_bytes(job, view) / (job.nodes * ASSUMED["disk"])


def decoding(job: Job, view: str) -> float:
    """R N t / (cores of all nodes), t seconds an image and core; R is 1 for the central view."""
    if view == "central" and job.cached:
        seconds = MEASURED["cached crop"]
    else:
        seconds = MEASURED[f"{'shards' if job.shards else 'decode'} {view}"]
    images = job.images * (job.reassign if view == "training" else 1)
    return images * seconds / (job.ranks * job.cores)


def feature_forward(job: Job) -> float:
    """N F / (G speed)."""
    return job.images * job.network.forward / (job.ranks * job.speed)


def pca(job: Job) -> float:
    """Covariance, its sum over ranks, eigenvectors, projection, in float64; the features are copied thrice.

    N D^2 / (G fp64) + 2 N D d / (G fp64) + 3 N D 4 / (G pageable) + all-reduce(8 D^2) + eig(D).
    """
    rows, d = job.images / job.ranks, job.network.dim
    arithmetic = (rows * d**2 + 2 * rows * d * PCA_DIM) / (PEAK["fp64"] * ASSUMED["covariance"])
    copies = 3 * rows * d * 4 / ASSUMED["pageable"]
    return arithmetic + copies + all_reduce(8 * d**2, job) + ASSUMED["eigenvectors"] * (d / 4096) ** 3


def kmeans(job: Job) -> float:
    """20 iterations and the last search, 2 N k d FLOP each, in fp32, on all ranks or on those of one node.

    faiss: (G-1)/G 4 N d / gloo + 21 (2 N k d / (g fp32) + 4 N d / (g pageable)) + 20 (4 N d / host sums).
    distributed: 21 (2 N k d / (G fp32) + 4 N d / (G pageable)) + 20 (4 N d / (G host sums)
    + (G-1)/G 2 8 k d / gloo): the sums are in float64. Then, with several ranks, labels and distances to
    all: 2 12 N / gloo.
    """
    work, points = 2.0 * job.images * job.k * PCA_DIM, 4.0 * job.images * PCA_DIM
    others = (job.ranks - 1) / job.ranks
    moved = 2 * 12 * job.images * (job.ranks > 1)
    if job.kmeans == "faiss":
        gpus, adders = job.gpus, 1
        moved += others * points
    else:
        gpus, adders = job.ranks, job.ranks
        moved += KMEANS_ITERATIONS * others * 2 * 8 * job.k * PCA_DIM
    search = work / (PEAK["fp32"] * ASSUMED["k-means"]) + points / ASSUMED["pageable"]
    sums = points / ASSUMED["host sums"]
    return SEARCHES * search / gpus + KMEANS_ITERATIONS * sums / adders + moved / ASSUMED["gloo"]


def labels_and_logs(job: Job) -> float:
    """N t on one core: it is not divided over ranks."""
    return job.images * MEASURED["labels and logs"]


def gradient_exchange(job: Job) -> float:
    """All-reduces of the float32 gradients of body and head, one a step."""
    return job.steps * all_reduce(4 * (job.network.body + job.head), job)


def step_arithmetic(job: Job) -> float:
    """Forward and backward of body and head (3 2 D k FLOP an image), and SGD, which no rank is spared.

    R N (F + 6 D k) / (G speed) + steps (5 body + 3 head) 4 / HBM: momentum is read and written as well.
    """
    flops = job.network.train + 6.0 * job.network.dim * job.k
    sgd = 4 * (5 * job.network.body + 3 * job.head) / (HBM * ASSUMED["links"])
    return job.reassign * job.images * flops / (job.ranks * job.speed) + job.steps * sgd


def training_step(job: Job) -> float:
    """Arithmetic, and of the exchange of gradients what the backward pass does not hide."""
    arithmetic = step_arithmetic(job)
    return arithmetic + max(0.0, gradient_exchange(job) - ASSUMED["overlap"] * arithmetic)


def checkpoint_bytes(job: Job) -> float:
    """checkpoint.pth.tar: weights, momentum, head, assignment; clustering.pth.tar: weights, assignment."""
    assignment = 12 * job.images + 4 * job.k * PCA_DIM
    return 4 * (3 * job.network.body + job.head) + 2 * assignment


def checkpoints(job: Job) -> float:
    """Bytes / rate of one process."""
    return checkpoint_bytes(job) / ASSUMED["checkpoint"]


def phases(job: Job) -> dict[str, float]:
    """Seconds of an epoch. Those that start with a dash run at the same time: the slower one counts."""
    found = {
        "- read": reading(job, "central"),
        "- decode and crop": decoding(job, "central"),
        "- forward": feature_forward(job),
    }
    found["feature pass"] = max(found.values())
    found |= {
        "PCA": pca(job),
        "k-means": kmeans(job),
        "labels, sampler, logs": labels_and_logs(job),
        "- read again": reading(job, "training"),
        "- decode and training crop": decoding(job, "training"),
        "- forward, backward, SGD": step_arithmetic(job),
        "- exchange of gradients": gradient_exchange(job),
    }
    loading = max(found["- read again"], found["- decode and training crop"])
    found["training pass"] = max(loading, training_step(job))
    found["checkpoint"] = checkpoints(job)
    found["epoch"] = sum(seconds for name, seconds in found.items() if not name.startswith("-"))
    return found


def limit(job: Job) -> str:
    """What the longest phase of the epoch waits for."""
    found = phases(job)
    longest = max((name for name in found if name[0] != "-" and name != "epoch"), key=found.get)
    if longest == "feature pass":
        parts = {"- read": "disk", "- decode and crop": "decoding", "- forward": "forward"}
        return parts[max(parts, key=found.get)]
    if longest == "training pass":
        if found["- read again"] == found[longest]:
            return "disk"
        if found["- decode and training crop"] == found[longest]:
            return "decoding"
        hidden = ASSUMED["overlap"] * found["- forward, backward, SGD"]
        return "gradients" if found["- exchange of gradients"] > hidden else "training step"
    return longest


# ------------------------------------------------------------------------------------- memory of a phase


GATHERED = "host: rank 0, points gathered (faiss)"


def memory(job: Job) -> dict[str, float]:
    """Bytes by phase on the host, for one rank, or on one GPU; `rank 0` where that one holds more."""
    rows, d, net = job.images / job.ranks, job.network.dim, job.network
    share = job.batch / job.ranks
    weights = 4 * (net.body + job.head)
    points = 4 * job.images * PCA_DIM
    found = {
        "host: features of the rank, 4 N D / G": 4 * rows * d,
        "host: covariance and eigenvectors": 8 * d * (d + PCA_DIM) + 8 * d**2 * (job.ranks > 1),
        "host: projections of the rank, 4 N d / G": points / job.ranks,
        "host: centroids and their sums, 12 k d": 12.0 * job.k * PCA_DIM,
        GATHERED: points * (job.kmeans == "faiss" and job.ranks > 1),
        "host: labels, draws, distances, 20 N": 20.0 * job.images,
        "GPU: PCA": 2 * 8 * d**2,
        "GPU: k-means, centroids": 4.0 * job.k * PCA_DIM,
        "GPU: weights, gradients, momentum": weights * (2 + (job.ranks > 1)) + 4 * net.body,
        "GPU: activations (float32), 3 logits": share * (net.saved + 3 * 4 * job.k),
    }
    return found


# ------------------------------------------------------------------------------------ the tables on paper

IMAGENET = 1_281_167
JOBS = {
    "ImageNet, 1 GPU": Job(IMAGENET, 10_000, 1, 1, 256, kmeans="faiss"),
    "ImageNet, 8 GPUs": Job(IMAGENET, 10_000, 1, 8, 256),
    "100 M, 64 GPUs, k 10,000": Job(100_000_000, 10_000, 8, 8, 4096),
    "100 M, 64 GPUs, k 320,000": Job(100_000_000, 320_000, 8, 8, 4096),
}


def number(value: float) -> str:
    """Three digits at most, thousands apart."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A titled table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def counts_table() -> str:
    """FLOPs and bytes that do not depend on the machine."""
    rows = []
    for arch in ("alexnet", "vgg16"):
        net = count(arch)
        work = [net.forward, net.train, 4 * net.body, net.saved]
        units = [1e9, 1e9, 1e6, 1e6]
        head = [6 * net.dim * k / 1e9 for k in (10_000, 320_000)]
        rows.append([arch, *(number(w / u) for w, u in zip(work, units)), *(number(h) for h in head)])
    names = "network, features GFLOP, training step GFLOP, weights MB, kept for backward MB"
    return table(
        "Counted for one image (float32, 224 pixels, Sobel)",
        [*names.split(", "), "head's step at k 10,000 GFLOP", "at k 320,000 GFLOP"],
        rows,
    )


def volume_table() -> str:
    """FLOPs and bytes of every phase of an epoch."""
    columns = [JOBS["ImageNet, 1 GPU"], *(JOBS[name] for name in list(JOBS)[2:])]
    rows = []
    for name, unit, volume in (
        ("JPEG read, each pass", "TB", lambda j: j.images * JPEG_BYTES / 1e12),
        ("uint8 crops to the GPUs, each pass", "TB", lambda j: j.images * CROP_BYTES / 1e12),
        ("forward for features, AlexNet", "PFLOP", lambda j: j.images * j.network.forward / 1e15),
        ("features held", "TB", lambda j: j.images * j.network.dim * 4 / 1e12),
        ("PCA: covariance and projection, float64", "PFLOP",
         lambda j: j.images * j.network.dim * (j.network.dim + 2 * PCA_DIM) / 1e15),
        ("k-means, 21 searches", "PFLOP", lambda j: SEARCHES * 2 * j.images * j.k * PCA_DIM / 1e15),
        ("points of k-means", "GB", lambda j: 4 * j.images * PCA_DIM / 1e9),
        ("training, AlexNet and head", "PFLOP",
         lambda j: j.images * (j.network.train + 6 * j.network.dim * j.k) / 1e15),
        ("gradients, a step", "GB", lambda j: 4 * (j.network.body + j.head) / 1e9),
        ("checkpoints, an epoch", "GB", lambda j: checkpoint_bytes(j) / 1e9),
    ):  # fmt: skip
        rows.append([name, unit, *(number(volume(job)) for job in columns)])
    return table(
        "FLOPs and bytes of an epoch, AlexNet, all machines together",
        ["what", "unit", "ImageNet, k 10,000", "100 M, k 10,000", "100 M, k 320,000"],
        rows,
    )


def seconds_table(arch: str) -> str:
    """Seconds by phase in bf16."""
    jobs = [replace(job, arch=arch) for job in JOBS.values()]
    found = [phases(job) for job in jobs]
    rows = [[name, *(number(f[name]) for f in found)] for name in found[0]]
    rows.append(["the longest phase waits for", *map(limit, jobs)])
    return table(f"{arch}, bf16, seconds of an epoch", ["phase", *JOBS], rows)


CHOICES = {
    "": {},
    ", crop cache": {"cached": True},
    ", shards of 256": {"shards": True},
    ", both": {"cached": True, "shards": True},
}


def choices_table() -> str:
    """The epoch under other choices."""
    rows = []
    for arch in ("alexnet", "vgg16"):
        for precision in ("fp32", "tf32", "bf16"):
            for what, change in CHOICES.items() if precision == "bf16" else [("", {})]:
                jobs = [replace(j, arch=arch, precision=precision, **change) for j in JOBS.values()]
                cells = [f"{number(phases(j)['epoch'])} ({limit(j)})" for j in jobs]
                rows.append([f"{arch} {precision}{what}", *cells])
    return table("Seconds of an epoch under other choices (what limits)", ["choice", *JOBS], rows)


def kmeans_table() -> str:
    """--kmeans faiss against --kmeans distributed."""
    rows = []
    for name, job in JOBS.items():
        both = [replace(job, kmeans=way) for way in ("faiss", "distributed")]
        found = [memory(j) for j in both]
        host = [(f["host: projections of the rank, 4 N d / G"] + f[GATHERED]) / 1e9 for f in found]
        rows.append([name, *(number(v) for v in [*map(kmeans, both), *host])])
    return table(
        "k-means on the GPUs of one node (faiss) or on all (distributed)",
        ["job", "faiss s", "distributed s", "faiss: rank 0 host GB", "distributed: rank host GB",],
        rows,
    )  # fmt: skip


def batch_table() -> str:
    """Gradients against the global batch."""
    rows = []
    for name in list(JOBS)[1:]:
        for batch in (256, 1024, 4096, 16384):
            job = replace(JOBS[name], batch=batch)
            kept = memory(job)["GPU: activations (float32), 3 logits"] / 1e9
            values = [step_arithmetic(job), gradient_exchange(job), training_step(job), kept]
            rows.append([name, f"{batch:,}", *(number(v) for v in values)])
    return table(
        "AlexNet bf16: what the global batch does to the training pass, seconds",
        ["job", "batch", "arithmetic and SGD", "exchange of gradients", "together", "activations GB a GPU"],
        rows,
    )


def memory_table(arch: str) -> str:
    """GB by phase."""
    found = [memory(replace(job, arch=arch)) for job in JOBS.values()]
    held = [name for name in found[0] if any(f[name] for f in found)]
    rows = [[name, *(number(f[name] / 1e9) for f in found)] for name in held]
    return table(f"{arch}, GB of one rank or one GPU", ["what", *JOBS], rows)


def paper() -> list[str]:
    """Every table of docs/scale.md."""
    return [
        counts_table(),
        volume_table(),
        seconds_table("alexnet"),
        seconds_table("vgg16"),
        choices_table(),
        kmeans_table(),
        batch_table(),
        memory_table("alexnet"),
        memory_table("vgg16"),
    ]


def check_document(path: str) -> None:
    """UserError unless the document holds every table as it is computed now."""
    text = Path(path).read_text(encoding="utf-8")
    for part in paper():
        if part not in text:
            raise UserError(f"{path}: {part.splitlines()[0]} is out of date; paste it from --paper")
    print(f"{path} holds the tables of --paper")


# ------------------------------------------------------------------------------- by simulation: the runs


@dataclass(frozen=True)
class Config:
    """One run of main.py on small images."""

    images: int
    k: int
    dim: int  # length of a feature
    batch: int
    processes: int = 1

    def __str__(self) -> str:
        return f"N {self.images}, k {self.k}, D {self.dim}, batch {self.batch}, {self.processes} proc."


IMAGE_SIZE = 48
DIMS = (256, 512, 1024)
FITTED = [
    Config(600, 50, 512, 64),
    Config(1000, 500, 512, 128),
    Config(2000, 200, 256, 128),
    Config(2000, 50, 1024, 64),
    Config(2400, 300, 512, 64),
    Config(2400, 500, 1024, 128),
]
HELD_OUT = [Config(1500, 300, 1024, 64), Config(2200, 400, 256, 64), Config(2400, 100, 512, 128)]
PHASES = ("features", "pca", "clustering", "train")


def small(dim: int) -> Callable[..., DeepClusterNet]:
    """A network of AlexNet's make with features of length `dim`, for models.ARCHITECTURES."""

    def build(sobel: bool, num_clusters: int | None = None, seed: int | None = None) -> DeepClusterNet:
        features = [
            *conv_block(2 if sobel else 3, 16, kernel=5, stride=2, padding=2),
            Pool(kernel_size=3, stride=2),
            *conv_block(16, 32, kernel=3, padding=1),
            Pool(kernel_size=3, stride=2),
        ]
        classifier = [nn.Dropout(), nn.Linear(32 * 16, dim), nn.ReLU()]
        classifier += [nn.Dropout(), nn.Linear(dim, dim), nn.ReLU()]
        return DeepClusterNet(f"small{dim}", features, classifier, 4, sobel, num_clusters, seed)

    return build


def register() -> None:
    """Make the small networks known to main.py."""
    for dim in DIMS:
        models.ARCHITECTURES[f"small{dim}"] = small(dim)


def runs_in_parallel() -> bool:
    """Whether this main.py can be run by torchrun."""
    return hasattr(clustering, "kmeans_distributed") and "--kmeans" in known_flags()


def known_flags() -> set[str]:
    return set(training.get_parser()._option_string_actions)


def command_line(config: Config, folder: Path, exp: Path, epochs: int) -> list[str]:
    """The arguments of main.py for a run on `config.images` of the images in `folder`."""
    listed = sorted((folder / "images" / "train").rglob("*.jpg"))
    chosen = np.random.default_rng(0).permutation(len(listed))[: config.images]
    names = folder / f"{config.images}.txt"
    names.write_text("".join(f"{listed[i]}\n" for i in chosen))
    line = [str(names), "--exp", str(exp), "--device", "cpu", "--sobel", "--arch", f"small{config.dim}"]
    line += ["--image-size", str(IMAGE_SIZE), "--workers", "0", "--k", str(config.k), "--lr", "0.01"]
    line += ["--batch", str(config.batch), "--epochs", str(epochs)]
    # Every epoch is to decode, whatever main.py would do for small sets.
    optional = {"--crop-cache": ["off"], "--kmeans": ["distributed"], "--no-report": []}
    for flag in sorted(optional.keys() & known_flags()):
        line += [flag, *optional[flag]]
    return line


def run_together(lines: list[list[str]], processes: int) -> None:
    """Run main.py with these command lines, one after the other, on so many processes of one thread."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [__file__, "--as-main", json.dumps(lines)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a run of main.py failed:\n{done.stderr[-3000:]}")


def run_all(configs: list[Config], folder: Path, epochs: int, rounds: int) -> dict[Config, dict[str, float]]:
    """Seconds of each phase of each run, the least of all epochs of all rounds."""
    found: dict[Config, dict[str, float]] = {}
    for r in range(rounds):
        exps = {config: folder / "-".join(map(str, ("exp", r, *astuple(config)))) for config in configs}
        lines = {config: command_line(config, folder, exp, epochs) for config, exp in exps.items()}
        run_together([line for config, line in lines.items() if config.processes == 1], 1)
        for config, line in lines.items():
            if config.processes > 1:  # a process joins a group only once
                run_together([line], config.processes)
        for config, exp in exps.items():
            epochs_seconds = [json.loads(line)["seconds"] for line in open(exp / "log.jsonl")]
            best = {phase: min(e[phase] for e in epochs_seconds) for phase in PHASES}
            before = found.get(config, best)
            found[config] = {phase: min(best[phase], before[phase]) for phase in PHASES}
            shutil.rmtree(exp)
        print(f"round {r + 1} of {rounds} measured", flush=True)
    return found


# ----------------------------------------------------------------------------- by simulation: the model


def terms(phase: str, config: Config) -> list[float]:
    """The terms of a phase; the fit finds what one of each costs. P processes, of one core each.

    features    1,  N / P
    pca         1,  N D^2 / P,  D^3,  D^2 if P > 1
    clustering  1,  21 N k d / P,  20 N d / P,  20 k d if P > 1
    train       1,  N / P,  N FLOPs / P,  parameters a step,  parameters a step if P > 1
    """
    n, k, several = config.images / config.processes, config.k, float(config.processes > 1)
    d = min(PCA_DIM, config.dim)
    net = count(f"small{config.dim}", IMAGE_SIZE)
    parameters = (net.body + k * (net.dim + 1)) * config.images / config.batch
    return {
        "features": [1, n],
        "pca": [1, n * net.dim**2, net.dim**3, several * net.dim**2],
        "clustering": [1, SEARCHES * n * k * d, KMEANS_ITERATIONS * n * d, several * k * d],
        "train": [1, n, n * (net.train + 6 * net.dim * k), parameters, several * parameters],
    }[phase]


def fit(phase: str, measured: dict[Config, dict[str, float]]) -> np.ndarray:
    """The cost of each term, at least 0, by least squares on relative errors."""
    rows = np.array([terms(phase, config) for config in measured], float)
    seconds = np.array([found[phase] for found in measured.values()])
    weighted = rows / np.maximum(seconds, 0.01)[:, None]  # main.py rounds to 0.01 s
    scale = np.maximum(weighted.max(axis=0), 1e-30)
    return nnls(weighted / scale, seconds / np.maximum(seconds, 0.01))[0] / scale


def predict(phase: str, config: Config, costs: np.ndarray) -> float:
    return float(np.dot(terms(phase, config), costs))


def compare(title: str, measured: dict[Config, dict[str, float]], costs: dict[str, np.ndarray]) -> None:
    """Print prediction against measurement, phase by phase."""
    print(f"\n{title}: predicted / measured seconds (relative error)")
    print(f"{'':<44}" + "".join(f"{phase:>22}" for phase in (*PHASES, "epoch")))
    errors: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "epoch")}
    for config, found in measured.items():
        guess = {phase: predict(phase, config, costs[phase]) for phase in PHASES}
        pairs = [(guess[phase], found[phase]) for phase in PHASES]
        pairs.append((sum(guess.values()), sum(found.values())))
        line = f"{config!s:<44}"
        for phase, (expected, seconds) in zip(errors, pairs):
            error = (expected - seconds) / max(seconds, 0.01)
            errors[phase].append(abs(error))
            line += f"{f'{expected:.2f} / {seconds:.2f} ({error:+.0%})':>22}"
        print(line)
    print(f"{'mean of the absolute errors':<44}" + "".join(f"{np.mean(e):>22.0%}" for e in errors.values()))


def simulate(args: argparse.Namespace) -> None:
    """Measure, fit to one part, predict the other part, compare."""
    register()
    fitted, held_out = list(FITTED), list(HELD_OUT)
    if runs_in_parallel() and args.processes > 1:
        several = [replace(config, processes=args.processes) for config in FITTED]
        fitted += several[1::2]
        held_out += [replace(config, processes=args.processes) for config in HELD_OUT[:2]]
    else:
        print("one process only: this main.py does not run under torchrun, or --processes 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        most = max(config.images for config in fitted + held_out)
        per_picture = -(-most // len(list((ROOT / "demo" / "pictures").glob("*.jpg"))))
        demo.main(demo.get_parser().parse_args([str(folder / "images"), f"--train={per_picture}", "--val=1"]))
        seconds = run_all(fitted + held_out, folder, args.epochs, args.rounds)
    measured = {config: seconds[config] for config in fitted}
    new = {config: seconds[config] for config in held_out}
    costs = {phase: fit(phase, measured) for phase in PHASES}
    print("\nseconds for one of each term:")
    for phase in PHASES:
        print(f"  {phase:<12}" + "".join(f"{cost:>12.3g}" for cost in costs[phase]))
    compare("fitted", measured, costs)
    compare("held out", new, costs)


# ---------------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="print the tables of docs/scale.md")
    parser.add_argument("--check", metavar="FILE", help="fail unless FILE holds the tables of --paper")
    parser.add_argument(
        "--epochs",
        type=int,
        default=2,
        help="epochs of each run, of which the quickest counts, phase by phase (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=2, help="of all runs (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at most so many (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, check them, or simulate."""
    if min(args.epochs, args.rounds, args.processes) < 1:
        raise UserError("--epochs, --rounds and --processes must be at least 1")
    if args.check:
        check_document(args.check)
    elif args.paper:
        print("\n\n".join(paper()))
    else:
        simulate(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-main"]:  # runs of main.py that know the small networks
        register()
        for line in json.loads(sys.argv[2]):
            training.main(training.get_parser().parse_args(line))
    else:
        run_main(main, get_parser().parse_args())
