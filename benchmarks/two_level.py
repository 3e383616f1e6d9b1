"""What does k-means at two levels cost over points, clusters, super-clusters and processes, and why?

    python benchmarks/two_level.py                       # two cores: 1 and 2 processes of one thread
    python benchmarks/two_level.py --cores 8 --processes 1 2 4 8

Measures DeeperCluster's clustering (`clustering.kmeans_two_level`) on points in memory, fits a formula to two
thirds of the measurements and says how far it is off on the others. N points of d numbers, M super-clusters
of k' = k / M clusters each, T iterations, W processes on P = min(W, cores) cores:

    seconds = search x 2 N (M + k') d (T + 1) / P                  every point against M, then k' centroids
            + sums x 2 N d T / P                                   points added up; one process: Faiss's own
            + messages x 3 T (1 + M)                               sums, counts, objective of every iteration
            + bytes x 8 T (M + k) d x 2 (W - 1) / W                the sums themselves, float64
            + calls x (1 + M)                                      starts and the labels' last search

The coefficients are not negative and found by least squares of the relative error. docs/scale.md uses the
same formula with the rates of other machines.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from commandline import Parser, at_least

TERMS = ("search", "sums, one process", "sums, several", "messages", "bytes", "calls")
EVERY = 3  # measurement is held out


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--points", type=at_least(1), nargs="+", default=[5_000, 15_000, 40_000], metavar="N")
    parser.add_argument("--k", type=at_least(1), nargs="+", default=[100, 400, 1600], help="clusters in all")
    parser.add_argument("--super-clusters", type=at_least(1), nargs="+", default=[1, 2, 4], metavar="M")
    parser.add_argument("--width", type=at_least(1), default=128, help="numbers of a point")
    parser.add_argument("--niter", type=at_least(1), default=10, help="iterations, as the paper")
    parser.add_argument("--processes", type=at_least(1), nargs="+", default=[1, 2], metavar="W")
    parser.add_argument("--cores", type=at_least(1), default=2, help="that the processes share")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="the fastest of so many counts")
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass

import faiss
import numpy as np
import torch
from scipy.optimize import nnls

import distributed
from benchmarks.kmeans import make_points
from clustering import kmeans_two_level


@dataclass(frozen=True)
class Clustering:
    """One clustering: points, clusters, super-clusters, numbers of a point, iterations, processes, cores."""

    n: int
    k: int
    m: int
    d: int
    niter: int
    ranks: int
    cores: int

    def amounts(self) -> list[float]:
        """How much there is of each of TERMS: multiply-adds and additions, messages, bytes, calls."""
        busy, several = min(self.ranks, self.cores), self.ranks > 1
        adds = 2.0 * self.n * self.d * self.niter / busy
        return [
            2.0 * self.n * (self.m + self.k / self.m) * self.d * (self.niter + 1) / busy,
            adds * (not several),
            adds * several,
            3.0 * self.niter * (1 + self.m) * several,
            8.0 * self.niter * (self.m + self.k) * self.d * 2 * (self.ranks - 1) / self.ranks,
            1.0 + self.m,
        ]


def fit(jobs: list[Clustering], seconds: list[float]) -> np.ndarray:
    """The coefficients (len(TERMS),), none negative, with the least squares of the relative error."""
    amounts = np.array([job.amounts() for job in jobs]) / np.array(seconds)[:, None]
    scale = np.abs(amounts).max(axis=0)
    scale[scale == 0] = 1  # a term that no measurement has
    return nnls(amounts / scale, np.ones(len(jobs)))[0] / scale


def predict(coefficients: np.ndarray, job: Clustering) -> float:
    """Seconds by the formula."""
    return float(np.dot(coefficients, job.amounts()))


def on_rank(rank: int, port: int, jobs: list[Clustering], rounds: int, path: str) -> None:
    """Measure the jobs, all of as many ranks, on this rank's rows; the first rank writes the seconds."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(jobs[0].ranks)}
    distributed.init("cpu")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    found = []
    for job in jobs:
        rows = distributed.share_of(job.n)
        x = make_points(job.n, job.d, 50)[rows.start : rows.stop].copy()
        taken = []
        for seed in range(rounds):
            distributed.gather_objects(None)  # all are ready
            start = time.perf_counter()
            kmeans_two_level(x, job.m, job.k // job.m, seed, niter=job.niter)
            distributed.gather_objects(None)
            taken.append(time.perf_counter() - start)
        found.append(min(taken))
    if distributed.is_main():
        Path(path).write_text(json.dumps(found))
    distributed.shutdown()


def measure(jobs: list[Clustering], rounds: int) -> list[float]:
    """Seconds of jobs that run in as many processes each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/seconds"
        torch.multiprocessing.spawn(on_rank, (port, jobs, rounds, path), nprocs=jobs[0].ranks)
        return json.loads(Path(path).read_text())


def main(args: argparse.Namespace) -> None:
    """Measure, fit, print every measurement beside the formula, and the error on those held out."""
    jobs, seconds = [], []
    for ranks in args.processes:
        grid = itertools.product(args.points, args.k, args.super_clusters)
        mine = [Clustering(n, k, m, args.width, args.niter, ranks, args.cores) for n, k, m in grid]
        seconds += measure(mine, args.rounds)
        jobs += mine
    held = np.arange(len(jobs)) % EVERY == EVERY - 1
    coefficients = fit([j for j, h in zip(jobs, held) if not h], [s for s, h in zip(seconds, held) if not h])
    print(f"{'N':>7} {'k':>6} {'M':>3} {'W':>3} {'seconds':>9} {'formula':>9}  (* held out)")
    errors: dict[bool, list[float]] = {False: [], True: []}
    for job, taken, out in zip(jobs, seconds, held.tolist()):
        formula = predict(coefficients, job)
        errors[out].append(abs(formula / taken - 1))
        row = f"{job.n:>7} {job.k:>6} {job.m:>3} {job.ranks:>3} {taken:>9.3f} {formula:>9.3f}"
        print(row + "  *" * out)
    for name, value in zip(TERMS, coefficients):
        print(f"{name:<18} {value:.3g} s each" + (f" ({1e-9 / value:.3g} G/s)" if 0 < value < 1e-6 else ""))
    for out, title in ((False, "fitted"), (True, "held out")):
        part = errors[out]
        print(f"{title}: {len(part)} points, error median {np.median(part):.1%}, largest {max(part):.1%}")
    print(json.dumps({"shape": asdict(jobs[0]), "coefficients": dict(zip(TERMS, coefficients.tolist()))}))


if __name__ == "__main__":
    main(ARGS)
