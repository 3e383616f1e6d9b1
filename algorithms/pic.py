"""Power iteration clustering (Lin and Cohen, ICML 2010; here on a graph of nearest neighbours)."""

import numpy as np
import scipy.sparse
import torch

from algorithms.nearest import nearest
from algorithms.pca import row_chunks

SPARE_NEIGHBOURS = 3


def nearest_neighbours(
    x: np.ndarray, nnn: int = 5, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The exact neighbour graph: the min(nnn, N - 1) nearest other rows of each row of `x` (N, d) float32.

    Returns indexes (N, nnn) int64 and squared L2 distances (N, nnn) float64, nearest first, ties by index. A
    row is left out of its own neighbours by its index: among duplicates it need not be found first. Faiss's
    float32 distances are off by about 1e-7, so a few spare candidates are taken and judged in float64.
    """
    n, nnn = len(x), min(nnn, len(x) - 1)
    _, candidates = nearest(x, x, min(nnn + 1 + SPARE_NEIGHBOURS, n), device)
    candidates.sort(axis=1)
    distances = np.empty(candidates.shape)
    for rows, chunk in row_chunks(x, "cpu"):
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


def centroids_of(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean row of each cluster (k, d) float32; each row's squared distance to its own (N,) float32."""
    sums = torch.zeros((int(labels.max()) + 1, x.shape[1]), dtype=torch.float64)
    for rows, chunk in row_chunks(x, "cpu"):
        sums.index_add_(0, torch.from_numpy(labels[rows]), chunk)
    means = sums / torch.from_numpy(np.bincount(labels))[:, None]
    distances = np.empty(len(x), np.float32)
    for rows, chunk in row_chunks(x, "cpu"):
        distances[rows] = (chunk - means[torch.from_numpy(labels[rows])]).square_().sum(1).numpy()
    return means.float().numpy(), distances
