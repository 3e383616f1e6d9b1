"""Linear SVMs on frozen features of Pascal VOC 2007: of k images a class, several draws, and of all images.

    python eval_lowshot.py --vocdir VOCdevkit/VOC2007 --model exp/checkpoint.pth.tar --exp exp/lowshot
    python eval_lowshot.py --vocdir VOCdevkit/VOC2007 --model random:resnet50 --layers avgpool --k 1 4 16

For each layer, class, k and draw one SVM is trained on k images that show the class and (classes - 1) * k
that do not, and tested on all images of the other split (evaluation/lowshot.py). Every SVM that is done is
written down: after a kill the same command goes on.
"""

import argparse

from commandline import OWN_SIZE, Parser, add_exp, add_image_size, add_machine, add_seed, at_least, positive
from evaluation.flags import add_voc_split


def get_parser() -> Parser:
    """The flags of eval_lowshot.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_subject(parser.add_argument_group("what to evaluate"))
    add_protocol(parser.add_argument_group("protocol"))
    group = parser.add_argument_group("files and machine")
    add_exp(group, "results.json and lowshot.jsonl, what is done so far")
    group.add_argument(
        "--restart", action="store_true", help="begin anew where SVMs of other settings have been trained"
    )
    group.add_argument("--batch", type=at_least(1), default=256, help="images in a batch")
    add_machine(group)
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vocdir", metavar="VOC", required=True, help="folder VOC2007, with ImageSets/Main and JPEGImages"
    )
    add_voc_split(group, "trainval")
    group.add_argument(
        "--model", required=True, metavar="PATH", help="checkpoint of the network, or random:ARCH"
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="e.g. conv3 conv5 fc7, or layer4 avgpool; maps of over 20,000 values are averaged (default: the "
        "last map and the feature that is clustered)",
    )
    add_image_size(group, None, OWN_SIZE)


def add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--k",
        type=at_least(1),
        nargs="*",
        default=[1, 2, 4, 8, 16, 32, 64, 96],
        metavar="K",
        help="images of a class to train on; none: all images alone",
    )
    group.add_argument(
        "--draws",
        type=at_least(1),
        default=5,
        metavar="N",
        help="sets of images for each k; more: a surer mean",
    )
    group.add_argument(
        "--full",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train on all images of the split, which takes most of the time",
    )
    group.add_argument(
        "--costs",
        type=positive,
        nargs="+",
        metavar="C",
        help="costs to choose from by 3 folds; fewer are quicker (default: 2^-19 ... 2^-4, 10^-7 ... 10^2)",
    )
    add_seed(group)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from typing import Any

import numpy as np
import torch

from data import PlainView, central_crop
from evaluation import lowshot
from evaluation.knn import flatten, unit_features
from evaluation.lowshot import ALL, Journal
from evaluation.probe import Fingerprint
from evaluation.results import read, report
from evaluation.voc import VocSplit, check_images, open_voc
from features import Pass, layer_shape
from models.network import Network
from models.weights import load
from util import Log, Progress, UserError, choose_device, make_folder, run_main, set_precision

JOURNAL = "lowshot.jsonl"


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and test the SVMs; returns a dict for each layer, as in results.json."""
    device, log = choose_device(args.device), Log()
    set_precision(args.precision, device)
    shots = sorted(set(args.k)) + [ALL] * args.full
    if not shots:
        raise UserError("--k without a number and --no-full leave nothing to train")
    costs = sorted(set(args.costs or lowshot.COSTS))
    trained, tested = open_voc(args.vocdir, args.split)
    lowshot.check_splits(trained, tested, shots)
    net = load(args.model, args.layers or [], args.seed)
    log(net.inputs.tell(args.image_size))
    args.image_size = net.inputs.size(args.image_size)
    layers = list(dict.fromkeys(args.layers or [net.maps[-1], net.feature]))
    exp = make_folder(args.exp)
    read(exp)
    journal = Journal(exp / JOURNAL, what_decides(args, net, trained, tested, costs, device), args.restart)
    for split in (trained, tested):
        check_images(split, args.workers)
    if journal.done:
        log(f"going on with {exp / JOURNAL}: {len(journal.done)} SVMs are done")

    net.to(device, memory_format=torch.channels_last)
    how = Pass(args.batch, args.workers, device, args.precision)
    results = []
    for layer in layers:
        tasks = lowshot.tasks_of([layer], shots, args.draws, trained.class_names)
        left = [task for task in tasks if task not in journal.done]
        if left:
            x, test_x = (rows_of(net, layer, split, args.image_size, how, log) for split in (trained, tested))
            progress = Progress(len(left), f"{layer} of {x.shape[1]} values", "SVMs", log)
            labels = (trained.labels, tested.labels)
            lowshot.run_tasks(
                left, journal, (x, test_x), labels, trained.class_names, costs, args.seed, args.workers,
                progress.update,
            )  # fmt: skip
            progress.close()
        found = lowshot.summarise(journal, layer, shots, args.draws, trained.class_names)
        size = flatten(torch.zeros(1, *layer_shape(net, layer, args.image_size)))[1]
        results.append({"layer": layer, "size": size, **found})

    for line in table(results):
        log(line)
    report(exp, "lowshot", describe(args, net, trained, tested, costs), results)
    return results


