"""Features -> cluster ids: PCA-whitening, then k-means or power iteration clustering. The one interface.

    pca, points = preprocess(features, dim=256, device=device)     # (n, D) -> (n, 256), rows of norm 1
    found = CLUSTERINGS["Kmeans"](points, k=10000, seed=31, device=device)
    found.labels                                                   # (N,) int64, in data-set order

A clustering is a function of the points of this rank, (n, d) float32, called with k=, seed=, device=. It
returns the Assignment of all ranks' rows, in the order of ranks, on every rank; in one process these are its
own rows. The arithmetic lies in algorithms/, which gives arrays. The method is section 3 of Caron,
Bojanowski, Joulin, Douze, 'Deep Clustering for Unsupervised Learning of Visual Features', ECCV 2018.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch

import distributed
from algorithms import agreement
from algorithms.lloyd import lloyd
from algorithms.nearest import assign, check_points, on_gpu
from algorithms.pca import PCAWhitening, fit_pca, normalise_rows
from algorithms.pic import centroids_of, nearest_neighbours, pic_labels
from util import UserError, derive_seed

KMEANS_ITERATIONS = 20
# Whitened to nearly as many dimensions as there are points, all points are equally far apart and clusters are
# chance. Found by trying (docs/small-data.md): so many images a dimension, but a few dimensions at least.
IMAGES_A_DIMENSION, FEWEST_DIMENSIONS = 15, 4
Device = torch.device | str


@dataclass
class Assignment:
    """Which row belongs to which cluster.

    labels (N,) int64 in the order of the rows; num_clusters: a cluster nothing belongs to keeps its id;
    objective: what the clustering reports as its loss; distances (N,) float32, squared L2 to the row's own
    centroid; centroids (num_clusters, d) float32. points: None where a new row belongs to the nearest
    centroid; where it belongs to the cluster of the nearest row, all rows (N, d), on the first rank.
    coarse: None, or for clusters of two levels the centroids (M, d) of the first: cluster c belongs to
    super-cluster c // (num_clusters / M), and a new row to the nearest cluster in the nearest one of those.
    """

    labels: np.ndarray
    num_clusters: int
    objective: float
    distances: np.ndarray
    centroids: np.ndarray
    points: np.ndarray | None = None
    coarse: np.ndarray | None = None

    @property
    def fine(self) -> int:
        """Clusters in each super-cluster."""
        return self.num_clusters // (1 if self.coarse is None else len(self.coarse))

    def sizes(self) -> np.ndarray:
        """How many rows each cluster has, (num_clusters,) int64."""
        return np.bincount(self.labels, minlength=self.num_clusters)

    def describe_sizes(self) -> dict[str, float]:
        """How the rows spread over the clusters, for the log (agreement.describe_sizes)."""
        return agreement.describe_sizes(self.sizes())

    def lists(self) -> list[list[int]]:
        """For each cluster the indexes of its rows, ascending."""
        order = np.argsort(self.labels, kind="stable").tolist()
        ends = np.cumsum(self.sizes()).tolist()
        return [order[start:end] for start, end in zip([0, *ends[:-1]], ends)]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, for a checkpoint; without `points`."""
        arrays = {
            name: torch.from_numpy(getattr(self, name)) for name in ("labels", "distances", "centroids")
        }
        if self.coarse is not None:
            arrays |= {"coarse": torch.from_numpy(self.coarse), "fine": self.fine}
        return arrays | {"num_clusters": self.num_clusters, "objective": self.objective}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Assignment":
        """The inverse of `state_dict`."""
        arrays = {name: state[name].cpu().numpy() for name in ("labels", "distances", "centroids")}
        if state.get("coarse") is not None:
            arrays["coarse"] = state["coarse"].cpu().numpy()
        return cls(num_clusters=state["num_clusters"], objective=state["objective"], **arrays)


