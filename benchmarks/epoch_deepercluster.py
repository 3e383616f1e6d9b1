"""What a period of DeeperCluster costs at scale: the published run, 96 million images on 64 GPUs, on paper.

A period is one clustering and the epochs trained on it. Counted FLOPs and bytes, divided by the rates of
benchmarks/epoch.py; the formula of the clustering is that of benchmarks/two_level.py, which measures it on
small numbers. `python -m benchmarks.scale` prints the tables.
"""

from dataclasses import dataclass

from benchmarks.epoch import (
    ASSUMED,
    HBM,
    JPEG_BYTES,
    MEASURED,
    PEAK,
    Job,
    Network,
    all_reduce,
    count,
)

ARCH = "vgg16wide"
SHARE = ASSUMED["vgg16", "bf16"]  # of the peak, in the convnet


@dataclass(frozen=True)
class Period:
    """The published run: section 4 of Caron et al., ICCV 2019, and the flags of its authors' script."""

    images: int = 95_920_149
    k: int = 320_000
    super_clusters: int = 4
    turns: int = 4
    dim: int = 4096  # of the whitened features: all
    niter: int = 10
    epochs: int = 3
    nodes: int = 8
    gpus: int = 8
    batch: int = 3072
    cores: int = 16

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def fine(self) -> int:
        return self.k // self.super_clusters

    @property
    def classes(self) -> int:
        """Super-classes."""
        return self.super_clusters * self.turns

    @property
    def network(self) -> Network:
        return count(ARCH)

    @property
    def links(self) -> Job:
        """The machine, as benchmarks/epoch.py knows it."""
        return Job(self.images, self.k, self.nodes, self.gpus, self.batch)

    @property
    def sub_head(self) -> int:
        """Parameters of one sub-classifier."""
        return self.fine * (self.network.dim + 1)

    @property
    def steps(self) -> float:
        """Of a period; an epoch has about N draws, of images and turns."""
        return self.epochs * self.images / self.batch


def clustering_work(p: Period) -> dict[str, float]:
    """What both levels take: FLOP of the searches, additions, messages, bytes of one rank's messages."""
    return {
        "search": 2.0 * p.images * (p.super_clusters + p.fine) * p.dim * (p.niter + 1),
        "sums": 2.0 * p.images * p.dim * p.niter,
        "messages": 3.0 * p.niter * (1 + p.super_clusters),
        "bytes": 8.0 * p.niter * (p.super_clusters + p.k) * p.dim * 2 * (p.ranks - 1) / p.ranks,
    }


def seconds(p: Period) -> dict[str, float]:
    """Seconds of a period by phase. Those with a dash run at the same time: the slower one counts.

    As many ranks as super-classes or more: each holds one sub-classifier.
    """
    net, work, rows = p.network, clustering_work(p), p.images / p.ranks
    read = p.images * JPEG_BYTES / (p.nodes * ASSUMED["disk"])
    feature = {
        "- read": read,
        "- decode and crop": p.images * MEASURED["decode central"] / (p.ranks * p.cores),
        "- forward": p.images * net.forward / (p.ranks * PEAK["bf16"] * SHARE),
    }
    whitening = 3.0 * rows * p.dim**2 / (PEAK["fp64"] * ASSUMED["covariance"])
    whitening += 12.0 * rows * p.dim / ASSUMED["pageable"] + all_reduce(8.0 * p.dim**2, p.links)
    copies = 2 * (p.niter + 1) * 4.0 * rows * p.dim / ASSUMED["pageable"]
    flops = net.train + 6.0 * net.dim * (p.fine + p.classes)
    arithmetic = p.epochs * p.images * flops / (p.ranks * PEAK["bf16"] * SHARE)
    sgd = p.steps * 4 * 5.0 * (net.body + p.sub_head) / (HBM * ASSUMED["links"])
    shared = Job(
        p.images, p.k, 1, max(1, p.ranks // p.classes), p.batch
    )  # ranks of one node share a sub-head
    exchange = p.steps * (all_reduce(4.0 * net.body, p.links) + all_reduce(4.0 * p.sub_head, shared))
    training = {
        "- read again": p.epochs * read,
        "- decode and training crop": p.epochs * p.images * MEASURED["decode training"] / (p.ranks * p.cores),
        "- forward, backward, SGD": arithmetic + sgd,
        "- exchange of gradients": exchange,
    }
    step = arithmetic + sgd + max(0.0, exchange - ASSUMED["overlap"] * arithmetic)
    found = feature | {
        "feature pass": max(feature.values()),
        "whitening": whitening + ASSUMED["eigenvectors"],
        "k-means: search": work["search"] / (p.ranks * PEAK["fp32"] * ASSUMED["k-means"]) + copies,
        "k-means: sums": 4 * work["sums"] / 2 / (p.ranks * ASSUMED["host sums"]),
        "k-means: messages": work["bytes"] / ASSUMED["gloo"],
        "labels to all, twice": 2 * 2 * 12.0 * p.images / ASSUMED["gloo"],
    }
    found |= training | {
        "training pass": max(training["- read again"], training["- decode and training crop"], step),
        "checkpoint": checkpoint_bytes(p) / ASSUMED["checkpoint"],
    }
    found["period"] = sum(value for name, value in found.items() if not name.startswith("-"))
    return found


def checkpoint_bytes(p: Period) -> float:
    """Body and all sub-classifiers with momentum, centroids of both levels, labels and distances."""
    weights = 8.0 * (p.network.body + p.classes * p.sub_head)
    return weights + 4.0 * (p.k + p.super_clusters) * p.dim + 12.0 * p.images


def memory(p: Period) -> dict[str, tuple[float, float | None]]:
    """Bytes of one rank: (here, in the design of the paper's code); None where that is not told."""
    rows = 4.0 * p.images * p.dim / p.ranks
    sums = 12.0 * p.fine * p.dim  # centroids in float32 and their sums in float64
    heads = 4.0 * p.sub_head
    gathered = 8.0 * p.classes * p.sub_head
    return {
        "host: rows, whitened in place, 4 N d / W": (rows, rows),
        "host: rows of one super-cluster, copied": (rows / p.super_clusters, rows),
        "host: first rank, rows for the covariance": (0.0, 4.0 * 8_386_560 * p.dim),
        "host: covariance and eigenvectors": (24.0 * p.dim**2, 12.0 * p.dim**2),
        "host: centroids and sums of one super-cluster": (sums, 8.0 * p.fine * p.dim),
        "host: centroids of all": (4.0 * p.k * p.dim, 0.0),
        "host: labels and distances of all images": (24.0 * p.images, 8.0 * p.images),
        "host: first rank, sub-classifiers of all for a checkpoint": (gathered, None),
        "GPU: weights, gradients, momentum, one sub-classifier's too": (
            12.0 * p.network.body + 3 * heads,
            12.0 * p.network.body + 3 * heads,
        ),
        "GPU: centroids of the search": (4.0 * p.fine * p.dim, 12.0 * p.fine * p.dim),
        "GPU: activations (float32), 3 logits": (
            p.batch / p.ranks * (p.network.saved + 12.0 * p.fine),
            p.batch / p.ranks * (p.network.saved + 12.0 * p.fine),
        ),
        "disk: files of rows between the levels, all ranks": (0.0, 4.0 * p.images * p.dim),
    }
