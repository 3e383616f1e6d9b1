"""What a network's features know of the classes, without training anything: nearest neighbours and k-means.

    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --layers conv5 fc7.pre
    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --image-size 64 --pixels \\
        --baseline exp/checkpoints/checkpoint_0.pth.tar

DIR has train/ and val/ with class sub-folders, or --labels tells the classes. Each layer's L2-normalised
features of the central views are judged twice. kNN: an image of val gets the class that its k nearest images
of train vote for, with weights exp(cosine / temperature). Clustering: k-means of val, compared with its
classes.
"""

import argparse

from commandline import (
    Parser,
    add_bad_images,
    add_exp,
    add_image_size,
    add_machine,
    add_seed,
    at_least,
    positive,
)
from evaluation.flags import add_bootstrap, add_labels


def get_parser() -> Parser:
    """The flags of eval_knn.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_subject(parser.add_argument_group("what to evaluate"))
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--k",
        type=at_least(1),
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of neighbours; a small one where classes have few images",
    )
    group.add_argument(
        "--temperature",
        type=positive,
        default=0.07,
        metavar="T",
        help="a neighbour votes with exp(cosine / T)",
    )
    group.add_argument(
        "--clusters", type=at_least(2), metavar="N", help="clusters of k-means (default: as many as classes)"
    )
    group.add_argument(
        "--cluster-train",
        action="store_true",
        help="also find clusters in train/, where --clusters may be many times the number of classes; images "
        "of val/ join the nearest one, which stands for its most frequent class in train/",
    )
    add_bootstrap(group)
    add_seed(group)
    group = parser.add_argument_group("files and machine")
    add_exp(group, "results.json")
    group.add_argument("--batch", type=at_least(1), default=256, help="images in a batch")
    add_machine(group)
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", required=True, metavar="DIR", help="path to dataset, with train/ and val/")
    add_labels(group)
    group.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint of the network, or random:ARCH"
    )
    group.add_argument(
        "--baseline",
        metavar="PATH",
        help="a second checkpoint to compare with, e.g. the first one of the same run (default: none)",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="e.g. conv3 conv5 fc7.pre, or layer4 avgpool; .pre is before the ReLU (default: the last map "
        "and the feature that is clustered)",
    )
    group.add_argument(
        "--pixels", action="store_true", help="also evaluate the pixels that the network is given"
    )
    add_image_size(group)
    add_bad_images(group)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from data import ImageList, PlainView, central_crop, leave_out, reasons
from evaluation import cluster_quality
from evaluation.knn import (
    KMEANS_STARTS,
    cluster_figures,
    knn_accuracies,
    nearest,
    train_cluster_figures,
    unit_features,
)
from evaluation.labelled import open_train_val
from evaluation.results import RESULTS, report
from features import Pass
from models.network import Network
from models.weights import load
from util import Log, Progress, UserError, choose_device, make_folder, run_main, set_precision

PIXELS = "pixels"


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the networks; returns one dict for each of them and each layer, as in results.json."""
    device, log = choose_device(args.device), Log()
    set_precision(args.precision, device)
    bad_images = {"bad_list": f"{args.exp}/bad_images.txt", "skip_bad": args.skip_bad_images}
    train, val = open_train_val(args.data, args.workers, log=log, labels=args.labels, **bad_images)
    networks, layers = open_networks(args)
    clusters = args.clusters or len(np.unique(val.classes))
    for images in (val, train) if args.cluster_train else (val,):
        if clusters > len(images):
            raise UserError(f"--clusters {clusters}: more than the {len(images)} images in {images.name}")
    ks = cap_neighbours(args.k, len(train), log)
    make_folder(args.exp)

    how = Pass(args.batch, args.workers, device, args.precision)
    views = {
        f"{split}/": PlainView(images, central_crop(args.image_size))
        for split, images in (("train", train), ("val", val))
    }
    drop = partial(leave_out, log=log, **bad_images)
    results = []
    for name, net in networks.items():
        names = [PIXELS] if name == PIXELS else layers
        net.to(device, memory_format=torch.channels_last)
        of_train, of_val = (
            extract(net, names, view, how, Progress(len(view), f"{name}: {split}", log=log), drop)
            for split, view in views.items()
        )
        ks = cap_neighbours(ks, len(train), log)  # some of train/ may have been left out
        for layer, (x, size) in of_val.items():
            rows, progress = of_train[layer][0], Progress(len(train), f"{name}: nearest by {layer}", log=log)
            found = nearest(x, rows, max(ks), device, progress)
            progress.close()
            figures = {"knn": knn_accuracies(*found, train.classes, val.classes, ks, args.temperature)}
            log(f"{name}: clusters of {layer}")
            how_many = (clusters, args.seed, device, args.bootstrap)
            figures |= cluster_figures(x, val.classes, *how_many)
            if args.cluster_train:
                both = train_cluster_figures(rows, train.classes, x, val.classes, *how_many)
                figures["clusters of train"] = both
            results.append({"network": name, "layer": layer, "size": size, **figures})
        del of_train, of_val  # the next network's features take as much again

    for line in table(results) + cluster_table(results):
        log(line)
    report(args.exp, "knn", describe(args, train, val, ks, clusters, results, device), results)
    log(f"results in {args.exp}/{RESULTS}")
    return results


