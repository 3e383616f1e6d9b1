"""What does an epoch cost at scale? The tables of docs/scale.md, by the formulae of benchmarks/epoch.py.

python -m benchmarks.scale                          # print the tables
python -m benchmarks.scale --check docs/scale.md    # are these the tables that it holds?
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.epoch import (
    CROP_BYTES,
    GATHERED,
    JPEG_BYTES,
    PCA_DIM,
    SEARCHES,
    Job,
    checkpoint_bytes,
    count,
    gradient_exchange,
    kmeans,
    limit,
    memory,
    phases,
    step_arithmetic,
    training_step,
)
from benchmarks.epoch_deepercluster import Period
from benchmarks.epoch_deepercluster import memory as period_memory
from benchmarks.epoch_deepercluster import seconds as period_seconds
from util import UserError, run_main

IMAGENET = 1_281_167
JOBS = {
    "ImageNet, 1 GPU": Job(IMAGENET, 10_000, 1, 1, 256, kmeans="faiss"),
    "ImageNet, 8 GPUs": Job(IMAGENET, 10_000, 1, 8, 256),
    "100 M, 64 GPUs, k 10,000": Job(100_000_000, 10_000, 8, 8, 4096),
    "100 M, 64 GPUs, k 320,000": Job(100_000_000, 320_000, 8, 8, 4096),
}
PUBLISHED = Period()
PERIODS = {
    "published": PUBLISHED,
    "ten times the clusters": replace(PUBLISHED, k=3_200_000),
    "d 256": replace(PUBLISHED, dim=256),
    "one super-cluster": replace(PUBLISHED, super_clusters=1),
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


def period_table() -> str:
    """DeeperCluster's period, seconds by phase."""
    found = {name: period_seconds(period) for name, period in PERIODS.items()}
    rows = [[phase, *(number(f[phase]) for f in found.values())] for phase in found["published"]]
    return table("DeeperCluster, vgg16wide, bf16, seconds of a period of 3 epochs", ["phase", *PERIODS], rows)


def period_memory_table() -> str:
    """DeeperCluster's memory of a rank, here and in the paper's own design."""
    rows = [
        [what, *("?" if size is None else number(size / 1e9) for size in sizes)]
        for what, sizes in period_memory(PUBLISHED).items()
    ]
    return table(
        "DeeperCluster, published run, GB of one rank", ["what", "here", "the authors' design"], rows
    )


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
        period_table(),
        period_memory_table(),
    ]


def check_document(path: str) -> None:
    """UserError unless the document holds every table as it is computed now."""
    text = Path(path).read_text(encoding="utf-8")
    for part in paper():
        if part not in text:
            raise UserError(f"{path}: {part.splitlines()[0]} is out of date; print the tables and paste it")
    print(f"{path} holds the tables")


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="print the tables, which is the default")
    parser.add_argument("--check", metavar="FILE", help="fail unless FILE holds the tables instead")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables or check them."""
    if args.check:
        check_document(args.check)
    else:
        print("\n\n".join(paper()))


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
