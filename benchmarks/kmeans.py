"""k-means: time and objective against plain faiss.Kmeans.

    python benchmarks/kmeans.py                    # 50,000 x 256, k = 1000, on the CPU
    python benchmarks/kmeans.py --device cuda --points 1281167 --k 10000

Both use all points, the same seeds and all 20 iterations (faiss by itself stops when the objective repeats),
in turn in this process, and end with a search for the labels.
"""

import argparse
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clustering import KMEANS_ITERATIONS, kmeans
from util import choose_device


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=50000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="length of a point (default: %(default)s)")
    parser.add_argument("--k", type=int, default=1000, help="clusters (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each with its seed (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    return parser


def make_points(points: int, width: int, k: int) -> np.ndarray:
    """Unit vectors (points, width) float32 around k directions, wide enough to overlap."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((k, width), dtype=np.float32)
    x = directions[rng.integers(0, k, points)]
    x += 1.5 * rng.standard_normal((points, width), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain(x: np.ndarray, k: int, seed: int, gpu: bool) -> float:
    """faiss.Kmeans over all points, and labels; returns the objective."""
    # faiss.Kmeans takes gpu=True for all GPUs
    clustering = faiss.Kmeans(
        x.shape[1], k, niter=KMEANS_ITERATIONS, seed=seed, gpu=gpu, max_points_per_centroid=len(x)
    )
    if hasattr(clustering.cp, "early_stop_threshold"):
        clustering.cp.early_stop_threshold = -1
    clustering.train(x)
    clustering.assign(x)
    return float(clustering.obj[-1])


def main(args: argparse.Namespace) -> None:
    """Time both over the seeds and print the table."""
    device = choose_device(args.device)
    x = make_points(args.points, args.width, args.k)
    ways = {
        "faiss.Kmeans": lambda seed: plain(x, args.k, seed, device.type == "cuda"),
        "ours": lambda seed: kmeans(x, args.k, seed, device=device).objective,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    objectives: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            objectives[name].append(way(seed))
            times[name].append(time.perf_counter() - start)
    print(f"{args.points} x {args.width}, k = {args.k}, {device}, {torch.get_num_threads()} threads")
    print(f"{'way':<16}{'seconds':>9}{'ratio':>8}{'objective (mean of seeds)':>28}")
    fastest = min(times["faiss.Kmeans"])
    for name in ways:
        seconds = min(times[name])
        print(f"{name:<16}{seconds:>9.2f}{fastest / seconds:>8.2f}{np.mean(objectives[name]):>28.2f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
