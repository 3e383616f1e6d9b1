"""Power iteration clustering after the neighbour graph: how much faster than node by node?

    python benchmarks/pic.py                     # 100,000 points, the graph alone takes a minute
    python benchmarks/pic.py --points 20000

Both start from the same graph, in turn in this process; the minimum of the rounds counts. The plain way is
tests/reference.py: sparse products for all 200 iterations, then pointers followed node by node. The two
partitions must be equal, or the script fails.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from algorithms.pic import nearest_neighbours, pic_labels
from tests import reference


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="length of a point (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    return parser


def make_points(points: int, width: int) -> np.ndarray:
    """Unit vectors (points, width) float32 around points / 50 directions; a few stand twice."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((max(points // 50, 1), width))
    x = directions[rng.integers(0, len(directions), points)] + 0.3 * rng.standard_normal((points, width))
    x[-points // 100 :] = x[: -(-points // 100)]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings differ by names only."""
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def main(args: argparse.Namespace) -> None:
    """Build the graph, time both and print the table."""
    start = time.perf_counter()
    graph = nearest_neighbours(make_points(args.points, args.width))
    graph_seconds = time.perf_counter() - start
    times: dict[str, list[float]] = {"node by node": [], "ours": []}
    labels = {}
    for _ in range(args.rounds):
        for name, way in (("node by node", reference.pic_labels), ("ours", pic_labels)):
            start = time.perf_counter()
            labels[name] = way(*graph)
            times[name].append(time.perf_counter() - start)
    clusters = len(np.unique(labels["ours"]))
    print(f"{args.points} points x {args.width}, {clusters} clusters, minimum of {args.rounds}")
    print(f"neighbour graph: {graph_seconds:.1f} s")
    print(f"{'after the graph':<20}{'seconds':>9}{'ratio':>8}")
    plain = min(times["node by node"])
    for name, seconds in times.items():
        print(f"{name:<20}{min(seconds):>9.3f}{plain / min(seconds):>8.1f}")
    if not same_partition(labels["ours"], labels["node by node"]):
        sys.exit("the partitions differ")
    print("the partitions are equal")


if __name__ == "__main__":
    main(get_parser().parse_args())
