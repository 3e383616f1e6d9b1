"""What a network's features know of the classes, without training anything: nearest neighbours and k-means.

    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --layers conv5 fc7.pre
    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --image-size 64 --pixels \
        --baseline exp/checkpoints/checkpoint_0.pth.tar

DIR has train/ and val/ with the same class sub-folders. Each layer's L2-normalised features of the central
views are judged twice. kNN: an image of val/ gets the class that its k nearest images of train/ vote for,
with weights exp(cosine / temperature) (Wu, Xiong, Yu and Lin, 'Unsupervised Feature Learning via
Non-Parametric Instance Discrimination', CVPR 2018, section 3.4). Clustering: k-means of val/, compared with
its classes.
"""

import argparse
import math
from collections.abc import Iterable
from typing import Any

import faiss
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch.utils.data import DataLoader

import clustering
import data
import evaluation
from features import PRECISIONS, Forward, activation_batches, eval_forward, set_precision
from models import FEATURE, DeepClusterNet
from util import (
    Log,
    Progress,
    UserError,
    add_device_argument,
    choose_device,
    derive_seed,
    make_folder,
    run_main,
)

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07  # Wu et al. 2018, section 4.1
KMEANS_STARTS = 5  # the start with the lowest objective counts: one start alone is mostly luck at 20 clusters
# Maps are taken as they are up to FLAT values an image (AlexNet from conv 3 on), else averaged to POOLED or
# fewer, about what the linear probe sees.
FLAT, POOLED = 20_000, 10_000
GPU_NEIGHBOURS = 2048  # the most that Faiss finds on a GPU
GPU_BYTES = 4 * 2**30  # of train, and of val, on the GPU at once
VOTE_ROWS = 4096  # images whose votes are held at once
PIXELS = "pixels"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval_knn.py",
        description="Weighted k-nearest-neighbour classification and k-means of a network's features.",
    )
    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--data", required=True, metavar="DIR", help="path to dataset, with train/ and val/")
    group.add_argument("--model", required=True, metavar="PATH", help="checkpoint of the network")
    group.add_argument(
        "--baseline",
        metavar="PATH",
        help="a second checkpoint to compare with, e.g. the first one of the same run (default: none)",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help=f"e.g. conv3 conv5 {FEATURE}; .pre is before the ReLU (default: the last conv and {FEATURE})",
    )
    group.add_argument(
        "--pixels", action="store_true", help="also evaluate the pixels that the network is given"
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the central crop; the shorter side is first resized to 256/224 of it (default: 224)",
    )
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=list(NEIGHBOURS),
        metavar="K",
        help=f"numbers of neighbours (default: {' '.join(map(str, NEIGHBOURS))})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help=f"a neighbour votes with exp(cosine / T) (default: {TEMPERATURE})",
    )
    group.add_argument(
        "--clusters", type=int, metavar="N", help="clusters of k-means (default: as many as classes)"
    )
    group.add_argument("--seed", type=int, default=31, help="random seed of k-means (default: 31)")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--exp", default="exp", metavar="EXP", help="folder of results.json (default: exp)")
    group.add_argument("--batch", type=int, default=256, help="images in a batch (default: 256)")
    group.add_argument("--workers", type=int, default=4, help="number of data loading workers (default: 4)")
    add_device_argument(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="arithmetic of the convnet; tf32 (CUDA) and bf16 (CUDA, CPUs with AMX) are faster and slightly "
        "less exact (default: fp32)",
    )
    return parser


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    check_arguments(args)
    device, log = choose_device(args.device), Log()
    set_precision(args.precision, device)
    train, val = evaluation.open_train_val(args.data)
    networks, layers = open_networks(args)
    clusters = args.clusters or len(val.class_names)
    if clusters > len(val):
        raise UserError(f"--clusters {clusters}: more than the {len(val)} images in {args.data}/val")
    ks = cap_neighbours(args.k, len(train), log)
    make_folder(args.exp)

    loaders = [
        central_views(images, args.image_size, args.batch, args.workers, device) for images in (train, val)
    ]
    results = []
    for name, net in networks.items():
        forward = pixels_forward() if net is None else eval_forward(net.to(device), layers)
        of_train = extract(forward, train, loaders[0], device, args.precision, f"{name}: train/", log)
        of_val = extract(forward, val, loaders[1], device, args.precision, f"{name}: val/", log)
        for layer, (x, size) in of_val.items():
            log(f"{name}: neighbours and clusters of {layer}")
            found = nearest(x, of_train[layer][0], max(ks), device)
            figures = {"knn": knn_accuracies(*found, train.classes, val.classes, ks, args.temperature)}
            figures |= cluster_figures(x, val.classes, clusters, args.seed, device)
            results.append({"network": name, "layer": layer, "size": size, **figures})
        del of_train, of_val  # the next network's features take as much again

    for line in table(results):
        log(line)
    evaluation.report(args.exp, "knn", describe(args, train, val, ks, clusters, results, device), results)
    log(f"results in {args.exp}/{evaluation.RESULTS}")
    return results


