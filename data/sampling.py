"""Which images an epoch of training visits: as many from every cluster, whatever its size.

    order = uniform_draws(assignment.labels, total=len(images), seed=derive_seed(args.seed, "sampler", epoch))

Image indexes in, image indexes out; the label of a drawn image is always its own.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def uniform_draws(labels: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Draw `total` image indexes uniformly over the non-empty clusters of `labels` (N,) int64.

    Each non-empty cluster contributes int(total / non_empty) + 1 draws, with replacement exactly when it is
    not larger than that. Then one shuffle and a cut to `total`; the cut takes at most one draw from any
    cluster, so that the clusters' counts differ by one at most. The same seed gives the same draws.
    Returns (total,) int64.
    """
    labels = _checked(labels, total)
    rng = np.random.default_rng(seed)
    order = _shuffled_within_clusters(labels, rng)
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes  # where each cluster begins in `order`
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    each = total // len(sizes) + 1

    places = np.empty((len(sizes), each), np.int64)  # row c: places within cluster c
    small = sizes <= each
    places[small] = rng.integers(0, sizes[small, None], (int(small.sum()), each))
    places[~small] = np.arange(each)  # the first of a random order: without replacement
    draws = order[starts[:, None] + places]  # (non-empty clusters, each)

    whole, last = draws[:, :-1].ravel(), draws[:, -1]
    kept = np.concatenate([whole, rng.permutation(last)[: total - len(whole)]])
    rng.shuffle(kept)
    return kept


def released_draws(labels: np.ndarray, total: int, seed: int) -> np.ndarray:
    """What the authors' released code visits, for reproducing their weights; (total,) int64 image indexes.

    Its uniform sampler gave data-set indexes to a data set that had been re-ordered by cluster: draw d stands
    for image order[d], `order` being the image indexes written cluster after cluster. The effect is that a
    cluster is visited about in proportion to its size.
    """
    order = np.argsort(_checked(labels, total), kind="stable")
    return order[uniform_draws(labels, total, seed)]


def shuffled(n: int, seed: int) -> np.ndarray:
    """All of n images once, in an order of the seed's own; (n,) int64."""
    return np.random.default_rng(seed).permutation(n)


def _checked(labels: np.ndarray, total: int) -> np.ndarray:
    """`labels` as int64, or ValueError."""
    labels = np.asarray(labels, np.int64)
    if labels.ndim != 1 or len(labels) == 0 or labels.min() < 0 or total < 0:
        raise ValueError(f"cannot draw {total} images by labels {labels.shape}: want (N,), N >= 1, all >= 0")
    return labels


def _shuffled_within_clusters(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image indexes cluster after cluster, within a cluster in random order, (N,) int64.

    One sort of 64-bit keys: the label in the upper bits, random bits in the others.
    """
    free_bits = 63 - int(labels.max()).bit_length()
    keys = (labels << free_bits) | rng.integers(0, 1 << free_bits, len(labels))
    return np.argsort(keys)


SAMPLERS = {"uniform": uniform_draws, "released": released_draws}


class ShareSampler(Sampler[list[tuple[int, ...]]]):
    """One rank's part of the global batches: lists of (position in the epoch, image index, ...).

    draws: (T,) image indexes, or (T, ...) rows of an image index and what else a view is to be told.

    The draws are cut into global batches of `batch`, starting with the one numbered `first`; of each a rank
    takes consecutive rows, so that together the ranks do what one process does. A rank that has no row of the
    last batch gets no list for it; `shares` tells for every global batch (its size, this rank's rows). A last
    batch of one image, over which batch norm has no variance, joins the one before it.
    """

    def __init__(self, draws: np.ndarray, batch: int, first: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.draws, self.batch, self.first = draws, batch, first
        self.rank, self.ranks = rank, ranks

    @property
    def joined(self) -> bool:
        """Whether a last batch of one image joins the one before it."""
        return len(self.draws) > self.batch > 1 and len(self.draws) % self.batch == 1

    @property
    def steps(self) -> int:
        """How many global batches the whole epoch has."""
        return -(-len(self.draws) // self.batch) - self.joined

    def shares(self) -> Iterator[tuple[int, range]]:
        """(size of the global batch, this rank's rows in it) for every step."""
        for step in range(self.first, self.steps):
            last = step == self.steps - 1
            total = len(self.draws) - step * self.batch if last else self.batch
            yield total, range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)

    def __len__(self) -> int:
        return sum(len(rows) > 0 for _, rows in self.shares())

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for step, (_, rows) in enumerate(self.shares(), start=self.first):
            if rows:
                positions = range(step * self.batch + rows.start, step * self.batch + rows.stop)
                yield [(position, *np.atleast_1d(self.draws[position]).tolist()) for position in positions]
