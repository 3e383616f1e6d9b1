"""Features -> cluster ids: PCA-whitening, k-means, power iteration clustering, and comparing two results.

Arrays in, arrays out: nothing here knows of images or networks.

    pca, x = preprocess(features, dim=256, device=device)          # (N, D) -> (N, 256), rows of norm 1
    assignment = CLUSTERINGS["Kmeans"](x, k=10000, seed=31, device=device)
    assignment.labels                                              # (N,) int64, in the order of the rows

The method is section 3 of Caron, Bojanowski, Joulin, Douze, 'Deep Clustering for Unsupervised Learning of
Visual Features', ECCV 2018 (arXiv 1807.05520).
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy.special import gammaln

import distributed
from util import UserError

KMEANS_ITERATIONS = 20
# Rows are taken in chunks of this many bytes of float64: small beside the features, large enough for BLAS.
CHUNK_BYTES = 8 * 2**20

# ---------------------------------------------------------------------------------------- PCA-whitening

# A direction is kept while its variance exceeds that of the noise in the features: the rounding of float16,
# or for float32 the error that a forward pass in float32 makes (about 2e-6 of the feature).
RELATIVE_NOISE = {np.dtype(np.float16): 1e-3, np.dtype(np.float32): 2e-6}
# The covariance is held as a pile of stripes of so many rows, each reaching just beyond the diagonal.
STRIPE_ROWS = 128
# What Lanczos may hold beside the vectors asked for: more means fewer restarts.
SPARE_VECTORS = 96


@dataclass
class PCAWhitening:
    """The map x -> (x - mean) @ matrix whose outputs are uncorrelated and of variance 1.

    mean (D,) float64; matrix (D, d) float64, its columns in order of falling variance.
    """

    mean: np.ndarray
    matrix: np.ndarray

    @property
    def dim(self) -> int:
        """How many dimensions are kept: min(the number asked for, N - 1, numerical rank), at least 1."""
        return self.matrix.shape[1]

    def apply(self, features: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
        """Whiten `features` (N, D), float16 or float32, chunk by chunk; returns (N, d) float32."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are {features.shape}, this PCA wants (N, {len(self.mean)})")
        mean = torch.from_numpy(self.mean).to(device)
        matrix = torch.from_numpy(self.matrix).to(device)
        whitened = np.empty((len(features), self.dim), np.float32)
        for rows, chunk in _row_chunks(features, device):
            whitened[rows] = chunk.sub_(mean).matmul(matrix).float().cpu().numpy()
        return whitened

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only, for a checkpoint."""
        return {"mean": torch.from_numpy(self.mean), "matrix": torch.from_numpy(self.matrix)}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> "PCAWhitening":
        """The inverse of `state_dict`."""
        return cls(state["mean"].cpu().numpy(), state["matrix"].cpu().numpy())


def fit_pca(
    features: np.ndarray, dim: int = 256, device: torch.device | str = "cpu", sharded: bool = False
) -> PCAWhitening:
    """PCA-whitening of `features` (N, D), float16 or float32; nothing of that size is allocated.

    Same row directions as faiss.PCAMatrix(D, dim, eigen_power=-0.5), up to sign and to rotation inside equal
    eigenvalues. Mean and covariance are accumulated in float64 in two passes over the rows; where there are
    fewer rows than columns their N x N inner products serve instead of the D x D covariance. Keeps
    min(dim, N - 1, numerical rank) dimensions; constant features give one dimension that is 0 everywhere.
    Raises UserError when a feature is not finite.

    sharded: features are this process's rows; sums over the processes give each of them the same PCA, bit
    for bit.
    """
    if sharded and distributed.world_size() > 1:
        return _fit_pca_sharded(features, dim, device)
    if features.ndim != 2 or 0 in features.shape or dim < 1:
        raise ValueError(f"PCA to {dim} dimensions of features of shape {features.shape}")
    n, d = features.shape
    mean, mean_square = _moments(features, device)
    sums, vectors = _principal_axes(features, mean, min(dim, max(n - 1, 1), d))
    variances = sums / n
    rank = _numerical_rank(variances, n, d, features.dtype, mean_square)
    if rank == 0:
        return PCAWhitening(mean.cpu().numpy(), np.zeros((d, 1)))
    matrix = vectors[:, :rank] / variances[:rank].sqrt()
    if n < d:  # u is an eigenvector of X X^T, so X^T u / |X^T u| is one of X^T X, and |X^T u|^2 = n variance
        axes = torch.zeros((d, rank), dtype=torch.float64, device=device)
        for rows, chunk in _row_chunks(features, device):
            axes.addmm_(chunk.sub_(mean).T, matrix[rows])
        matrix = axes / (n * variances[:rank]).sqrt()
    return PCAWhitening(mean.cpu().numpy(), matrix.cpu().numpy())


def _numerical_rank(
    variances: torch.Tensor, n: int, d: int, dtype: np.dtype, mean_square: torch.Tensor
) -> int:
    """How many of the variances, largest first, are above the noise of the features and of the arithmetic."""
    noise = RELATIVE_NOISE.get(dtype, 0.0) ** 2 * mean_square.max().item()
    rounding = max(n, d) * np.finfo(np.float64).eps * variances[0].item()
    return int((variances > max(noise, rounding)).sum())


def _fit_pca_sharded(features: np.ndarray, dim: int, device: torch.device | str) -> PCAWhitening:
    """`fit_pca` of the rows (n_r, D) of all ranks, which may hold different numbers of them, also none.

    The D x D covariance is summed over the ranks; the first one takes its eigenvectors.
    """
    n, d = sum(distributed.gather_objects(len(features))), features.shape[1]
    if n == 0 or d == 0 or dim < 1:
        raise ValueError(f"PCA to {dim} dimensions of features of shape {(n, d)}")
    mean, mean_square = _moments(features, device, sharded=True)
    square = torch.zeros((d, d), dtype=torch.float64, device=device)
    _add_products(_lower_triangle(d, square), _centred_rows(features, mean))
    distributed.all_reduce(square)
    matrix = np.zeros((d, 1))
    if distributed.is_main():
        sums, vectors = _eigen_direct(square, min(dim, max(n - 1, 1), d))
        variances = sums / n
        rank = _numerical_rank(variances, n, d, features.dtype, mean_square)
        if rank:
            matrix = (vectors[:, :rank] / variances[:rank].sqrt()).cpu().numpy()
    del square
    return PCAWhitening(*distributed.broadcast_object((mean.cpu().numpy(), matrix)))


def preprocess(
    features: np.ndarray, dim: int = 256, device: torch.device | str = "cpu", sharded: bool = False
) -> tuple[PCAWhitening, np.ndarray]:
    """PCA-whitening to `dim` dimensions, then L2 normalisation of each row.

    features (N, D), float16 or float32, is only read. Returns the PCA and the (N, d) float32 result; a row
    that is whitened to zero stays zero. sharded: as for `fit_pca`; the result is of this process's rows.
    """
    pca = fit_pca(features, dim, device, sharded)
    return pca, normalise_rows(pca.apply(features, device))


def normalise_rows(x: np.ndarray) -> np.ndarray:
    """Divide each row of `x` (N, d) float32 by its L2 norm, in place; zero rows stay. Returns `x`."""
    for rows in _slices(len(x), x.shape[1]):
        norms = np.linalg.norm(x[rows].astype(np.float64), axis=1, keepdims=True)
        x[rows] /= np.where(norms > 0, norms, 1)
    return x


def _slices(n: int, row_length: int) -> Iterator[slice]:
    """Consecutive slices of range(n) that make chunks of about CHUNK_BYTES of float64."""
    step = max(1, CHUNK_BYTES // (8 * row_length))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _row_chunks(features: np.ndarray, device: torch.device | str) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of `features`, chunk by chunk: (which rows, their values as float64 on `device`).

    Every chunk lies in the same buffer: use it, or change it, before the next one is asked for.
    """
    buffer = None
    for rows in _slices(*features.shape):
        block = features[rows]
        if not block.flags.writeable:  # a memory map may be, and torch.from_numpy warns of it
            block = block.copy()
        if buffer is None:
            buffer = torch.empty(block.shape, dtype=torch.float64, device=device)
        yield rows, buffer[: len(block)].copy_(torch.from_numpy(block).to(device))


