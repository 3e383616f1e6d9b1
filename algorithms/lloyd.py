"""k-means by Lloyd's iterations over processes, each of which keeps its own rows, by Faiss's rules."""

import faiss
import numpy as np
import torch

import distributed
from algorithms.nearest import check_points, nearest
from algorithms.pca import slices
from util import UserError


def lloyd(
    x: np.ndarray,
    k: int,
    seed: int,
    niter: int = 20,
    device: torch.device | str = "cpu",
    *,
    spherical: bool = False,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """k-means over processes, each of which keeps its own rows x (n_r, d) float32; ranks may hold none.

    The start is Faiss's for the same seed, or `start` (k, d). In an iteration each rank finds the nearest
    centroids of its rows, and the sums and counts of all ranks give the next centroids; empty clusters are
    split off large ones by Faiss's rule. spherical: rows have norm 1, and so have centroids, which makes the
    nearest one that of the largest cosine; a mean of norm 0 leaves its centroid where it was.

    Returns, the same on every rank, of all rows in the order of ranks: labels (N,) int64, squared distances
    (N,) float32, the objective of the last iteration, centroids (k, d) float32. Memory of a rank: its rows,
    the centroids, and labels and distances of all rows.
    Raises UserError, on every rank, for k < 1, k > N and points that are not finite.
    """
    n, first = _check_points_of_all(x)
    if not 1 <= k <= n:
        raise UserError(f"cannot make {k} clusters of {n} images: k must lie between 1 and {n}")
    centroids = _faiss_start(x, first, n, k, seed % 2**31) if start is None else start.astype(np.float32)
    objective = 0.0
    for _ in range(niter if k < n else 0):  # k = n: every point is a centroid already
        labels, distances = _assign_own(x, centroids, device)
        sums, sizes, objective = _sums_of_all(x, labels, distances, k)
        filled = sizes > 0
        means = (sums[filled] / sizes[filled, None]).numpy()
        centroids[filled.numpy()] = _on_sphere(means, centroids[filled.numpy()]) if spherical else means
        _split_clusters(centroids, sizes.numpy(), n)
        if spherical:
            centroids = _on_sphere(centroids, centroids)
    labels, distances = _assign_own(x, centroids, device)
    return distributed.all_gather_rows(labels), distributed.all_gather_rows(distances), objective, centroids


def _sums_of_all(
    x: np.ndarray, labels: np.ndarray, distances: np.ndarray, k: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Over the rows of all ranks: sums (k, d) float64 and sizes (k,) of the clusters, sum of distances."""
    sums = torch.zeros((k, x.shape[1]), dtype=torch.float64)
    for rows in slices(len(x), x.shape[1]):
        sums.index_add_(0, torch.from_numpy(labels[rows]), torch.from_numpy(x[rows]).double())
    sizes = torch.from_numpy(np.bincount(labels, minlength=k))
    total = torch.tensor([distances.sum(dtype=np.float64)])
    for tensor in (sums, sizes, total):
        distributed.all_reduce(tensor)
    return sums, sizes, total.item()


def _on_sphere(rows: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Rows divided by their norm; one of norm 0 is that of `otherwise`."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 0, rows / np.where(norms > 0, norms, 1), otherwise).astype(np.float32)


def _check_points_of_all(x: np.ndarray) -> tuple[int, int]:
    """(rows of all ranks, which one is this rank's first); UserError, on every rank, where one has to."""
    error = None
    try:
        if len(x):
            check_points(x)
    except UserError as raised:
        error = str(raised)
    counts, errors = zip(*distributed.gather_objects((len(x), error)))
    for error in filter(None, errors):
        raise UserError(error)
    return sum(counts), sum(counts[: distributed.rank()])


def _assign_own(
    x: np.ndarray, centroids: np.ndarray, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and squared distances of this rank's rows, which may be none."""
    if len(x) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    distances, labels = nearest(x, centroids, 1, device, alone=distributed.world_size() == 1)
    return labels[:, 0], distances[:, 0]


def _faiss_start(x: np.ndarray, first: int, n: int, k: int, seed: int) -> np.ndarray:
    """The k of n rows with which Faiss starts for this seed, (k, d) float32; x: rows from `first` on."""
    order = np.arange(n, dtype=np.int32)  # what Faiss takes where k = n
    if k < n:
        faiss.rand_perm(faiss.swig_ptr(order), n, seed + 1)
    chosen = order[:k].astype(np.int64) - first
    mine = (chosen >= 0) & (chosen < len(x))
    start = torch.zeros((k, x.shape[1]))
    start[torch.from_numpy(mine)] = torch.from_numpy(x[chosen[mine]])
    return distributed.all_reduce(start).numpy()  # the other ranks add zeros


def _split_clusters(centroids: np.ndarray, sizes: np.ndarray, n: int) -> None:
    """Give each empty cluster a copy of a large one's centroid, pushed a little apart; in place.

    centroids (k, d) float32; sizes (k,) int64 of n > k points are only read. Faiss's rule, draw for draw:
    clusters are walked in turn, from the first one, and one is taken with probability (size - 1) / (n - k);
    the two centroids get 1 +- 1/1024 of it, alternating over the dimensions, and half of the size each.
    """
    k, d = centroids.shape
    push = np.where(np.arange(d) % 2 == 0, 1 / 1024, -1 / 1024).astype(np.float32)
    sizes = sizes.astype(np.float32)  # Faiss does not round halves
    chance = ((sizes - 1.0) / (n - k)).astype(np.float32)
    random = np.random.RandomState(1234)  # the generator of faiss.RandomGenerator, by the thousand
    draws = _faiss_draws(random, k)
    for empty in np.flatnonzero(sizes == 0):
        while not (taken := draws[:k] < chance).any():
            draws = np.concatenate([draws[k:], _faiss_draws(random, k)])
        large = int(taken.argmax())
        draws = np.concatenate([draws[large + 1 :], _faiss_draws(random, large + 1)])
        centroids[empty] = centroids[large] * (1 + push)
        centroids[large] *= 1 - push
        sizes[[empty, large]] = sizes[large] / 2
        chance[[empty, large]] = (sizes[large] - 1.0) / (n - k)


def _faiss_draws(random: np.random.RandomState, count: int) -> np.ndarray:
    """The next `count` values of faiss.RandomGenerator.rand_float, (count,) float32."""
    drawn = random.randint(0, 2**32, count, dtype=np.uint32)  # all 32 bits: as they come
    return drawn.astype(np.float32) / np.float32(2**32 - 1)
