"""What features know of the classes without training: nearest neighbours' votes, and k-means.

kNN: an image of val gets the class that its k nearest images of train vote for, with weights
exp(cosine / temperature): Wu, Xiong, Yu and Lin, 'Unsupervised Feature Learning via Non-Parametric Instance
Discrimination', CVPR 2018, section 3.4. Clustering: k-means of val, compared with its classes.
"""

import math
from collections.abc import Iterable

import faiss
import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

import clustering
from algorithms.agreement import compare, hungarian_accuracy
from algorithms.nearest import on_gpu
from algorithms.pca import normalise_rows
from data import PlainView
from features import Pass, activation_batches
from models.network import Network
from util import Progress, UserError, derive_seed

KMEANS_STARTS = 5  # the start with the lowest objective counts: one start alone is mostly luck at 20 clusters
# Maps are taken as they are up to FLAT values an image (AlexNet from conv 3 on), else averaged to POOLED or
# fewer, about what the linear probe sees.
FLAT, POOLED = 20_000, 10_000
GPU_NEIGHBOURS = 2048  # the most that Faiss finds on a GPU
GPU_BYTES = 4 * 2**30  # of train, and of val, on the GPU at once
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
        features = {layer: np.delete(rows, broken, axis=0) for layer, rows in features.items()}
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
    queries: np.ndarray, points: np.ndarray, k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `points` with the largest inner product with each query, largest first; exact, by Faiss.

    queries (M, D), points (N, D), float32; of rows of norm 1 the inner product is the cosine.
    Returns inner products (M, k) float32 and row numbers (M, k) int64.
    """
    if k > GPU_NEIGHBOURS or not on_gpu(device):
        return faiss.knn(queries, points, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn_gpu(
        faiss.StandardGpuResources(),
        queries,
        points,
        k,
        metric=faiss.METRIC_INNER_PRODUCT,
        device=device.index or 0,
        vectorsMemoryLimit=GPU_BYTES,
        queriesMemoryLimit=GPU_BYTES,
    )


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
    x: np.ndarray, classes: np.ndarray, clusters: int, seed: int, device: torch.device
) -> dict[str, float]:
    """k-means of `x` (N, D) float32 against the classes (N,): nmi (geometric), ami, ari, acc."""
    starts = [
        clustering.kmeans(x, clusters, derive_seed(seed, "eval-kmeans", start), device=device)
        for start in range(KMEANS_STARTS)
    ]
    labels = min(starts, key=lambda assignment: assignment.objective).labels
    return {
        **compare(labels, classes),
        "ari": float(adjusted_rand_score(classes, labels)),
        "acc": hungarian_accuracy(labels, classes),
    }