class Pixels(nn.Module):
    """The network that gives its normalised images as they are, as far as a pass over images asks one."""

    def folded(self) -> "Pixels":
        return self

    def activations(self, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(names, x)


def open_networks(args: argparse.Namespace) -> tuple[dict[str, Network | Pixels], list[str]]:
    """What to evaluate, in the order of the table, and the layers, checked to exist."""
    model = load(args.model, args.layers or [], args.seed)
    layers = list(dict.fromkeys(args.layers or [model.maps[-1], model.feature]))
    networks: dict[str, Network | Pixels] = {PIXELS: Pixels()} if args.pixels else {}
    if args.baseline:
        networks["baseline"] = load(args.baseline, layers, args.seed)
    return networks | {"model": model}, layers


def cap_neighbours(ks: list[int], num_train: int, log: Log) -> list[int]:
    """The numbers of neighbours, ascending, none above the number of train images; says what it capped."""
    over = [k for k in ks if k > num_train]
    if over:
        log(f"--k {' '.join(map(str, over))}: capped at the {num_train} images in train/")
    return sorted({min(k, num_train) for k in ks})


def extract(
    net: Network | Pixels,
    layers: list[str],
    view: PlainView,
    how: Pass,
    progress: Progress,
    drop: Callable[[ImageList, list], None],
) -> dict[str, tuple[np.ndarray, str]]:
    """layer -> (unit features (N, D), the size in words) of the images that can be decoded.

    The others are given to `drop`, which refuses them or takes them out of the list.
    """
    features, broken = unit_features(net, layers, view, how, progress)
    drop(view.images, reasons(view.images, broken))
    return features


# ---------------------------------------------------------------------------------------- what is printed


def describe(
    args: argparse.Namespace,
    train: ImageList,
    val: ImageList,
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
    if args.labels:
        protocol["labels"] = args.labels
    return protocol | {
        "train images": len(train),
        "val images": len(val),
        "classes": len(train.class_names),
        "view": f"central {args.image_size}x{args.image_size}, one crop",
        "network": "frozen, in eval mode",
        "features": f"{'; '.join(sizes)}; flat, L2-normalised",
        "kNN": f"val against train, k {' '.join(map(str, ks))}, weights exp(cosine / {args.temperature:g})",
        "clustering": f"k-means of val, k {clusters}, best objective of {KMEANS_STARTS} starts"
        + ("; also of train" if args.cluster_train else ""),
        "clusters against classes": cluster_quality.MEANING,
        "intervals": f"95 %, {args.bootstrap} draws of the images" if args.bootstrap else "none",
        "seed": args.seed,
        "precision": args.precision,
        "device": str(device),
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a table, a row for each layer and network, and the gain over the baseline if there is one."""
    ks = list(results[0]["knn"])
    head = [f"kNN@{k}" for k in ks] + ["NMI geom.", "AMI", "ARI", "ACC"]
    lines = [f"{'layer':<10} {'network':<9}" + "".join(f"{title:>10}" for title in head)]
    for layer in dict.fromkeys(row["layer"] for row in results):
        rows = {row["network"]: figures_of(row) for row in results if row["layer"] == layer}
        for name, figures in rows.items():
            lines.append(f"{layer:<10} {name:<9}" + "".join(f"{figure:10.3f}" for figure in figures))
        if "baseline" in rows:
            gains = [after - before for after, before in zip(rows["model"], rows["baseline"])]
            lines.append(f"{layer:<10} {'gain':<9}" + "".join(f"{gain:+10.3f}" for gain in gains))
    return lines


def cluster_table(results: list[dict[str, Any]]) -> list[str]:
    """Lines with all figures of the clusterings, their intervals below them."""
    names, rows = [], []
    for row in results:
        found = {"val": row} | {f"train's, {on}": of for on, of in row.get("clusters of train", {}).items()}
        names += [f"{row['layer']} {row['network']}: {what}" for what in found]
        rows += found.values()
    return ["", *cluster_quality.table_lines(names, rows)]


def figures_of(row: dict[str, Any]) -> list[float]:
    """The figures of a result in the order of the table."""
    return [*row["knn"].values(), row["nmi"], row["ami"], row["ari"], row["acc"]]


if __name__ == "__main__":
    run_main(main, ARGS)
