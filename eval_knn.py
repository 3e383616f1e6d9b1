"""What a network's features know of the classes, without training anything: nearest neighbours and k-means.

    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --layers conv5 fc7.pre
    python eval_knn.py --data DIR --model exp/checkpoint.pth.tar --pixels \\
        --baseline exp/checkpoints/checkpoint_0.pth.tar
    python eval_knn.py --features features/train.npy features/val.npy

DIR has train/ and val/ with class sub-folders, or --labels tells the classes. Each layer's L2-normalised
features of the central views are judged twice. kNN: an image of val gets the class that its k nearest images
of train vote for, with weights exp(cosine / temperature). Clustering: k-means of val, compared with its
classes.
"""

import argparse

from commandline import (
    OWN_SIZE,
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
    group.add_argument("--data", metavar="DIR", help="path to dataset, with train/ and val/")
    add_labels(group)
    group.add_argument("--model", metavar="PATH", help="checkpoint of the network, or random:ARCH")
    group.add_argument(
        "--features",
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="instead of --model: features that extract.py wrote, TRAIN.npy and VAL.npy with their .txt; "
        "those of train are read from the disk as they are needed (with --cluster-train they are held)",
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
    add_image_size(group, None, OWN_SIZE)
    add_bad_images(group)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import ImageList, PlainView, central_crop, leave_out, reasons
from evaluation import cluster_quality
from evaluation.feature_files import match, names_of, open_rows
from evaluation.knn import (
    KMEANS_STARTS,
    cluster_figures,
    knn_accuracies,
    nearest,
    train_cluster_figures,
    unit_features,
)
from evaluation.labelled import open_train_val, read_labels
from evaluation.results import report
from features import Pass
from formats.rows import read_names
from models.inputs import Inputs
from models.network import Network
from models.weights import load
from util import Log, Progress, UserError, choose_device, make_folder, run_main, set_precision

PIXELS = "pixels"
OF_IMAGES = ("data", "baseline", "layers", "pixels", "skip_bad_images", "image_size", "batch", "workers")


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the networks; returns one dict for each of them and each layer, as in results.json."""
    check(args)
    device, log = choose_device(args.device), Log()
    set_precision(args.precision, device)
    evaluate = judge_files if args.features else judge_networks
    results, protocol = evaluate(args, device, log)
    for line in table(results) + cluster_table(results):
        log(line)
    report(args.exp, "knn", protocol, results)
    return results


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if bool(args.features) == bool(args.model):
        raise UserError("give the network as --model PATH, or its --features TRAIN VAL, one of them")
    if args.model and not args.data:
        raise UserError("--data is missing: give a folder with train/ and val/, or --labels too")
    parser = get_parser()
    given = [name for name in OF_IMAGES if getattr(args, name) != parser.get_default(name)]
    if args.features and given and not (given == ["data"] and args.labels):
        name = given[0].replace("_", "-")
        raise UserError(f"--{name}: not with --features, for which no image is looked at")


def judge_networks(
    args: argparse.Namespace, device: torch.device, log: Log
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(results, protocol) of the networks, whose features are held one network at a time."""
    bad_images = {"bad_list": f"{args.exp}/bad_images.txt", "skip_bad": args.skip_bad_images}
    train, val = open_train_val(args.data, args.workers, log=log, labels=args.labels, **bad_images)
    networks, layers = open_networks(args)
    log(networks["model"].inputs.tell(args.image_size))
    args.image_size = networks["model"].inputs.size(args.image_size)
    clusters = choose_clusters(args, val.classes, {val.name: len(val), train.name: len(train)})
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
        classes = (train.classes, val.classes)
        for layer, (x, size) in of_val.items():
            both = (of_train[layer][0], x)
            figures = judge(args, f"{name}: {layer}", both, classes, ks, clusters, device, log)
            results.append({"network": name, "layer": layer, "size": size, **figures})
        del of_train, of_val, both, x  # the next network's features take as much again

    sizes = dict.fromkeys(f"{row['layer']} {row['size']}" for row in results)
    protocol = {
        "data": args.data,
        "model": args.model,
        **({"baseline": args.baseline} if args.baseline else {}),
        "view": f"central {args.image_size}x{args.image_size}, one crop",
        "network": "frozen, in eval mode",
        "features": f"{'; '.join(sizes)}; flat, L2-normalised",
        "precision": args.precision,
    }
    return results, protocol | describe(
        args, train.classes, val.classes, train.class_names, ks, clusters, device
    )


def judge_files(
    args: argparse.Namespace, device: torch.device, log: Log
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(results, protocol) of features in files; those of train stay there."""
    labels = read_labels(args.labels, args.data or ".") if args.labels else None
    train, val = (
        open_rows(file, read_names(names_of(file)), split, labels)
        for file, split in zip(args.features, ("train", "val"))
    )
    class_names = match(train, val)
    clusters = choose_clusters(args, val.classes, {val.file: len(val), train.file: len(train)})
    ks = cap_neighbours(args.k, len(train), log)
    make_folder(args.exp)
    both, classes = (train, val[:]), (train.classes, val.classes)
    figures = judge(args, "features", both, classes, ks, clusters, device, log)
    name = Path(args.features[1]).stem
    protocol = {"features": f"{' and '.join(args.features)}; {train.shape[1]} values, L2-normalised"}
    protocol |= describe(args, train.classes, val.classes, class_names, ks, clusters, device)
    return [{"network": "file", "layer": name, "size": str(train.shape[1]), **figures}], protocol


def judge(
    args: argparse.Namespace,
    label: str,
    features: tuple[np.ndarray, np.ndarray],
    classes: tuple[np.ndarray, np.ndarray],
    ks: list[int],
    clusters: int,
    device: torch.device,
    log: Log,
) -> dict[str, Any]:
    """The figures of one layer. features: unit rows of train (N, D) and val (M, D), classes: their ids.

    Of train slices will do, if it is not to be clustered.
    """
    (rows, x), (train_classes, val_classes) = features, classes
    progress = Progress(len(rows), f"{label}: neighbours in train", log=log)
    found = nearest(x, rows, max(ks), device, progress)
    progress.close()
    figures = {"knn": knn_accuracies(*found, train_classes, val_classes, ks, args.temperature)}
    log(f"{label}: clusters")
    how = (clusters, args.seed, device, args.bootstrap)
    figures |= cluster_figures(x, val_classes, *how)
    if args.cluster_train:  # k-means holds all rows
        both = train_cluster_figures(rows[:], train_classes, x, val_classes, *how)
        figures["clusters of train"] = both
    return figures


def choose_clusters(args: argparse.Namespace, val_classes: np.ndarray, images: dict[str, int]) -> int:
    """The number of clusters; images: how many there are in val, in train, by their names."""
    clusters = args.clusters or len(np.unique(val_classes))
    for name, number in list(images.items())[: 2 if args.cluster_train else 1]:
        if clusters > number:
            raise UserError(f"--clusters {clusters}: more than the {number} images in {name}")
    return clusters


class Pixels(nn.Module):
    """The network that gives its normalised images as they are, as far as a pass over images asks one."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs

    def folded(self) -> "Pixels":
        return self

    def activations(self, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(names, x)


def open_networks(args: argparse.Namespace) -> tuple[dict[str, Network | Pixels], list[str]]:
    """What to evaluate, in the order of the table, and the layers, checked to exist."""
    model = load(args.model, args.layers or [], args.seed)
    layers = list(dict.fromkeys(args.layers or [model.maps[-1], model.feature]))
    networks: dict[str, Network | Pixels] = {PIXELS: Pixels(model.inputs)} if args.pixels else {}
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
    train_classes: np.ndarray,
    val_classes: np.ndarray,
    class_names: list[str],
    ks: list[int],
    clusters: int,
    device: torch.device,
) -> dict[str, Any]:
    """What the figures depend on, besides the features."""
    return {
        **({"labels": args.labels} if args.labels else {}),
        "train images": len(train_classes),
        "val images": len(val_classes),
        "classes": len(class_names),
        "kNN": f"val against train, k {' '.join(map(str, ks))}, weights exp(cosine / {args.temperature:g})",
        "clustering": f"k-means of val, k {clusters}, best objective of {KMEANS_STARTS} starts"
        + ("; also of train" if args.cluster_train else ""),
        "clusters against classes": cluster_quality.MEANING,
        "intervals": f"95 %, {args.bootstrap} draws of the images" if args.bootstrap else "none",
        "seed": args.seed,
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
