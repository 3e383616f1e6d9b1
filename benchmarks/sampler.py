"""The uniform sampler: how much faster than concatenating cluster by cluster?

    python benchmarks/sampler.py                                   # ImageNet: 1.28 million images, k = 10,000
    python benchmarks/sampler.py --images 100000 --clusters 1000

Both run in turn in this process; the minimum of the rounds counts. The plain way is given its lists of the
images of each cluster; ours starts from the labels.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from algorithms.agreement import compare
from data.sampling import uniform_draws
from tests import reference


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1281167, help="default: %(default)s")
    parser.add_argument("--clusters", type=int, default=10000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    return parser


def taken(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    """Time both and print the table; beside them NMI + AMI, the other bookkeeping of an epoch."""
    rng = np.random.default_rng(0)
    # clusters of unequal size, as k-means makes them: about a third are smaller than their share
    labels = rng.choice(args.clusters, args.images, p=rng.dirichlet(np.full(args.clusters, 4.0)))
    other = rng.permutation(labels)
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(labels, minlength=args.clusters))[:-1])
    members = [part.tolist() for part in parts]
    plain, ours, agreement = [], [], []
    for seed in range(args.rounds):
        plain.append(taken(lambda seed=seed: reference.draws_of_members(members, args.images, seed)))
        ours.append(taken(lambda seed=seed: uniform_draws(labels, args.images, seed)))
        agreement.append(taken(lambda: compare(labels, other)))
    print(f"{args.images} images, {args.clusters} clusters, minimum of {args.rounds}")
    print(f"{'way':<28}{'seconds':>9}{'ratio':>8}")
    for name, seconds in (("cluster by cluster", plain), ("ours, one sort", ours)):
        print(f"{name:<28}{min(seconds):>9.3f}{min(plain) / min(seconds):>8.1f}")
    print(f"{'(NMI and AMI, for scale)':<28}{min(agreement):>9.3f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
