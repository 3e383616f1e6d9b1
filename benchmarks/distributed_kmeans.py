"""k-means over several processes: time and objective against Faiss in one process.

    python benchmarks/distributed_kmeans.py              # 20,000 x 256, k = 500, in 1 and in 2 processes
    python benchmarks/distributed_kmeans.py --points 200000 --k 2000 --processes 1 2 4 8

Every process has as many threads (--threads), Faiss's as well. In each round, with its own seed, every way
runs once; the processes are started before the clock. The fastest round counts; a ratio of 2 is twice as fast
as Faiss in one process. Both ways end with a search for the labels.
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import faiss
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
from algorithms.agreement import compare
from benchmarks.kmeans import make_points
from clustering import Assignment, kmeans


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=20000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="length of a point (default: %(default)s)")
    parser.add_argument("--k", type=int, default=500, help="clusters (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each with its seed (default: %(default)s)")
    return parser


def use_threads(number: int) -> None:
    """Let this process compute with so many threads."""
    torch.set_num_threads(number)
    faiss.omp_set_num_threads(number)


def on_rank(rank: int, size: int, port: int, args: argparse.Namespace, seed: int, path: str) -> None:
    """Cluster this rank's rows; the first rank writes the seconds and the result to `path`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    distributed.init("cpu")
    use_threads(args.threads)
    rows = distributed.share_of(args.points)
    x = make_points(args.points, args.width, args.k)[rows.start : rows.stop].copy()
    distributed.gather_objects(None)  # all are ready
    start = time.perf_counter()
    result = kmeans(x, args.k, seed, ranks=True)
    distributed.gather_objects(None)
    if distributed.is_main():
        torch.save((time.perf_counter() - start, result.state_dict()), path)
    distributed.shutdown()


def in_processes(size: int, args: argparse.Namespace, seed: int) -> tuple[float, Assignment]:
    """Seconds and result of k-means over `size` new processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "result")
        torch.multiprocessing.spawn(on_rank, (size, port, args, seed, path), nprocs=size)
        seconds, state = torch.load(path)
    return seconds, Assignment.from_state_dict(state)


def in_faiss(args: argparse.Namespace, seed: int) -> tuple[float, Assignment]:
    """Seconds and result of Faiss in this process."""
    x = make_points(args.points, args.width, args.k)
    start = time.perf_counter()
    result = kmeans(x, args.k, seed)
    return time.perf_counter() - start, result


def main(args: argparse.Namespace) -> None:
    """Time all ways over the seeds and print the table."""
    use_threads(args.threads)
    seconds: dict[int, list[float]] = {size: [] for size in [0, *args.processes]}  # 0: Faiss
    differences: dict[int, list[float]] = {size: [] for size in seconds}
    agreements: dict[int, list[float]] = {size: [] for size in seconds}
    for seed in range(args.rounds):
        taken, plain = in_faiss(args, seed)
        for size in seconds:
            taken, result = in_processes(size, args, seed) if size else (taken, plain)
            seconds[size].append(taken)
            differences[size].append(abs(result.objective / plain.objective - 1))
            agreements[size].append(compare(result.labels, plain.labels)["nmi"])
    print(
        f"{args.points} x {args.width}, k = {args.k}, {os.cpu_count()} cores, threads of each: {args.threads}"
    )
    print(f"{'way':<28}{'seconds':>9}{'ratio':>8}{'largest objective difference':>31}{'smallest NMI':>14}")
    for size in seconds:
        name = f"distributed, {size} process" + "es" * (size > 1) if size else "faiss, 1 process"
        fastest = min(seconds[size])
        print(
            f"{name:<28}{fastest:>9.2f}{min(seconds[0]) / fastest:>8.2f}"
            f"{max(differences[size]):>30.4%} {min(agreements[size]):>14.3f}"
        )


if __name__ == "__main__":
    main(get_parser().parse_args())