def preprocess(
    features: np.ndarray,
    dim: int = 256,
    device: Device = "cpu",
    log: Callable[[str], None] | None = None,
    *,
    overwrite: bool = False,
) -> tuple[PCAWhitening, np.ndarray]:
    """PCA-whitening to `dim` dimensions, fewer for few images, then L2 normalisation of each row.

    features (n, D), float16 or float32, are this rank's; the PCA is that of all ranks'. They are only
    read, or with `overwrite` may take the result, where d = D and they are float32: rows are held once then.
    Returns the PCA and the (n, d) float32 result; a row that is whitened to zero stays zero. log is told why
    where d < dim.
    """
    images = sum(distributed.gather_objects(len(features)))
    most = min(dim, most_dimensions(images))
    pca = fit_pca(features, most, device)
    if pca.dim < dim and log is not None:
        why = "the features have no more" if pca.dim < most else f"{images} images are too few for more"
        log(f"PCA keeps {pca.dim} dimensions of {dim}: {why}")
    return pca, normalise_rows(pca.apply(features, device, overwrite))


def most_dimensions(images: int) -> int:
    """To how many dimensions the features of so many images may be whitened."""
    return max(images // IMAGES_A_DIMENSION, FEWEST_DIMENSIONS)


# ---------------------------------------------------------------------------------------- clusterings


def kmeans(
    x: np.ndarray,
    k: int,
    seed: int,
    *,
    niter: int = KMEANS_ITERATIONS,
    spherical: bool = False,
    ranks: bool = False,
    device: Device = "cpu",
) -> Assignment:
    """k-means of all ranks' points: squared L2, all points, one start, always `niter` iterations.

    By Faiss, on the first rank and all its GPUs, which takes all rows there; with `ranks`, or `spherical`
    (rows and centroids of norm 1), by Lloyd's iterations over the ranks, each of which keeps its rows.
    Labels and distances come from one more search after the last iteration; `objective` is the sum of squared
    distances at the last iteration. Empty clusters are re-seeded by splitting a large one (Faiss's rule);
    with fewer distinct points than k some stay empty. On the CPU two runs give the same bits.
    Raises UserError for k < 1, k > N and points that are not finite.
    """
    if ranks or spherical:
        labels, distances, objective, centroids = lloyd(x, k, seed, niter, device, spherical=spherical)
        return Assignment(labels, k, objective, distances, centroids)
    return _on_all_points(_faiss_kmeans, x, k, seed, niter, device)[0]


def kmeans_two_level(
    x: np.ndarray, coarse: int, fine: int, seed: int, *, niter: int = 10, device: Device = "cpu"
) -> Assignment:
    """k-means into `coarse` super-clusters, and of the rows of each into `fine` clusters; over all ranks.

    Caron et al., ICCV 2019, section 3.2. Cluster c * fine + z is the z-th of super-cluster c. One that has
    fewer rows than `fine` makes that many clusters, the other ids stay empty. Each rank keeps its own rows;
    the super-clusters follow one another, so that no process holds more than one's centroids and sums beside
    them. Bit for bit `kmeans` of the rows and of each part, for the seeds ("coarse"), ("fine", c) derived.
    """
    ranks = distributed.world_size() > 1
    options = {"niter": niter, "ranks": ranks, "device": device}
    first = kmeans(x, coarse, derive_seed(seed, "coarse"), **options)
    n, d = len(first.labels), x.shape[1]
    begin = sum(distributed.gather_objects(len(x))[: distributed.rank()])
    own = first.labels[begin : begin + len(x)]
    labels, distances = np.empty(n, np.int64), np.empty(n, np.float32)
    centroids, objective = np.zeros((coarse * fine, d), np.float32), 0.0
    for c, size in enumerate(first.sizes().tolist()):
        if size == 0:
            continue
        k = min(fine, size)
        mine = x if size == n else x[own == c]
        part = kmeans(mine, k, derive_seed(seed, "fine", c), **options)
        rows = first.labels == c
        labels[rows], distances[rows] = c * fine + part.labels, part.distances
        centroids[c * fine : c * fine + k] = part.centroids
        objective += part.objective
    return Assignment(labels, coarse * fine, objective, distances, centroids, coarse=first.centroids)


def one_cluster(n: int) -> Assignment:
    """All of n rows in one cluster, where there is nothing to cluster."""
    return Assignment(np.zeros(n, np.int64), 1, 0.0, np.zeros(n, np.float32), np.zeros((1, 1), np.float32))


def nearest_super_clusters(
    x: np.ndarray, found: Assignment, device: Device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest super-cluster that holds rows: ids (n,) int64 and squared distances (n,) of points x."""
    filled = np.unique(found.labels // found.fine)
    nearest, distances = assign(x, found.coarse[filled], device)
    return filled[nearest], distances


def nearest_within(
    x: np.ndarray, found: Assignment, super_clusters: np.ndarray, device: Device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest cluster in a given super-cluster (n,): labels (n,) int64 and squared distances (n,)."""
    labels, distances = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    sizes = np.bincount(found.labels // found.fine, minlength=len(found.coarse))
    for c in np.unique(super_clusters).tolist():
        rows, first = super_clusters == c, c * found.fine
        made = found.centroids[first : first + min(found.fine, sizes[c])]  # one of few rows has fewer
        inside, distances[rows] = assign(x[rows], made, device)
        labels[rows] = first + inside
    return labels, distances


def pic(
    x: np.ndarray,
    k: int | None = None,
    seed: int | None = None,
    *,
    nnn: int = 5,
    sigma: float = 0.2,
    alpha: float = 0.001,
    niter: int = 200,
    device: Device = "cpu",
) -> Assignment:
    """Power iteration clustering of all ranks' points (Lin and Cohen, ICML 2010; on a neighbour graph).

    The number of clusters comes out of the data and nothing is random: `k` and `seed` are there so that every
    clustering is called alike (FINDS_K). Clusters are numbered in the order of their first row; a centroid is
    the mean of its rows and the objective the sum of the squared distances to it. A new row belongs to the
    cluster of the nearest old one. Raises UserError for points that are not finite.
    """
    found, found.points = _on_all_points(_pic, x, nnn, sigma, alpha, niter, device)
    return found


# What main.py offers by name, and which of them find the number of clusters themselves.
CLUSTERINGS: dict[str, Callable[..., Assignment]] = {"Kmeans": kmeans, "PIC": pic}
FINDS_K = frozenset({"PIC"})


def _on_all_points(
    function: Callable[..., Assignment], x: np.ndarray, *args: Any
) -> tuple[Assignment, np.ndarray | None]:
    """function(points of all ranks, *args) on the first rank, with the cores of those that wait for it.

    Returns its result on every rank, and all points on the first one.
    """
    points = distributed.gather_rows(x)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        return distributed.on_main(function, points, *args), points
    finally:
        faiss.omp_set_num_threads(threads)


def _faiss_kmeans(x: np.ndarray, k: int, seed: int, niter: int, device: Device) -> Assignment:
    """k-means of x (N, d) in this process."""
    check_points(x)
    if not 1 <= k <= len(x):
        raise UserError(f"cannot make {k} clusters of {len(x)} images: k must lie between 1 and {len(x)}")
    clustering = faiss.Kmeans(
        x.shape[1],
        k,
        niter=niter,
        seed=seed % 2**31,  # a C int
        gpu=on_gpu(device),
        # Faiss draws 256 points a centroid unless told otherwise, and warns below 39.
        max_points_per_centroid=10**7,
        min_points_per_centroid=1,
    )
    if hasattr(clustering.cp, "early_stop_threshold"):  # faiss >= 1.15 stops when the objective repeats
        clustering.cp.early_stop_threshold = -1
    clustering.train(x)
    labels, distances = assign(x, clustering.centroids, device)
    return Assignment(labels, k, float(clustering.obj[-1]), distances, clustering.centroids)


def _pic(x: np.ndarray, nnn: int, sigma: float, alpha: float, niter: int, device: Device) -> Assignment:
    """PIC of x (N, d) in this process."""
    check_points(x)
    neighbours, distances = nearest_neighbours(x, nnn, device)
    labels = pic_labels(neighbours, distances, sigma, alpha, niter)
    centroids, to_centroid = centroids_of(x, labels)
    return Assignment(labels, len(centroids), float(to_centroid.sum()), to_centroid, centroids)