def what_decides(
    args: argparse.Namespace,
    net: Network,
    trained: VocSplit,
    tested: VocSplit,
    costs: list[float],
    device: torch.device,
) -> dict[str, Any]:
    """Everything on which the figure of an SVM depends, besides its own layer, k, draw and class."""
    return {
        "network": Fingerprint(net).digest,
        "train": trained.state_dict()["digest"],
        "test": tested.state_dict()["digest"],
        "image size": args.image_size,
        "precision": args.precision,
        "device": device.type,
        "costs": costs,
        "seed": args.seed,
    }


def rows_of(net: Network, layer: str, split: VocSplit, size: int, how: Pass, log: Log) -> np.ndarray:
    """Unit features (N, D) float32 of a split's images, all of which can be decoded."""
    progress = Progress(len(split), f"{layer} of {split.name}", log=log)
    view = PlainView(split.images, central_crop(size))
    features, broken = unit_features(net, [layer], view, how, progress)
    if broken:
        raise UserError(f"{split.images.path(broken[0])} could be decoded before and cannot any more")
    return features[layer][0]


# ---------------------------------------------------------------------------------------- what is printed


def describe(
    args: argparse.Namespace, net: Network, trained: VocSplit, tested: VocSplit, costs: list[float]
) -> dict[str, Any]:
    """The protocol, to be printed and kept beside the numbers."""
    negatives = len(trained.class_names) - 1
    return {
        "data": args.vocdir,
        "split": f"{trained.name} -> {tested.name}",
        "images": f"{len(trained)} -> {len(tested)}",
        "classes": len(trained.class_names),
        "network": f"{args.model} ({net}), frozen, in eval mode",
        "view": f"central {args.image_size}x{args.image_size}, one crop",
        "features": "flat, L2-normalised",
        "SVM": f"linear, squared hinge loss, weight {lowshot.POSITIVE_WEIGHT:g} for positives",
        "k": f"k images with the class and {negatives} k without, {args.draws} draws; std of a sample",
        "cost": f"the best mean AP of {lowshot.FOLDS} folds among {len(costs)} from {costs[0]:.3g} to "
        f"{costs[-1]:.3g}; 2 folds at k 2, {lowshot.ONE_SHOT_COST:g} at k 1",
        "AP": "difficult images ignored; percent",
        "seed": args.seed,
        "precision": args.precision,
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of a table, a row a layer: mAP and its spread over draws for each k, then of all images."""
    columns = [name for name in results[0] if name not in ("layer", "size")]
    titles = ["all images" if name == "all" else f"k {name}" for name in columns]
    lines = [f"{'mAP':<10}" + "".join(f"{title:>14}" for title in titles)]
    for row in results:
        cells = []
        for name in columns:
            std = row[name].get("std")
            cells.append(f"{row[name]['mAP']:.2f}" + ("" if std is None else f" ± {std:.2f}"))
        lines.append(f"{row['layer']:<10}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


if __name__ == "__main__":
    run_main(main, ARGS)
