"""Exact nearest neighbours by Faiss, on the CPU or on GPUs, and what it must not be handed."""

import faiss
import numpy as np
import torch

from util import UserError


def check_points(x: np.ndarray) -> None:
    """Refuse what faiss would take without a word: other types, no points, values that are not finite."""
    if x.ndim != 2 or 0 in x.shape or x.dtype != np.float32:
        raise ValueError(f"clustering wants float32 points (N, d), not {x.dtype} {x.shape}")
    # min and max carry a NaN on and need no array of N x d truth values
    if not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise UserError("some of the points to cluster are not finite; the features must be finite numbers")


def on_gpu(device: torch.device | str) -> bool:
    """Whether faiss is to work on the GPUs; it takes all visible ones, and memory torch is only caching."""
    if torch.device(device).type != "cuda" or faiss.get_num_gpus() == 0:
        return False
    torch.cuda.empty_cache()
    return True


def nearest(
    queries: np.ndarray, points: np.ndarray, count: int, device: torch.device | str, alone: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search: the `count` nearest of `points` for each query, nearest first.

    Returns squared L2 distances (N, count) float32 and indexes (N, count) int64. On all GPUs; of a process
    that searches beside others (`alone` false) on its own.
    """
    index = faiss.IndexFlatL2(points.shape[1])
    if on_gpu(device):
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
    check_points(x)
    distances, labels = nearest(x, centroids, 1, device)
    return labels[:, 0], distances[:, 0]
