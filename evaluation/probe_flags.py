"""The flags of linear probes: protocol, what they are judged on, training. Nothing heavy is imported here."""

import argparse

from commandline import at_least, positive, within, word
from evaluation.protocols import LINEAR

SHOWN = LINEAR["deepcluster"]  # as the defaults, in the help


def add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--protocol",
        choices=("deepcluster", "swav", "deepercluster"),
        default="deepcluster",
        help="whose settings the flags below have where they are not given: swav for ResNets (without "
        "--layers all of them), deepercluster for VGG-16",
    )
    group.add_argument(
        "--places", action="store_true", help="deepercluster's learning rates for Places205, not ImageNet"
    )
    group.add_argument(
        "--pooling",
        choices=("grid", "windows", "global", "overlapping"),
        default=SHOWN["pooling"],
        help="of a map: grid, to under 10,000 values; windows, DeeperCluster's on VGG-16; global, a value a "
        "channel; overlapping, SwAV's 6 x 6 on the last map",
    )
    group.add_argument(
        "--global_pooling",
        dest="pooling",
        type=lambda text: "global" if word(text) else "overlapping",
        default=argparse.SUPPRESS,
        metavar="BOOL",
        help="SwAV's word: true is --pooling global, false is --pooling overlapping",
    )
    group.add_argument(
        "--use_bn",
        type=word,
        default=False,
        metavar="BOOL",
        help="with --pooling overlapping: batch norm in front of the last map's classifier",
    )
    group.add_argument(
        "--train_crop",
        choices=("shift", "area"),
        default=SHOWN["train_crop"],
        help="training views, flipped or not: shift, a place in the central 256 pixels; area, 8 to 100%% of "
        "the area, resized",
    )


def add_judging(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tencrops",
        action="store_true",
        help="validation accuracy averaged over 10 crops, ten passes for one (without: the central crop)",
    )
    group.add_argument(
        "--val-fraction",
        type=within(0, 1, "high"),
        default=0.0,
        metavar="F",
        help="hold this part of train/ out of training, of each class the same, and choose the best epoch on "
        "it; 0 chooses it on val/, as the authors did",
    )
    group.add_argument(
        "--kfold",
        type=at_least(2),
        metavar="K",
        help="choose settings by K random folds of the training images: train on all but one, judge on that; "
        "the K runs are in EXP/fold<f>, the mean in EXP/results.json",
    )
    group.add_argument("--fold", type=at_least(0), metavar="F", help="of --kfold this one alone, in EXP")


def add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs", type=at_least(1), default=SHOWN["epochs"], help="number of total epochs to run"
    )
    group.add_argument(
        "--batch_size",
        "--batch",
        dest="batch",
        type=at_least(1),
        default=SHOWN["batch"],
        help="mini-batch size, of all processes together",
    )
    group.add_argument(
        "--lr",
        type=positive,
        default=SHOWN["lr"],
        help="learning rate of the first step, falling with the steps; lower it where the loss diverges",
    )
    group.add_argument(
        "--schedule",
        choices=("bottou", "cosine"),
        default=SHOWN["schedule"],
        help="how it falls: lr / sqrt(1 + lr * weight decay * steps), or a cosine to 0, epoch by epoch",
    )
    group.add_argument("--momentum", type=within(0, 1, "high"), default=SHOWN["momentum"], help="momentum")
    group.add_argument(
        "--weight_decay",
        "--wd",
        type=within(-100, 0),
        default=SHOWN["weight_decay"],
        help="weight decay pow: -7 for 10**-7; higher where prec@1 on train is far above that on val",
    )
    group.add_argument(
        "--start",
        choices=("uniform", "normal"),
        default=SHOWN["start"],
        help="of the classifiers: uniform, as PyTorch's; normal, N(0, 0.01) with bias 0",
    )
