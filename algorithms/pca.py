"""PCA-whitening: one fit for one rank or for many, and its application row by row.

Arrays in, arrays out: nothing here knows of images or networks. Section 3 of Caron et al., ECCV 2018.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

import distributed
from util import UserError

# Rows are taken in chunks of this many bytes of float64: small beside the features, large enough for BLAS.
CHUNK_BYTES = 8 * 2**20
# A direction is kept while its variance exceeds that of the noise in the features: the rounding of float16,
# or for float32 the error that a forward pass in float32 makes (about 2e-6 of the feature).
RELATIVE_NOISE = {np.dtype(np.float16): 1e-3, np.dtype(np.float32): 2e-6}
STRIPE_ROWS = 128  # of a lower triangle are computed together
# What Lanczos may hold beside the vectors asked for: more means fewer restarts.


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

    def apply(
        self, features: np.ndarray, device: torch.device | str = "cpu", overwrite: bool = False
    ) -> np.ndarray:
        """Whiten `features` (N, D), float16 or float32, chunk by chunk; returns (N, d) float32.

        overwrite: float32 features take the result themselves where d = D, so that rows are held once.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are {features.shape}, this PCA wants (N, {len(self.mean)})")
        mean = torch.from_numpy(self.mean).to(device)
        matrix = torch.from_numpy(self.matrix).to(device)
        here = overwrite and features.dtype == np.float32 and self.dim == features.shape[1]
        whitened = features if here else np.empty((len(features), self.dim), np.float32)
        for rows, chunk in row_chunks(features, device):
            whitened[rows] = chunk.sub_(mean).matmul(matrix).float().cpu().numpy()
        return whitened

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only, for a checkpoint."""
        return {"mean": torch.from_numpy(self.mean), "matrix": torch.from_numpy(self.matrix)}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> "PCAWhitening":
        """The inverse of `state_dict`."""
        return cls(state["mean"].cpu().numpy(), state["matrix"].cpu().numpy())


def fit_pca(features: np.ndarray, dim: int = 256, device: torch.device | str = "cpu") -> PCAWhitening:
    """PCA-whitening of the rows of all ranks; `features` (n_r, D), float16 or float32, are this rank's.

    Same row directions as faiss.PCAMatrix(D, dim, eigen_power=-0.5), up to sign and to rotation inside equal
    eigenvalues. Mean and covariance are accumulated in float64 in two passes over the rows; in one process
    with fewer rows than columns their N x N inner products serve instead of the D x D covariance. Keeps
    min(dim, N - 1, numerical rank) dimensions; constant features give one dimension that is 0 everywhere.
    Every rank gets the same PCA, bit for bit; ranks may hold no row. Nothing of the size of the features is
    allocated. Raises UserError, on every rank, when a feature is not finite.
    """
    n = sum(distributed.gather_objects(len(features)))
    if features.ndim != 2 or n == 0 or features.shape[1] == 0 or dim < 1:
        raise ValueError(f"PCA to {dim} dimensions of {n} features, here {features.shape}")
    d = features.shape[1]
    mean, mean_square = _moments(features, device)
    of_rows = n < d and distributed.world_size() == 1
    chunks = _centred_columns(features, mean) if of_rows else _centred_rows(features, mean)
    square = _products(chunks, n if of_rows else d, device)
    matrix = None
    if distributed.is_main():
        sums, vectors = _largest_eigenpairs(square, min(dim, max(n - 1, 1), d))
        variances = sums / n
        rank = _numerical_rank(variances, n, d, features.dtype, mean_square)
        matrix = vectors[:, :rank] / variances[:rank].sqrt() if rank else np.zeros((d, 1))
    del square
    if of_rows and rank:
        # u is an eigenvector of X X^T, so X^T u / |X^T u| is one of X^T X, and |X^T u|^2 = n variance.
        axes = torch.zeros((d, rank), dtype=torch.float64, device=device)
        for rows, chunk in row_chunks(features, device):
            axes.addmm_(chunk.sub_(mean).T, matrix[rows])
        matrix = axes / (n * variances[:rank]).sqrt()
    arrays = [x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (mean, matrix)]
    return PCAWhitening(*distributed.broadcast_object(arrays))


def _numerical_rank(
    variances: torch.Tensor, n: int, d: int, dtype: np.dtype, mean_square: torch.Tensor
) -> int:
    """How many of the variances, largest first, are above the noise of the features and of the arithmetic."""
    noise = RELATIVE_NOISE.get(dtype, 0.0) ** 2 * mean_square.max().item()
    rounding = max(n, d) * np.finfo(np.float64).eps * variances[0].item()
    return int((variances > max(noise, rounding)).sum())


def normalise_rows(x: np.ndarray) -> np.ndarray:
    """Divide each row of `x` (N, d) float32 by its L2 norm, in place; zero rows stay. Returns `x`."""
    for rows in slices(len(x), x.shape[1]):
        norms = np.linalg.norm(x[rows].astype(np.float64), axis=1, keepdims=True)
        x[rows] /= np.where(norms > 0, norms, 1)
    return x


def slices(n: int, row_length: int) -> Iterator[slice]:
    """Consecutive slices of range(n) that make chunks of about CHUNK_BYTES of float64."""
    step = max(1, CHUNK_BYTES // (8 * row_length))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def row_chunks(features: np.ndarray, device: torch.device | str) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of `features`, chunk by chunk: (which rows, their values as float64 on `device`).

    Every chunk lies in the same buffer: use it, or change it, before the next one is asked for.
    """
    buffer = None
    for rows in slices(*features.shape):
        block = features[rows]
        if not block.flags.writeable:  # a memory map may be, and torch.from_numpy warns of it
            block = block.copy()
        if buffer is None:
            buffer = torch.empty(block.shape, dtype=torch.float64, device=device)
        yield rows, buffer[: len(block)].copy_(torch.from_numpy(block).to(device))