def _moments(
    features: np.ndarray, device: torch.device | str, sharded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square of each column, (D,) float64 on `device`; UserError unless all are finite.

    sharded: over the rows of all ranks, and every rank raises where one of them has to.
    """
    n, d = features.shape
    total = torch.zeros(d, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    bad = None
    for rows, chunk in _row_chunks(features, device):
        total += chunk.sum(0)
        squares += chunk.square_().sum(0)
        if not bool(squares.isfinite().all()):
            bad = rows.start + int(np.flatnonzero(~np.isfinite(features[rows]).all(axis=1))[0])
            break
    if sharded:
        counts, bads = zip(*distributed.gather_objects((n, bad)))
        n = sum(counts)
        bad = next((sum(counts[:r]) + i for r, i in enumerate(bads) if i is not None), None)
        if bad is None:
            distributed.all_reduce(total)
            distributed.all_reduce(squares)
    if bad is not None:
        raise UserError(f"the feature of image {bad} is not finite; the network has diverged")
    return total / n, squares / n


def _centred_rows(features: np.ndarray, mean: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks (c, D) of the centred features."""
    for _, chunk in _row_chunks(features, mean.device):
        yield chunk.sub_(mean)


def _centred_columns(features: np.ndarray, mean: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks (c, N) of the transposed centred features."""
    for columns, chunk in _row_chunks(features.T, mean.device):
        yield chunk.sub_(mean[columns, None])


def _principal_axes(
    features: np.ndarray, mean: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues (count,) of X^T X, X being the centred features, and their vectors.

    Of X X^T where that is the smaller matrix. Largest first, the vectors (min(N, D), count) in columns.
    """
    n, d = features.shape
    size, device = min(n, d), mean.device
    tight = device.type == "cpu" and _memory_is_tight(features, count)
    if tight:
        _return_freed_memory()
    square = None if tight else torch.zeros((size, size), dtype=torch.float64, device=device)
    stripes = _lower_triangle(size, square)
    _add_products(stripes, _centred_columns(features, mean) if n < d else _centred_rows(features, mean))
    return _eigen_iterative(stripes, size, count) if square is None else _eigen_direct(square, count)


def _memory_is_tight(features: np.ndarray, count: int) -> bool:
    """Whether a square covariance would be a noticeable part of what the features themselves take.

    Only asked of float16 features, which nobody chooses but to save memory, and only where the slower
    iterative solver is fit for `count` eigenvectors.
    """
    size = min(features.shape)
    return features.dtype == np.float16 and size >= 8 * count and size**2 * 8 > features.nbytes / 5


def _return_freed_memory() -> None:
    """Give memory that was freed but that malloc keeps for later back to the system (glibc; else nothing).

    Extraction leaves some 20 MB of it behind, as much as all the room that float16 features leave here.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _lower_triangle(size: int, square: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
    """The lower triangle of a (size, size) matrix in stripes of STRIPE_ROWS rows: (which rows, stripe).

    A stripe reaches from column 0 to the end of its diagonal block. Stripes are views of `square` if there
    is one, else of a pile of zeros that takes half the memory. Filling them is half the work as well.
    """
    ends = [min(start + STRIPE_ROWS, size) for start in range(0, size, STRIPE_ROWS)]
    rows = [slice(start, end) for start, end in zip([0, *ends], ends)]
    if square is not None:
        return [(r, square[r, : r.stop]) for r in rows]
    areas = [(r.stop - r.start) * r.stop for r in rows]
    pile = torch.zeros(sum(areas), dtype=torch.float64)  # one piece: the system gets all of it back
    return [(r, part.view(-1, r.stop)) for r, part in zip(rows, pile.split(areas))]


def _add_products(stripes: list[tuple[slice, torch.Tensor]], chunks: Iterator[torch.Tensor]) -> None:
    """Add chunk^T chunk of every chunk (c, size) to the stripes of a lower triangle."""
    for chunk in chunks:
        for rows, stripe in stripes:
            stripe.addmm_(chunk[:, rows].T, chunk[:, : rows.stop])


def _eigen_direct(square: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; destroys it."""
    if square.device.type != "cpu":
        values, vectors = torch.linalg.eigh(square, UPLO="L")
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    size = len(square)
    # The transpose is the same memory in the column-major order that LAPACK overwrites without a copy. Only
    # the top eigenvectors are computed, by 'evr': 1.5 to 2 times faster than all of them.
    values, vectors = scipy.linalg.eigh(
        square.numpy().T,
        lower=False,
        overwrite_a=True,
        check_finite=False,
        subset_by_index=(size - count, size - 1),
        driver="evr",
    )
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def _eigen_iterative(
    stripes: list[tuple[slice, torch.Tensor]], size: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_eigen_direct` from separate stripes, by Lanczos (ARPACK): slower, but in half the memory."""

    def multiply(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(vector.reshape(-1).copy())
        product = torch.zeros_like(x)
        for rows, stripe in stripes:
            product[rows].addmv_(stripe, x[: rows.stop])
            product[: rows.start].addmv_(stripe[:, : rows.start].T, x[rows])
        return product.numpy()

    threads = torch.get_num_threads()
    # The products wait for memory, and short as they are a second thread on a busy core slows them sevenfold.
    torch.set_num_threads(1)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(
            scipy.sparse.linalg.LinearOperator((size, size), matvec=multiply, dtype=np.float64),
            k=count,
            ncv=min(size, count + SPARE_VECTORS),
            tol=1e-10,
            v0=np.random.default_rng(0).standard_normal(size),
        )
    finally:
        torch.set_num_threads(threads)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


# ---------------------------------------------------------------------------------------- assignments


@dataclass
class Assignment:
    """Which row belongs to which cluster.

    labels (N,) int64 in the order of the rows; num_clusters: a cluster nothing belongs to keeps its id;
    objective: what the clustering reports as its loss; distances (N,) float32, squared L2 to the row's own
    centroid; centroids (num_clusters, d) float32.
    """

    labels: np.ndarray
    num_clusters: int
    objective: float
    distances: np.ndarray
    centroids: np.ndarray

    def sizes(self) -> np.ndarray:
        """How many rows each cluster has, (num_clusters,) int64."""
        return np.bincount(self.labels, minlength=self.num_clusters)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, for a checkpoint."""
        arrays = {
            name: torch.from_numpy(getattr(self, name)) for name in ("labels", "distances", "centroids")
        }
        return arrays | {"num_clusters": self.num_clusters, "objective": self.objective}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Assignment":
        """The inverse of `state_dict`."""
        arrays = {name: state[name].cpu().numpy() for name in ("labels", "distances", "centroids")}
        return cls(num_clusters=state["num_clusters"], objective=state["objective"], **arrays)

    def lists(self) -> list[list[int]]:
        """For each cluster the indexes of its rows, ascending."""
        order = np.argsort(self.labels, kind="stable").tolist()
        ends = np.cumsum(self.sizes()).tolist()
        return [order[start:end] for start, end in zip([0, *ends[:-1]], ends)]


def _check_points(x: np.ndarray) -> None:
    """Refuse what faiss would take without a word: other types, no points, values that are not finite."""
    if x.ndim != 2 or 0 in x.shape or x.dtype != np.float32:
        raise ValueError(f"clustering wants float32 points (N, d), not {x.dtype} {x.shape}")
    # min and max carry a NaN on and need no array of N x d truth values
    if not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise UserError("some of the points to cluster are not finite; the features must be finite numbers")


def _on_gpu(device: torch.device | str) -> bool:
    """Whether faiss is to work on the GPUs; it takes all visible ones, and memory torch is only caching."""
    if torch.device(device).type != "cuda" or faiss.get_num_gpus() == 0:
        return False
    torch.cuda.empty_cache()
    return True


def _nearest(
    queries: np.ndarray, points: np.ndarray, count: int, device: torch.device | str, alone: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search: the `count` nearest of `points` for each query, nearest first.

    Returns squared L2 distances (N, count) float32 and indexes (N, count) int64. On all GPUs; of a process
    that searches beside others (`alone` false) on its own.
    """
    index = faiss.IndexFlatL2(points.shape[1])
    if _on_gpu(device):
        if alone:
            index = faiss.index_cpu_to_all_gpus(index)
        else:
            resources = faiss.StandardGpuResources()  # to be kept for as long as the index is used
            index = faiss.index_cpu_to_gpu(resources, torch.device(device).index or 0, index)
    index.add(np.ascontiguousarray(points))
    distances, indexes = index.search(np.ascontiguousarray(queries), count)
    return np.maximum(distances, 0, out=distances), indexes


def assign(
    x: np.ndarray, centroids: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row of `x` (N, d) float32.

    Returns labels (N,) int64 and squared L2 distances (N,) float32.
    It is the search that gives k-means its final labels; use it to assign new images.
    """
    _check_points(x)
    distances, labels = _nearest(x, centroids, 1, device)
    return labels[:, 0], distances[:, 0]


# ---------------------------------------------------------------------------------------- k-means


def kmeans(
    x: np.ndarray,
    k: int,
    seed: int,
    niter: int = KMEANS_ITERATIONS,
    device: torch.device | str = "cpu",
) -> Assignment:
    """k-means of `x` (N, d) float32 by faiss: squared L2, all points, one start, always `niter` iterations.

    Labels and distances come from one more search after the last iteration; `objective` is the sum of squared
    distances at the last iteration. Faiss re-seeds empty clusters by splitting a large one; with fewer
    distinct points than k some stay empty. On the CPU two runs give the same bits.
    Raises UserError for k < 1, k > N and points that are not finite.
    """
    _check_points(x)
    if not 1 <= k <= len(x):
        raise UserError(f"cannot make {k} clusters of {len(x)} images: k must lie between 1 and {len(x)}")
    clustering = faiss.Kmeans(
        x.shape[1],
        k,
        niter=niter,
        seed=seed % 2**31,  # a C int
        gpu=_on_gpu(device),
        # Faiss draws 256 points a centroid unless told otherwise, and warns below 39.
        max_points_per_centroid=10**7,
        min_points_per_centroid=1,
    )
    if hasattr(clustering.cp, "early_stop_threshold"):  # faiss >= 1.15 stops when the objective repeats
        clustering.cp.early_stop_threshold = -1
    clustering.train(x)
    labels, distances = assign(x, clustering.centroids, device)
    return Assignment(labels, k, float(clustering.obj[-1]), distances, clustering.centroids)


def kmeans_distributed(
    x: np.ndarray,
    k: int,
    seed: int,
    niter: int = KMEANS_ITERATIONS,
    device: torch.device | str = "cpu",
) -> Assignment:
    """`kmeans` by Lloyd's iterations over processes, each of which keeps its own rows x (n_r, d) float32.

    The start is Faiss's for the same seed. In an iteration each rank finds the nearest centroids of its rows,
    and the sums and counts of all ranks give the next centroids; empty clusters are split off large ones by
    Faiss's rule. Returns the same assignment of all rows, in the order of ranks, on every rank. Memory of a
    rank: its rows, the centroids, and labels and distances of all rows. Ranks may hold no row.
    Raises UserError, on every rank, as `kmeans` does.
    """
    counts = distributed.gather_objects(_points_or_error(x))
    errors = [count for count in counts if isinstance(count, str)]
    if errors:
        raise UserError(errors[0])
    n, first = sum(counts), sum(counts[: distributed.rank()])
    if not 1 <= k <= n:
        raise UserError(f"cannot make {k} clusters of {n} images: k must lie between 1 and {n}")
    centroids = _faiss_start(x, first, n, k, seed % 2**31)
    objective = 0.0
    for _ in range(niter if k < n else 0):  # k = n: every point is a centroid already
        labels, distances = _assign_or_none(x, centroids, device)
        sums = torch.zeros((k, x.shape[1]), dtype=torch.float64)
        for rows in _slices(len(x), x.shape[1]):
            sums.index_add_(0, torch.from_numpy(labels[rows]), torch.from_numpy(x[rows]).double())
        sizes = torch.from_numpy(np.bincount(labels, minlength=k))
        total = torch.tensor([distances.sum(dtype=np.float64)])
        for tensor in (sums, sizes, total):
            distributed.all_reduce(tensor)
        objective = total.item()
        filled = sizes > 0
        centroids[filled.numpy()] = (sums[filled] / sizes[filled, None]).float().numpy()
        _split_clusters(centroids, sizes.numpy(), n)
    labels, distances = _assign_or_none(x, centroids, device)
    labels, distances = distributed.all_gather_rows(labels), distributed.all_gather_rows(distances)
    return Assignment(labels, k, objective, distances, centroids)


def _points_or_error(x: np.ndarray) -> int | str:
    """How many points there are, or why they cannot be clustered."""
    try:
        if len(x):
            _check_points(x)
    except UserError as error:
        return str(error)
    return len(x)


def _assign_or_none(
    x: np.ndarray, centroids: np.ndarray, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """`assign`, also of no rows, by a process beside others."""
    if len(x) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    distances, labels = _nearest(x, centroids, 1, device, alone=distributed.world_size() == 1)
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


# ---------------------------------------------------------------------------------------- PIC

SPARE_NEIGHBOURS = 3


def pic(
    x: np.ndarray,
    k: int | None = None,
    seed: int | None = None,
    *,
    nnn: int = 5,
    sigma: float = 0.2,
    alpha: float = 0.001,
    niter: int = 200,
    device: torch.device | str = "cpu",
) -> Assignment:
    """Power iteration clustering of `x` (N, d) float32 (Lin and Cohen, ICML 2010; here on a neighbour graph).

    The number of clusters comes out of the data and nothing is random: `k` and `seed` are there so that every
    clustering is called alike. Clusters are numbered in the order of their first row; a centroid is the mean
    of its rows and the objective the sum of the squared distances to it.
    Raises UserError for points that are not finite.
    """
    _check_points(x)
    neighbours, distances = nearest_neighbours(x, nnn, device)
    labels = pic_labels(neighbours, distances, sigma, alpha, niter)
    centroids, to_centroid = _centroids(x, labels)
    return Assignment(labels, len(centroids), float(to_centroid.sum()), to_centroid, centroids)


def nearest_neighbours(
    x: np.ndarray, nnn: int = 5, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The exact neighbour graph: the min(nnn, N - 1) nearest other rows of each row of `x` (N, d) float32.

    Returns indexes (N, nnn) int64 and squared L2 distances (N, nnn) float64, nearest first, ties by index. A
    row is left out of its own neighbours by its index: among duplicates it need not be found first. Faiss's
    float32 distances are off by about 1e-7, so a few spare candidates are taken and judged in float64.
    """
    n, nnn = len(x), min(nnn, len(x) - 1)
    _, candidates = _nearest(x, x, min(nnn + 1 + SPARE_NEIGHBOURS, n), device)
    candidates.sort(axis=1)
    distances = np.empty(candidates.shape)
    for rows, chunk in _row_chunks(x, "cpu"):
        for column, others in enumerate(candidates[rows].T):
            distances[rows, column] = (chunk - torch.from_numpy(x[others])).square_().sum(1).numpy()
    distances[candidates == np.arange(n)[:, None]] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :nnn]
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(distances, order, axis=1)


def pic_labels(
    neighbours: np.ndarray,
    distances: np.ndarray,
    sigma: float = 0.2,
    alpha: float = 0.001,
    niter: int = 200,
) -> np.ndarray:
    """Labels (N,) int64 from a neighbour graph: neighbours (N, nnn) and their squared distances.

    Edges weigh exp(-d2 / sigma^2), w = a + a^T. All in float64. The partition is that of the form that walks
    node by node through all `niter` iterations (tests/reference.py).
    """
    n, nnn = neighbours.shape
    if nnn == 0:
        return np.zeros(n, np.int64)
    affinity = np.exp(-distances.astype(np.float64) / sigma**2)
    edges = scipy.sparse.csr_array(
        (affinity.ravel(), neighbours.ravel(), np.arange(0, n * nnn + 1, nnn)), shape=(n, n)
    )
    transposed = edges.T.tocsr()  # its rows come out sorted, and so do those of its own transpose
    w = transposed + transposed.T.tocsr()
    ends = _follow(_steepest_neighbour(w, _power_iteration(w, alpha, niter)))
    return _by_first_row(_absorb_single_rows(ends, neighbours))


def _power_iteration(w: scipy.sparse.csr_array, alpha: float, niter: int) -> np.ndarray:
    """v <- alpha * W v + (1 - alpha) / n, divided by its sum, `niter` times from 1 / n; v is (n,) float64.

    An iteration brings v about a hundred times nearer to its limit (alpha is small), so that after some ten
    of them v no longer changes by a bit, nor would it in the rest.
    """
    n = w.shape[0]
    v = np.full(n, 1.0 / n)
    for _ in range(niter):
        last, v = v, alpha * (w @ v) + (1.0 - alpha) / n
        v /= v.sum()
        if np.array_equal(v, last):
            break
    return v


def _steepest_neighbour(w: scipy.sparse.csr_array, v: np.ndarray) -> np.ndarray:
    """For each node i the neighbour j with the largest w_ij * (v_j - v_i) if that is positive, else i.

    Of equally steep neighbours the first by index. Returns (n,) int64.
    """
    rows = np.repeat(np.arange(len(v)), np.diff(w.indptr))
    ascent = w.data * (v[w.indices] - v[rows])
    steepest = np.zeros(len(v))
    linked = np.flatnonzero(np.diff(w.indptr))  # all, unless every weight of a node underflows to 0
    if len(linked):
        steepest[linked] = np.maximum.reduceat(ascent, w.indptr[linked])
    edges = np.flatnonzero((ascent == steepest[rows]) & (ascent > 0))
    pointers = np.arange(len(v))
    pointers[rows[edges[::-1]]] = w.indices[edges[::-1]]  # the first one is written last
    return pointers


def _follow(pointers: np.ndarray) -> np.ndarray:
    """Where each node ends by following `pointers` (n,), which have no cycle longer than one.

    Doubling: after a round every pointer spans twice as many steps, so that few rounds do.
    """
    while True:
        further = pointers[pointers]
        if np.array_equal(further, pointers):
            return pointers
        pointers = further


def _absorb_single_rows(labels: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Give each cluster of one row to the cluster of its nearest neighbour whose own cluster is larger.

    All are judged by the sizes before any is given away; without such a neighbour the row stays alone.
    """
    single = np.bincount(labels)[labels] == 1
    rows = np.flatnonzero(single)
    takes = ~single[neighbours[rows]]  # (rows, nnn), nearest first
    nearest = neighbours[rows, takes.argmax(axis=1)]
    found = takes.any(axis=1)
    labels = labels.copy()
    labels[rows[found]] = labels[nearest[found]]
    return labels


def _by_first_row(labels: np.ndarray) -> np.ndarray:
    """Number the clusters 0, 1, ... in the order in which they first appear; labels (n,) are in [0, n)."""
    n = len(labels)
    first = np.full(n, n)
    first[labels[::-1]] = np.arange(n)[::-1]  # of several rows the one written last, the first
    clusters = np.flatnonzero(first < n)
    number = np.empty(n, np.int64)
    number[clusters[np.argsort(first[clusters])]] = np.arange(len(clusters))
    return number[labels]


def _centroids(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean row of each cluster (k, d) float32; each row's squared distance to its own (N,) float32."""
    sums = torch.zeros((int(labels.max()) + 1, x.shape[1]), dtype=torch.float64)
    for rows, chunk in _row_chunks(x, "cpu"):
        sums.index_add_(0, torch.from_numpy(labels[rows]), chunk)
    means = sums / torch.from_numpy(np.bincount(labels))[:, None]
    distances = np.empty(len(x), np.float32)
    for rows, chunk in _row_chunks(x, "cpu"):
        distances[rows] = (chunk - means[torch.from_numpy(labels[rows])]).square_().sum(1).numpy()
    return means.float().numpy(), distances


# What main.py offers by name: each is called as clustering(x, k=..., seed=..., device=...).
CLUSTERINGS: dict[str, Callable[..., Assignment]] = {"Kmeans": kmeans, "PIC": pic}

# ---------------------------------------------------------------------------------------- comparison


def compare(labels_a: np.ndarray, labels_b: np.ndarray) -> dict[str, float]:
    """How well two labellings (N,) of the same rows agree: {"nmi": ..., "ami": ...}.

    NMI is mutual information over the geometric mean of the entropies, scikit-learn's
    average_method='geometric' (the definition of 2018); it is not corrected for chance. AMI is, and equals
    scikit-learn's: (MI - expected MI) / (mean entropy - expected MI), Vinh et al., JMLR 2010. It is written
    out here because scikit-learn's takes minutes for 10,000 x 10,000 clusters.
    """
    if labels_a.shape != labels_b.shape or labels_a.ndim != 1 or len(labels_a) == 0:
        raise ValueError(f"cannot compare labels of shapes {labels_a.shape} and {labels_b.shape}")
    n = len(labels_a)
    a, b = (labels.astype(np.int64) - labels.min() for labels in (labels_a, labels_b))
    sizes_a, sizes_b = (counts[counts > 0] for counts in (np.bincount(a), np.bincount(b)))
    if len(sizes_a) == len(sizes_b) == 1:
        return {"nmi": 1.0, "ami": 1.0}
    _, joint = np.unique(a * (b.max() + 1) + b, return_counts=True)
    entropy_a, entropy_b, entropy_joint = (_entropy(sizes, n) for sizes in (sizes_a, sizes_b, joint))
    mutual = max(entropy_a + entropy_b - entropy_joint, 0.0)
    if mutual < np.finfo(np.float64).eps:
        nmi = 0.0
    else:
        nmi = mutual / np.sqrt(entropy_a * entropy_b)
    expected = _expected_mutual_information(sizes_a, sizes_b, n)
    room = (entropy_a + entropy_b) / 2 - expected
    ami = (mutual - expected) / (np.copysign(max(abs(room), np.finfo(np.float64).eps), room))
    return {"nmi": float(nmi), "ami": float(ami)}


def cluster_sizes(assignment: Assignment) -> dict[str, float]:
    """How the rows spread over the clusters: filled ones, their smallest, median and largest size, entropy.

    The entropy of the sizes is in nats; log(k) would be all equal.
    """
    sizes = assignment.sizes()
    filled = sizes[sizes > 0]
    return {
        "number": assignment.num_clusters,
        "nonempty": len(filled),
        "min": int(filled.min()),
        "median": float(np.median(filled)),
        "max": int(filled.max()),
        "entropy": _entropy(filled, len(assignment.labels)),
    }


def _entropy(sizes: np.ndarray, n: int) -> float:
    """Entropy in nats of a partition of n rows into groups of these sizes, all positive."""
    return float(np.log(n) - (sizes * np.log(sizes)).sum() / n)


def _expected_mutual_information(sizes_a: np.ndarray, sizes_b: np.ndarray, n: int) -> float:
    """Expected mutual information in nats of two random labellings with these cluster sizes.

    Vinh, Epps, Bailey, JMLR 2010, equation 24a: clusters of sizes a and b share m rows with the
    hypergeometric probability a! b! (n-a)! (n-b)! / (n! m! (a-m)! (b-m)! (n-a-b+m)!). Clusters of equal size
    are counted once, and m runs only where that probability is not negligible: 10 standard deviations around
    its mean, and 30 more for the tail that is longer than a normal one.
    """
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    (a_sizes, a_times), (b, b_times) = (np.unique(s, return_counts=True) for s in (sizes_a, sizes_b))
    expected = 0.0
    for a, times in zip(a_sizes, a_times):
        mean = a * b / n
        reach = 10 * np.sqrt(mean) + 30
        low = np.maximum(np.maximum(1, a + b - n), np.floor(mean - reach).astype(np.int64))
        high = np.minimum(np.minimum(a, b), np.ceil(mean + reach).astype(np.int64))
        m = low[:, None] + np.arange((high - low).max() + 1)
        beyond = m > high[:, None]
        m = np.minimum(m, high[:, None])
        column = b[:, None]
        log_probability = (
            (log_factorial[a] + log_factorial[n - a] - log_factorial[n])
            + (log_factorial[b] + log_factorial[n - b])[:, None]
            - log_factorial[m]
            - log_factorial[a - m]
            - log_factorial[column - m]
            - log_factorial[n - a - column + m]
        )
        information = m / n * np.log(n * m / (a * column)) * np.exp(log_probability)
        information[beyond] = 0
        expected += times * (b_times * information.sum(1)).sum()
    return float(expected)