# ------------------------------------------------------------------------------- before any long work


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    for name, smallest in (("batch", 1), ("workers", 0), ("seed", 0), ("image_size", 16), ("clusters", 2)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {smallest}")
    if min(args.k) < 1:
        raise UserError(f"--k {min(args.k)}: must be at least 1 neighbour")
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        raise UserError(
            f"--temperature {args.temperature}: must be a positive number (Wu et al.: {TEMPERATURE})"
        )


def open_networks(args: argparse.Namespace) -> tuple[dict[str, DeepClusterNet | None], list[str]]:
    """What to evaluate, in the order of the table (None: the pixels), and the layers, checked to exist."""
    model = evaluation.open_network(args.model, args.layers or [])
    layers = list(dict.fromkeys(args.layers or [f"conv{model.num_convs}", FEATURE]))
    networks = {PIXELS: None} if args.pixels else {}
    if args.baseline:
        networks["baseline"] = evaluation.open_network(args.baseline, layers)
    return networks | {"model": model}, layers


def cap_neighbours(ks: list[int], num_train: int, log: Log) -> list[int]:
    """The numbers of neighbours, ascending, none above the number of train images; says what it capped."""
    over = [k for k in ks if k > num_train]
    if over:
        log(f"--k {' '.join(map(str, over))}: capped at the {num_train} images in train/")
    return sorted({min(k, num_train) for k in ks})


# ------------------------------------------------------------------------------- features


def pixels_forward() -> Forward:
    """Normalised images as they are."""
    return lambda images: {PIXELS: images}


def central_views(
    images: data.ImageList, image_size: int, batch: int, workers: int, device: torch.device
) -> DataLoader:
    """Batches of (uint8 central crops, indexes), in order."""
    view = data.CentralView(images, image_size)
    return data.make_loader(view, batch, workers, pin_memory=device.type == "cuda")


def extract(
    forward: Forward,
    images: data.ImageList,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    label: str,
    log: Log,
) -> dict[str, tuple[np.ndarray, str]]:
    """L2-normalised features of all images, in their order: layer -> ((N, D) float32, the size in words).

    Raises UserError, which names the image, for one that cannot be decoded or whose features are not finite.
    """
    progress = Progress(len(images), label, log=log)
    found: dict[str, tuple[np.ndarray, str]] = {}
    for activations, index in activation_batches(forward, loader, device, precision):
        refuse_broken(images, index)
        for layer, activation in activations.items():
            values, size = flatten(activation)
            refuse_not_finite(values, layer, images, index)
            if layer not in found:
                found[layer] = np.empty((len(images), values.shape[1]), np.float32), size
            found[layer][0][index.numpy()] = values.cpu().numpy()
        progress.update(len(index))
    progress.close()
    return {layer: (clustering.normalise_rows(rows), size) for layer, (rows, size) in found.items()}


def refuse_broken(images: data.ImageList, index: torch.Tensor) -> None:
    """Raise UserError for the first image that the loader could not decode (its index is -1 - i)."""
    broken = [-1 - i for i in index.tolist() if i < 0]
    if broken:
        raise UserError(f"{images.path(broken[0])}: {data.broken_reason(images, broken[0])}")


def refuse_not_finite(values: torch.Tensor, layer: str, images: data.ImageList, index: torch.Tensor) -> None:
    """Raise UserError for the first row of values (B, D) that holds a NaN or an infinity."""
    bad = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        image = images.path(int(index[bad[0]]))
        raise UserError(
            f"{layer} of {image} is not finite: the network has diverged; take an earlier checkpoint"
        )


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


# ------------------------------------------------------------------------------- nearest neighbours


def nearest(
    queries: np.ndarray, points: np.ndarray, k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `points` with the largest inner product with each query, largest first; exact, by Faiss.

    queries (M, D), points (N, D), float32; of rows of norm 1 the inner product is the cosine.
    Returns inner products (M, k) float32 and row numbers (M, k) int64.
    """
    if device.type == "cuda" and faiss.get_num_gpus() > 0 and k <= GPU_NEIGHBOURS:
        torch.cuda.empty_cache()
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
    return faiss.knn(queries, points, k, metric=faiss.METRIC_INNER_PRODUCT)


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


# ------------------------------------------------------------------------------- clustering


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
        **clustering.compare(labels, classes),
        "ari": float(adjusted_rand_score(classes, labels)),
        "acc": hungarian_accuracy(labels, classes),
    }


def hungarian_accuracy(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of rows that are right under the best one-to-one map from clusters to classes.

    labels and classes: (N,) int64 from 0; a cluster without a class of its own counts as wrong.
    """
    joint = np.zeros((labels.max() + 1, classes.max() + 1), np.int64)
    np.add.at(joint, (labels, classes), 1)
    return float(joint[linear_sum_assignment(joint, maximize=True)].sum() / len(labels))


# ------------------------------------------------------------------------------- what is printed


def describe(
    args: argparse.Namespace,
    train: data.ImageList,
    val: data.ImageList,
    ks: list[int],
    clusters: int,
    results: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """All that the figures depend on."""
    sizes = dict.fromkeys(f"{row['layer']} {row['size']}" for row in results)
    protocol = {"data": args.data, "model": args.model}
    if args.baseline:
        protocol["baseline"] = args.baseline
    return protocol | {
        "train images": len(train),
        "val images": len(val),
        "classes": len(val.class_names),
        "view": f"central {args.image_size}x{args.image_size}, one crop",
        "network": "frozen, in eval mode",
        "features": f"{'; '.join(sizes)}; flat, L2-normalised",
        "kNN": f"val against train, k {' '.join(map(str, ks))}, weights exp(cosine / {args.temperature:g})",
        "clustering": f"k-means of val, k {clusters}, best objective of {KMEANS_STARTS} starts",
        "seed": args.seed,
        "precision": args.precision,
        "device": str(device),
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a table, a row for each layer and network, and the gain over the baseline if there is one."""
    ks = list(results[0]["knn"])
    head = [f"kNN@{k}" for k in ks] + ["NMI", "AMI", "ARI", "ACC"]
    lines = [f"{'layer':<10} {'network':<9}" + "".join(f"{title:>9}" for title in head)]
    for layer in dict.fromkeys(row["layer"] for row in results):
        rows = {row["network"]: figures_of(row) for row in results if row["layer"] == layer}
        for name, figures in rows.items():
            lines.append(f"{layer:<10} {name:<9}" + "".join(f"{figure:9.3f}" for figure in figures))
        if "baseline" in rows:
            gains = [after - before for after, before in zip(rows["model"], rows["baseline"])]
            lines.append(f"{layer:<10} {'gain':<9}" + "".join(f"{gain:+9.3f}" for gain in gains))
    return lines


def figures_of(row: dict[str, Any]) -> list[float]:
    """The figures of a result in the order of the table."""
    return [*row["knn"].values(), row["nmi"], row["ami"], row["ari"], row["acc"]]


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
