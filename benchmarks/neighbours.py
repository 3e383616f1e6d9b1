"""How much memory do exact nearest neighbours take beside the features, and how fast are they?

    python benchmarks/neighbours.py [--train 64000] [--val 2000] [--k 200] [--device cpu]

N x 4096 features in a memory-mapped file, as extract.py writes them, and M queries. Printed: the growth of
the resident memory that is not the file's own, images a second, and how many neighbours an independent
search (Faiss on the whole, where it fits) finds too. What is held does not grow with N: --train 64000 is a
20th of ImageNet. Goal: under 2 GiB. Linux only.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import faiss

from evaluation.knn import nearest
from util import choose_device, say, set_precision

DIM, GOAL = 4096, 2.0


class Peak(threading.Thread):
    """The largest RssAnon of this process (without pages of files), in GiB, until stop()."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.largest = max(self.largest, anonymous())

    def stop(self) -> float:
        self.ended.set()
        self.join()
        return self.largest


def anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 2**20
    raise KeyError("RssAnon")


def features(path: Path, count: int, seed: int) -> np.ndarray:
    """Unit rows (count, DIM) float32, memory-mapped."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, DIM))
    rng = np.random.default_rng(seed)
    for start in range(0, count, 4096):
        block = rng.standard_normal((min(4096, count - start), DIM), np.float32)
        rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()
    return np.load(path, mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=64000)
    parser.add_argument("--val", type=int, default=2000)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = choose_device(args.device)
    set_precision("fp32", device)
    with tempfile.TemporaryDirectory() as folder:
        train, val = (
            features(Path(folder) / "train.npy", args.train, 0),
            features(Path(folder) / "val.npy", args.val, 1),
        )
        nearest(val[:8], train[:8], 4, device)  # libraries warm up
        before, peak = anonymous(), Peak()
        peak.start()
        start = time.perf_counter()
        cosines, _ = nearest(val, train, args.k, device)
        seconds = time.perf_counter() - start
        grown = peak.stop() - before
        some = slice(0, 200)
        expected, _ = faiss.knn(val[some], train, args.k, metric=faiss.METRIC_INNER_PRODUCT)
        same = np.abs(cosines[some] - expected).max() < 1e-5
    products = args.train * args.val * DIM
    say(
        f"{args.train} x {DIM}, {args.val} queries, k {args.k} on {device}: {seconds:.1f} s, "
        f"{args.val / seconds:.0f} queries/s, {2e-9 * products / seconds:.0f} GFLOP/s"
    )
    say(f"memory beside the features: {grown:.2f} GiB of {GOAL:g}; cosines as Faiss's: {same}")


if __name__ == "__main__":
    main()
