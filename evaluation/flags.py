"""The flags that evaluations share; imports nothing that takes seconds, as commandline.py."""

import argparse

from commandline import at_least, positive, within


def add_labels(parser: argparse._ActionsContainer, splits: bool = True) -> None:
    """--labels, where images lie in no class folders; splits: it tells train and val apart too."""
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="take the classes from this CSV file instead of from class sub-folders: a line `path,label` or "
        "`path,label,split` at its top, then a line an image; paths start from the folder of the images or "
        "are absolute; split is train or val"
        + (", and without it paths begin with train/ or val/" if splits else ", and may be left out"),
    )


def add_bootstrap(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--bootstrap",
        type=at_least(0),
        default=1000,
        metavar="N",
        help="times that the images are drawn again for the 95 %% intervals of clusterings; fewer are "
        "quicker and rougher, 0: no intervals",
    )


def add_voc_split(group: argparse._ActionsContainer, default: str) -> None:
    """--split of VOC 2007, for those that test on the other part of it."""
    group.add_argument(
        "--split",
        choices=("train", "trainval"),
        default=default,
        help="train: test on val; trainval: test on test, as published",
    )


def add_transfer(group: argparse._ArgumentGroup, folders: str) -> None:
    """Of detection and segmentation: --vocdir with these folders, --model, what trains."""
    group.add_argument("--vocdir", metavar="VOC", required=True, help=f"folder with {folders}")
    group.add_argument(
        "--model",
        metavar="PATH",
        required=True,
        help="checkpoint of the network to start from (ours or the authors'; Sobel is seen from it and stays "
        "in front), or random:ARCH",
    )
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--finetune",
        dest="freeze",
        action="store_false",
        default=False,
        help="train all layers (this is the default): the paper's columns ALL",
    )
    what.add_argument(
        "--freeze",
        action="store_true",
        help="train what is put on the network alone: the paper's columns FC6-8. Higher --lr may be needed",
    )


def add_transfer_training(group: argparse._ArgumentGroup, epochs: int, batch: int, lr: float) -> None:
    """Their SGD: torchvision's reference defaults, which they have in common but for these three."""
    group.add_argument("--epochs", type=at_least(1), default=epochs, help="number of total epochs to run")
    group.add_argument(
        "--batch", type=at_least(1), default=batch, help="images of a step, of all processes together"
    )
    group.add_argument(
        "--lr",
        type=positive,
        default=lr,
        help="learning rate; scale it with --batch, and lower it when the loss is nan",
    )
    group.add_argument("--momentum", type=within(0, 1, "high"), default=0.9, help="momentum")
    group.add_argument(
        "--wd", type=within(0, 1), default=1e-4, help="weight decay (itself, not its power of ten)"
    )
    group.add_argument(
        "--checkpoint-every",
        dest="checkpoints",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="iterations between two checkpoints; there is one after each epoch too",
    )
