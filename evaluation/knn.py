"""What features know of the classes without training: nearest neighbours' votes, and k-means.

kNN: an image of val gets the class that its k nearest images of train vote for, with weights
exp(cosine / temperature): Wu, Xiong, Yu and Lin, 'Unsupervised Feature Learning via Non-Parametric Instance
Discrimination', CVPR 2018, section 3.4. Clustering: k-means of val, compared with its classes.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import clustering
from algorithms.agreement import Contingency
from algorithms.pca import normalise_rows
from data import PlainView
from evaluation.cluster_quality import judge
from features import Pass, activation_batches, without_rows
from models.network import Network
from util import Progress, UserError, derive_seed, set_precision

KMEANS_STARTS = 5  # the start with the lowest objective counts: one start alone is mostly luck at 20 clusters
# Maps are taken as they are up to FLAT values an image (AlexNet from conv 3 on), else averaged to POOLED or
# fewer, about what the linear probe sees.
FLAT, POOLED = 20_000, 10_000
CHUNK_BYTES = 256 * 2**20  # of train, as float32, that are compared at once
PRODUCTS = 2**26  # inner products that are held at once
VOTE_ROWS = 4096  # images whose votes are held at once

# ---------------------------------------------------------------------------------------- features


def unit_features(
    net: Network, layers: list[str], view: PlainView, how: Pass, progress: Progress
) -> tuple[dict[str, tuple[np.ndarray, str]], list[int]]:
    """L2-normalised features of all images: layer -> ((N, D) float32, the size in words), and broken images.

    Rows are in the order of the images; broken images have none. Raises UserError, which names the image, for
    features that are not finite, and where no image can be decoded.
    """
    features: dict[str, np.ndarray] = {}
    sizes: dict[str, str] = {}
    broken: list[int] = []
    for found, index, bad in activation_batches(net, layers, view, how):
        for layer, activation in found.items():
            values, sizes[layer] = flatten(activation)
            refuse_not_finite(values, layer, view, index)
            if layer not in features:
                features[layer] = np.empty((len(view), values.shape[1]), np.float32)
            features[layer][index] = values.cpu().numpy()
        broken += bad
        progress.update(len(index) + len(bad))
    progress.close()
    if not features:
        raise UserError(f"{view.images.name}: none of its {len(view)} images can be decoded")
    if broken:
        everything = range(len(view))
        features = {layer: without_rows(rows, broken, everything) for layer, rows in features.items()}
    return {layer: (normalise_rows(rows), sizes[layer]) for layer, rows in features.items()}, sorted(broken)


def flatten(activation: torch.Tensor) -> tuple[torch.Tensor, str]:
    """(B, D) or (B, C, H, W) -> (B, D') and its size in words; maps of over FLAT values are averaged first.

    They are brought to the largest square that has at most POOLED values.
    """
    size = "x".join(map(str, activation.shape[1:]))
    if activation.ndim == 4 and activation[0].numel() > FLAT:
        side = max(1, math.isqrt(POOLED // activation.shape[1]))
        activation = torch.nn.functional.adaptive_avg_pool2d(activation, side)
        size += f" averaged to {'x'.join(map(str, activation.shape[1:]))}"
    return activation.flatten(1), size


def refuse_not_finite(values: torch.Tensor, layer: str, view: PlainView, index: np.ndarray) -> None:
    """Raise UserError for the first row of values (B, D) that holds a NaN or an infinity."""
    bad = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        image = view.images.path(int(index[bad[0]]))
        raise UserError(
            f"{layer} of {image} is not finite: the network has diverged; take an earlier checkpoint"
        )


# ---------------------------------------------------------------------------------------- neighbours


def nearest(
    queries: np.ndarray, points: np.ndarray, k: int, device: torch.device, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `points` with the largest inner product with each query, largest first; exact.

    queries (M, D), points (N, D), k at most N; of rows of norm 1 the inner product is the cosine. Both may be
    memory maps, and float16: the products are of float32. `points` streams by once, so that beside it there
    are CHUNK_BYTES of it, PRODUCTS inner products and the result. progress counts the points.
    Returns inner products (M, k) float32 and row numbers (M, k) int64; of equal products the lower row of two
    chunks comes first.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.zeros((len(queries), k), np.int64)
    chunk = max(1, CHUNK_BYTES // (4 * points.shape[1]))
    some = max(1, PRODUCTS // chunk)
    with set_precision("fp32", device):
        for start in range(0, len(points), chunk):
            block = to_device(points[start : start + chunk], device).T
            for first in range(0, len(queries), some):
                part = slice(first, first + some)
                found, columns = (to_device(queries[part], device) @ block).topk(min(k, block.shape[1]))
                found = torch.cat([to_device(best[part], device), found], 1)
                columns = torch.cat([torch.from_numpy(rows[part]).to(device), columns + start], 1)
                found, order = found.sort(dim=1, descending=True, stable=True)
                best[part] = found[:, :k].cpu().numpy()
                rows[part] = columns.gather(1, order[:, :k]).cpu().numpy()
            if progress is not None:
                progress.update(block.shape[1])
    return best, rows


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of rows as float32 on the device."""
    return torch.from_numpy(np.array(rows, dtype=np.float32)).to(device)


def knn_accuracies(
    cosines: np.ndarray,
    neighbours: np.ndarray,
    train_classes: np.ndarray,
    val_classes: np.ndarray,
    ks: Iterable[int],
    temperature: float,
) -> dict[str, float]:
    """{k: share of the val images whose class their k nearest train images vote for}.

    cosines, neighbours: (M, max(ks)) as `nearest` gives them; classes of train (N,) and val (M,) int64.
    """
    classes = train_classes[neighbours]
    num_classes = int(max(train_classes.max(), val_classes.max())) + 1
    votes = {k: vote(cosines[:, :k], classes[:, :k], num_classes, temperature) for k in ks}
    return {str(k): float((predicted == val_classes).mean()) for k, predicted in votes.items()}


def vote(cosines: np.ndarray, classes: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """The class (M,) with the largest sum of exp(cosine / temperature) among the neighbours of each row.

    cosines (M, k), the largest first; classes (M, k) of the same neighbours. Of equal sums the first wins.
    """
    predicted = np.empty(len(cosines), np.int64)
    for start in range(0, len(cosines), VOTE_ROWS):
        rows = slice(start, start + VOTE_ROWS)
        cosine = cosines[rows].astype(np.float64)
        # A factor a row changes no winner: relative to the nearest neighbour nothing overflows.
        weights = np.exp((cosine - cosine[:, :1]) / temperature)
        cells = np.arange(len(cosine))[:, None] * num_classes + classes[rows]
        sums = np.bincount(cells.ravel(), weights.ravel(), len(cosine) * num_classes)
        predicted[rows] = sums.reshape(-1, num_classes).argmax(axis=1)
    return predicted


# ---------------------------------------------------------------------------------------- clusters


def cluster_figures(
    x: np.ndarray, classes: np.ndarray, clusters: int, seed: int, device: torch.device, draws: int = 0
) -> dict[str, Any]:
    """k-means of `x` (N, D) float32 against the classes (N,): the figures of cluster_quality.judge."""
    found = best_kmeans(x, clusters, seed, device)
    return judge(Contingency.of(found.labels, classes), draws=draws, seed=seed)


def train_cluster_figures(
    train: np.ndarray,
    train_classes: np.ndarray,
    val: np.ndarray,
    val_classes: np.ndarray,
    clusters: int,
    seed: int,
    device: torch.device,
    draws: int = 0,
) -> dict[str, dict[str, Any]]:
    """k-means of train (N, D); images of val (M, D) join the nearest centroid: {"train": ..., "val": ...}.

    A cluster stands for the class most frequent in it in train (many_to_one, on val).
    """
    found = best_kmeans(train, clusters, seed, device)
    labels, _ = clustering.assign(val, found.centroids, device)
    of_train, of_val = Contingency.of(found.labels, train_classes), Contingency.of(labels, val_classes)
    return {
        "train": judge(of_train, draws=draws, seed=seed),
        "val": judge(of_val, of_train.most_frequent_class(), draws=draws, seed=seed),
    }


def best_kmeans(x: np.ndarray, clusters: int, seed: int, device: torch.device) -> clustering.Assignment:
    """The start with the lowest objective of KMEANS_STARTS."""
    starts = (
        clustering.kmeans(x, clusters, derive_seed(seed, "eval-kmeans", start), device=device)
        for start in range(KMEANS_STARTS)
    )
    return min(starts, key=lambda assignment: assignment.objective)
