"""The flags that all evaluations share which fine-tune a whole network; nothing heavy is imported here."""

import argparse

from commandline import (
    OWN_SIZE,
    Parser,
    add_bad_images,
    add_image_size,
    add_machine,
    add_run,
    at_least,
    positive,
    within,
)
from evaluation.flags import add_labels


def add_subject(group: argparse._ArgumentGroup) -> None:
    """Labelled images, in a folder or in shards, and the network that training starts from."""
    group.add_argument("--data", "--data_path", metavar="DATA", help="path to dataset, with train/ and val/")
    group.add_argument(
        "--shards",
        metavar="PATTERN",
        help="instead of --data: tar shards of train/, that tell the classes (tools/make_shards.py); with "
        "--val-shards",
    )
    group.add_argument("--val-shards", metavar="PATTERN", help="tar shards of val/, to go with --shards")
    group.add_argument(
        "--model",
        "--pretrained",
        dest="model",
        metavar="MODEL",
        help="network to start from (a checkpoint of ours or one that the authors released), or random:ARCH "
        "or random:ARCH:sobel for one that has learnt nothing",
    )
    add_labels(group)
    add_image_size(group, None, OWN_SIZE)
    add_bad_images(group)


def add_training(
    group: argparse._ArgumentGroup, epochs: int, decay_epochs: list[int], gamma: float, wd: float
) -> None:
    """Length and schedule of the training; the learning rates are the script's own."""
    group.add_argument(
        "--epochs", "--nepochs", type=at_least(1), default=epochs, help="number of total epochs to run"
    )
    group.add_argument(
        "--decay_epochs",
        type=at_least(1),
        nargs="*",
        default=decay_epochs,
        metavar="N",
        help="epochs, counted from 0, at whose start the learning rate falls; none: it stays",
    )
    group.add_argument(
        "--gamma", type=within(0, 1, "low"), default=gamma, help="what it is multiplied by there"
    )
    group.add_argument(
        "--wd",
        type=within(0, 1),
        default=wd,
        help="weight decay (itself, not its power of ten); higher where prec@1 on train is far above val's",
    )
    group.add_argument("--momentum", type=within(0, 1, "high"), default=0.9, help="momentum")
    group.add_argument(
        "--batch",
        type=at_least(1),
        default=256,
        help="mini-batch size, of all processes together, over which batch norm averages; with a smaller one "
        "lower the learning rates in proportion",
    )


def add_files_and_machine(parser: Parser) -> None:
    """Where the run lies, how it goes on, how it is computed."""
    group = parser.add_argument_group("files")
    add_run(group)
    group.add_argument("--dump_path", dest="exp", metavar="EXP", default=argparse.SUPPRESS, help="--exp too")
    group.add_argument(
        "--checkpoint-every",
        dest="checkpoints",
        type=at_least(1),
        default=5000,
        metavar="N",
        help="iterations between two checkpoints, besides that of every epoch",
    )
    add_machine(parser.add_argument_group("machine"))


def add_lr(group: argparse._ArgumentGroup, default: float | None, what: str) -> None:
    """--lr, the rate that the network learns at."""
    group.add_argument(
        "--lr", type=positive, default=default, help=f"learning rate {what}; lower it where the loss diverges"
    )
