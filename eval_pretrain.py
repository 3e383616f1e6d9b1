"""Supervised training that starts from a network: is it a better start for labels than a random one?

    python eval_pretrain.py --data DIR --model exp/checkpoint.pth.tar --exp exp/pretrain
    python eval_pretrain.py --data DIR --model random:vgg16wide:sobel --exp exp/scratch     the comparison
    torchrun --nproc-per-node=4 eval_pretrain.py ...    one process a GPU; --batch is of all of them

DIR has train/ and val/ with class sub-folders. Everything trains. The Sobel filters of a vgg16wide are folded
into its first convolution, exactly, so that the network takes colour: "pre-training for ImageNet" of Caron et
al., ICCV 2019. EXP/pretrain.pth.tar is a network for every other script.
"""

import argparse

from commandline import Parser, word
from evaluation.finetune_flags import add_files_and_machine, add_lr, add_subject, add_training


def get_parser() -> Parser:
    """The flags of eval_pretrain.py; those that fine-tuning shares are in evaluation/finetune_flags.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to evaluate")
    add_subject(group)
    group.add_argument(
        "--sobel2RGB",
        type=word,
        default=True,
        metavar="BOOL",
        help="fold the Sobel filters of a vgg16wide into its first convolution, which then sees colour; "
        "false, and of other networks: they stay in front, fixed, and edges alone are seen",
    )
    group = parser.add_argument_group("training")
    add_training(group, epochs=100, decay_epochs=[30, 60, 90], gamma=0.1, wd=1e-4)
    add_lr(group, 0.1, "at the start, of the whole network")
    add_files_and_machine(parser)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from collections.abc import Callable
from typing import Any

from data import ImageList, Transform, central_crop, ten_crops
from evaluation import results
from evaluation.finetune import NETWORK, Plan, Tuned, announce, finetune, judge_split, line
from evaluation.labelled import open_train_val, refuse_missing
from evaluation.probe import CHUNK, CROPS
from features import Pass
from models import Network, weights
from models.network import renew_linears
from models.vgg16 import fold_sobel, folds
from training.run import Run
from util import derive_seed, run_main

METHOD = "pretrain"
FIXED = (
    "model", "sobel2RGB", "batch", "lr", "gamma", "decay_epochs", "wd", "momentum", "seed", "image_size",
    "precision",
)  # fmt: skip
INIT_BIAS = 0.1  # of fc6 and fc7, which start anew


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; returns what goes into EXP/results.json."""
    net, sobel = start_of(args.model, args.sobel2RGB, args.seed)
    told, args.image_size = net.inputs.tell(args.image_size), net.inputs.size(args.image_size)
    plan = Plan(
        args.epochs, args.lr, args.lr, args.gamma, args.decay_epochs, args.wd, args.momentum, args.image_size
    )
    refuse_missing(args.data, args.shards, args.val_shards, args.labels)
    with Run(args, METHOD, FIXED, own_files=True) as run:
        run.log(told)
        results.read(run.exp)
        run.inputs = net.inputs
        shards, bad_list = (args.shards, args.val_shards), run.exp / "bad_images.txt"
        train, val = open_train_val(
            args.data, args.workers, bad_list, args.skip_bad_images, run.log, args.labels, shards
        )
        run.keep(images=train, val_images=val)
        tuned = Tuned(run.network(net, sync_bn=True), len(train.class_names), plan)
        protocol = describe(args, train, val, net, plan) | {"Sobel": sobel}
        announce(run, protocol)
        run.log(sobel)

        def judged(
            label: str, crop: Callable[[int], Transform] = central_crop, crops: int = 1
        ) -> dict[str, float]:
            how = Pass(CHUNK // crops, args.workers, run.device, args.precision)
            return judge_split(run, net, val, crop(args.image_size), how, args.skip_bad_images, label)

        (history,) = finetune(run, tuned, plan, [train], judged, protocol)
        ten = judged(f"val, {CROPS} crops", ten_crops, CROPS)
        found = {"last": history.last(NETWORK), "best": history.best(NETWORK), "last, ten crops": ten}
        for name in ("last", "best"):
            run.log(line(found[name]["val"], f"{name} epoch ({found[name]['epoch']}), central crop"))
        run.log(line(ten, f"last epoch, mean softmax of {CROPS} crops"))
        if run.is_main:
            results.report(run.exp, METHOD, protocol | {"epochs": run.epoch}, found)
        return found


def describe(
    args: argparse.Namespace, train: ImageList, val: ImageList, net: Network, plan: Plan
) -> dict[str, Any]:
    """The protocol, as it stands in results.json beside the number of epochs."""
    renewed = any(True for _ in net.parts()[1].parameters())
    return {
        "data": args.data or f"{args.shards}, {args.val_shards}",
        "classes from": args.labels or ("shards" if args.shards else "sub-folders"),
        "train images": len(train),
        "val images": len(val),
        "classes": len(train.class_names),
        "network": f"{args.model} ({net})",
        "trained": "all of it, what stands on the convolutions anew" if renewed else "all of it",
        **plan.describe(),
        "batch": args.batch,
        "split reported": "val",
        "crops": f"central crop; of the last epoch also {CROPS} crops, mean softmax",
        "best epoch chosen on": "val, the split reported",
        "seed": args.seed,
        "precision": args.precision,
    }


def start_of(model: str, fold: bool, seed: int) -> tuple[Network, str]:
    """(the network that training starts from, without a head; what became of its Sobel filters, in words).

    What stands on the convolutions is drawn anew: N(0, 0.01), bias 0.1.
    """
    net = weights.load(model, seed=seed)
    sobel = "colour, no Sobel" if net.sobel is None else "Sobel in front, fixed"
    if fold and folds(net):
        net, sobel = fold_sobel(net), "Sobel folded into conv1, exactly, on colour"
    renew_linears(net.parts()[1], INIT_BIAS, derive_seed(seed, "pretrain classifier"))
    return net, sobel


if __name__ == "__main__":
    run_main(main, ARGS)
