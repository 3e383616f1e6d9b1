"""PCA-whitening: how much faster and more accurate than faiss.PCAMatrix, and with how much memory?

    python benchmarks/pca.py                          # 20,000 x 4096: faiss alone takes minutes
    python benchmarks/pca.py --rows 6000 --width 1024  # a quick look
    python benchmarks/pca.py --only-memory             # 50,000 x 4096, in float32 and in float16

Faiss runs once (it is the slow one), ours before and after it; the smaller of ours counts. The error is the
mean difference of the inner products of normalised rows from those of a plain float64 computation.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clustering
from algorithms.pca import normalise_rows
from tests import reference

SAMPLE = 2000  # rows whose inner products are compared


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20000, help="images in the race (default: %(default)s)")
    parser.add_argument("--memory-rows", type=int, default=50000, help="for memory (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="length of a feature (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="dimensions kept (default: %(default)s)")
    parser.add_argument("--only-memory", action="store_true", help="leave out the race against faiss")
    parser.add_argument("--probe", choices=("float32", "float16"), help=argparse.SUPPRESS)
    return parser


def make_features(rows: int, width: int, dtype: str) -> np.ndarray:
    """Features (rows, width) with a mean and a spectrum that falls as 1 / sqrt(i), made block by block."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.5
    shift = torch.randn(width, generator=generator) * scale.square().mean().sqrt()  # as long as a deviation
    reflector = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    features = np.empty((rows, width), dtype)
    for start in range(0, rows, 100):  # small, so that making them leaves no trace in the peak
        block = torch.randn(min(100, rows - start), width, generator=generator) * scale
        block -= 2 * torch.outer(block @ reflector, reflector)  # the axes are not those of the columns
        features[start : start + len(block)] = (block + shift).numpy()
    return features


def by_faiss(features: np.ndarray, dim: int) -> np.ndarray:
    """The plain way: PCAMatrix with whitening, then normalised rows."""
    matrix = faiss.PCAMatrix(features.shape[1], dim, -0.5)
    matrix.train(features)
    return normalise_rows(matrix.apply(features))


def by_us(features: np.ndarray, dim: int) -> np.ndarray:
    """clustering.preprocess."""
    return clustering.preprocess(features, dim)[1]


def seconds(way, features: np.ndarray, dim: int) -> tuple[float, np.ndarray]:
    """How long one call takes, and the first rows of its result."""
    start = time.perf_counter()
    x = way(features, dim)
    return time.perf_counter() - start, x[:SAMPLE].astype(np.float64)


def race(rows: int, width: int, dim: int) -> None:
    """Print the times and errors of both ways."""
    features = make_features(rows, width, "float32")
    first, ours = seconds(by_us, features, dim)
    plain_time, plain = seconds(by_faiss, features, dim)
    our_time = min(first, seconds(by_us, features, dim)[0])
    exact = reference.pca_whiten_normalise(features, dim)[:SAMPLE]
    exact_products = exact @ exact.T
    print(f"\n{rows} x {width} float32 to {dim}, {torch.get_num_threads()} threads")
    print(f"{'way':<24}{'seconds':>9}{'ratio':>8}{'mean error':>13}{'max error':>12}")
    for name, taken, x in (("faiss.PCAMatrix", plain_time, plain), ("ours", our_time, ours)):
        errors = np.abs(x @ x.T - exact_products)
        print(f"{name:<24}{taken:>9.2f}{plain_time / taken:>8.1f}{errors.mean():>13.1e}{errors.max():>12.1e}")


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at its highest (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def probe(rows: int, width: int, dim: int, dtype: str) -> None:
    """Print the peak of features + PCA + normalisation, as a multiple of rows * width * 4 bytes."""
    clustering.preprocess(make_features(600, 300, dtype), 16)  # libraries and their threads are loaded
    before = resident("VmRSS")
    features = make_features(rows, width, dtype)
    start = time.perf_counter()
    clustering.preprocess(features, dim)
    taken = time.perf_counter() - start
    unit = rows * width * 4
    array, peak = features.nbytes / unit, (resident("VmHWM") - before) / unit
    print(f"{dtype:<10}{array:>10.2f}{peak:>10.3f}{(peak - array) * unit / 1e6:>14.0f}{taken:>10.1f}")


def memory(args: argparse.Namespace) -> None:
    """Measure each dtype in a process of its own."""
    print(f"\nmemory at {args.memory_rows} x {args.width}, in units of N * D * 4 bytes")
    print(f"{'features':<10}{'array':>10}{'peak':>10}{'MB beside it':>14}{'seconds':>10}", flush=True)
    for dtype in ("float32", "float16"):
        sizes = ["--memory-rows", str(args.memory_rows), "--width", str(args.width), "--dim", str(args.dim)]
        subprocess.run([sys.executable, __file__, "--probe", dtype, *sizes], check=True)


def main(args: argparse.Namespace) -> None:
    """Run what is asked for."""
    if args.probe:
        probe(args.memory_rows, args.width, args.dim, args.probe)
        return
    if not args.only_memory:
        race(args.rows, args.width, args.dim)
    memory(args)


if __name__ == "__main__":
    main(get_parser().parse_args())
