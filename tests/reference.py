"""Slow, obviously right versions of what is done quickly elsewhere; float64 throughout."""

import math

import numpy as np
import scipy.sparse


def pca_whiten_normalise(features: np.ndarray, dim: int) -> np.ndarray:
    """Rows of `features` (N, D) in `dim` whitened principal directions, divided by their norm; (N, dim)."""
    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    variances, directions = np.linalg.eigh(x.T @ x / len(x))
    whitened = x @ directions[:, -dim:] / np.sqrt(variances[-dim:])
    return whitened / np.linalg.norm(whitened, axis=1, keepdims=True)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared L2 distance of each row of `a` to each row of `b`, by subtraction; (len(a), len(b))."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.stack([((b - row) ** 2).sum(axis=1) for row in a])


def lloyd(x: np.ndarray, centroids: np.ndarray, niter: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`niter` iterations of k-means from `centroids` (k, d), no cluster of which may become empty.

    Returns the last centroids, the nearest of them for each row (N,), and the sum of squared distances that
    the last iteration began with.
    """
    x = x.astype(np.float64)
    for _ in range(niter):
        distances = squared_distances(x, centroids)
        labels = distances.argmin(axis=1)
        objective = float(distances.min(axis=1).sum())
        centroids = np.stack([x[labels == cluster].mean(axis=0) for cluster in range(len(centroids))])
    return centroids, squared_distances(x, centroids).argmin(axis=1), objective


def nearest_neighbours(x: np.ndarray, nnn: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row its `nnn` nearest other rows and their squared distances, nearest first, ties by index."""
    distances = squared_distances(x, x)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, :nnn]
    return order, np.take_along_axis(distances, order, axis=1)


def pic_labels(
    neighbours: np.ndarray,
    distances: np.ndarray,
    sigma: float = 0.2,
    alpha: float = 0.001,
    niter: int = 200,
) -> np.ndarray:
    """Power iteration clustering of a neighbour graph, all iterations, then node by node; labels (N,).

    A label is the index of the node where its cluster's pointers end.
    """
    n, nnn = neighbours.shape
    row = np.repeat(np.arange(n), nnn)
    weight = np.exp(-distances.astype(np.float64).ravel() / sigma**2)
    a = scipy.sparse.csr_array((weight, (row, neighbours.ravel())), shape=(n, n))
    w = (a + a.T).tocsr()
    w.sort_indices()
    v = np.full(n, 1.0 / n)
    for _ in range(niter):
        v = alpha * (w @ v) + (1.0 - alpha) / n
        v /= v.sum()

    pointer = []
    for i in range(n):
        best, steepest = i, 0.0
        for edge in range(w.indptr[i], w.indptr[i + 1]):
            j = w.indices[edge]
            ascent = w.data[edge] * (v[j] - v[i])
            if ascent > steepest:
                best, steepest = int(j), ascent
        pointer.append(best)

    labels = []
    for i in range(n):
        while pointer[i] != i:
            i = pointer[i]
        labels.append(i)

    size = np.bincount(labels, minlength=n)
    final = list(labels)
    for i in range(n):
        if size[labels[i]] == 1:
            for j in neighbours[i]:
                if size[labels[j]] > 1:
                    final[i] = labels[j]
                    break
    return np.array(final)


def uniform_draws(labels: np.ndarray, total: int, seed: int) -> np.ndarray:
    """The uniform sampler cluster by cluster, from labels (N,)."""
    members: list[list[int]] = [[] for _ in range(labels.max() + 1)]
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    return draws_of_members(members, total, seed)


def draws_of_members(members: list[list[int]], total: int, seed: int) -> np.ndarray:
    """As many draws from each cluster, `members` being the images of each; one shuffle, cut to `total`."""
    rng = np.random.default_rng(seed)
    members = [cluster for cluster in members if cluster]
    each = int(total / len(members)) + 1
    draws = np.array([], dtype=np.int64)
    for cluster in members:
        part = rng.choice(cluster, each, replace=len(cluster) <= each)
        draws = np.concatenate((draws, part))
    rng.shuffle(draws)
    return draws[:total]


def sinkhorn(scores: np.ndarray, epsilon: float, niter: int) -> np.ndarray:
    """Codes (B, k) of scores (B, k), entry by entry: prototypes first, samples last."""
    samples, prototypes = scores.shape
    q = np.exp((scores - scores.max()) / epsilon)
    q /= q.sum()
    for _ in range(niter):
        for j in range(prototypes):
            q[:, j] /= q[:, j].sum() * prototypes
        for i in range(samples):
            q[i] /= q[i].sum() * samples
    return q * samples


def rmac_regions(width: int, height: int, levels: int) -> list[tuple[int, int, int, int]]:
    """The R-MAC regions of a map, (x, y, w, h) each: the specification line by line."""
    w = min(width, height)
    nearest, extra = math.inf, 0
    if width != height:
        for index, steps in enumerate(range(2, 8), start=1):
            b = (max(width, height) - w) / (steps - 1)
            distance = abs((w * w - w * b) / (w * w) - 0.4)
            if distance < nearest:
                nearest, extra = distance, index
    found = []
    for level in range(1, levels + 1):
        wl = math.floor(2 * w / (level + 1))
        wl2 = math.floor(wl / 2 - 1)
        starts = []
        for length, e in ((width, extra * (width > height)), (height, extra * (height > width))):
            b = (length - wl) / (level + e - 1) if level + e > 1 else 0
            starts.append([round(math.floor(wl2 + b * i) - wl2) for i in range(level + e)])
        for y in starts[1]:
            for x in starts[0]:
                found.append((x - max(x + wl - width, 0), y - max(y + wl - height, 0), wl, wl))
    return found


def rmac_descriptor(activation: np.ndarray, levels: int, mean: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map (C, H, W) -> (d,): region by region its maximum, L2, (x - mean) @ matrix, L2; their sum, L2."""
    total = np.zeros(matrix.shape[1])
    for x, y, w, h in rmac_regions(activation.shape[2], activation.shape[1], levels):
        v = activation[:, y : y + h, x : x + w].max(axis=(1, 2)).astype(np.float64)
        v = (v / np.linalg.norm(v) - mean.astype(np.float64)) @ matrix.astype(np.float64)
        total += v / np.linalg.norm(v)
    return total / np.linalg.norm(total)