def _moments(features: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square of each column over the rows of all ranks, (D,) float64 on `device`.

    Raises UserError, on every rank, unless all features are finite.
    """
    n, d = features.shape
    total = torch.zeros(d, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    bad = None
    for rows, chunk in row_chunks(features, device):
        total += chunk.sum(0)
        squares += chunk.square_().sum(0)
        if not bool(squares.isfinite().all()):
            bad = rows.start + int(np.flatnonzero(~np.isfinite(features[rows]).all(axis=1))[0])
            break
    counts, bads = zip(*distributed.gather_objects((n, bad)))
    bad = next((sum(counts[:r]) + i for r, i in enumerate(bads) if i is not None), None)
    if bad is not None:
        raise UserError(f"the feature of image {bad} is not finite; the network has diverged")
    return distributed.all_reduce(total) / sum(counts), distributed.all_reduce(squares) / sum(counts)


def _centred_rows(features: np.ndarray, mean: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks (c, D) of the centred features."""
    for _, chunk in row_chunks(features, mean.device):
        yield chunk.sub_(mean)


def _centred_columns(features: np.ndarray, mean: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks (c, N) of the transposed centred features."""
    for columns, chunk in row_chunks(features.T, mean.device):
        yield chunk.sub_(mean[columns, None])


def _products(chunks: Iterator[torch.Tensor], size: int, device: torch.device | str) -> torch.Tensor:
    """The sum of chunk^T chunk over the chunks (c, size) of all ranks: (size, size), its lower triangle.

    It is filled in stripes of STRIPE_ROWS rows that end just beyond the diagonal: half the work.
    """
    square = torch.zeros((size, size), dtype=torch.float64, device=device)
    for chunk in chunks:
        for start in range(0, size, STRIPE_ROWS):
            rows = slice(start, min(start + STRIPE_ROWS, size))
            square[rows, : rows.stop].addmm_(chunk[:, rows].T, chunk[:, : rows.stop])
    return distributed.all_reduce(square)


def _largest_eigenpairs(square: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; destroys it."""
    if square.device.type != "cpu":
        values, vectors = torch.linalg.eigh(square, UPLO="L")
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    size = len(square)
    # The transpose is the same memory in the column-major order that LAPACK overwrites without a copy. Only
    # the top eigenvectors are computed, by 'evr'.
    values, vectors = scipy.linalg.eigh(
        square.numpy().T,
        lower=False,
        overwrite_a=True,
        check_finite=False,
        subset_by_index=(size - count, size - 1),
        driver="evr",
    )
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())
