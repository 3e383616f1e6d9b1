"""What an epoch of DeepCluster costs at scale: seconds and memory of every phase, as a model on paper.

Counted FLOPs and bytes, divided by rates: those measured on two cores of ours (MEASURED), those of data
sheets (PEAK) and assumptions for what we do not have (ASSUMED). Change a rate for your machine and print the
tables again (benchmarks/scale.py).
"""

import functools
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import main as training
import models
from clustering import KMEANS_ITERATIONS

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
        net.activations(images, [net.feature])
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
