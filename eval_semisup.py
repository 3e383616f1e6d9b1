"""Fine-tuning on 1 % or 10 % of the labels: how far does a network come with few of them?

    python eval_semisup.py --data DIR --model exp/checkpoint.pth.tar --list 10percent.txt --exp exp/ten
    python eval_semisup.py --data DIR --model exp/checkpoint.pth.tar --labels_perc 1 --draws 5 --exp exp/one
    torchrun --nproc-per-node=8 eval_semisup.py ...    one process a GPU; --batch is of all of them

DIR has train/ and val/ with class sub-folders. Training images are those of a list, or are drawn, the same
number of every class. The whole network trains, under a fresh head with a learning rate of its own: the
semi-supervised protocol of SwAV, Caron et al., NeurIPS 2020.
"""

import argparse

from commandline import Parser, at_least, positive
from evaluation.finetune_flags import add_files_and_machine, add_lr, add_subject, add_training


def get_parser() -> Parser:
    """The flags of eval_semisup.py; those that fine-tuning shares are in evaluation/finetune_flags.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to evaluate")
    add_subject(group)
    add_labels(group)
    group = parser.add_argument_group("training")
    add_training(group, epochs=20, decay_epochs=[12, 16], gamma=0.2, wd=0.0)
    add_lr(group, None, "of the network (default: 0.01 with 10 %%, 0.02 with 1 %%)")
    group.add_argument(
        "--lr_last_layer",
        type=positive,
        metavar="LR",
        help="learning rate of the head (default: 0.2 with 10 %%, 5 with 1 %%); as --lr",
    )
    add_files_and_machine(parser)
    return parser


def add_labels(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels_perc",
        type=int,
        choices=(1, 10),
        default=10,
        help="percentage of the training images, which also chooses the learning rates",
    )
    group.add_argument(
        "--list",
        metavar="FILE",
        help="the images to train on, a file name a line, such as n01440764_10026.JPEG, or class/name "
        "(default: drawn by --seed, the same number of every class)",
    )
    group.add_argument(
        "--draws",
        type=at_least(1),
        default=1,
        metavar="N",
        help="train so many times, each time on images drawn anew (with --list: on the same ones) under "
        "another head, and report mean and spread; more tell what a difference is worth",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import statistics
from typing import Any

from data import ImageList, central_crop
from evaluation import results
from evaluation.few_labels import drawn_mask, listed_mask, number_of_each
from evaluation.finetune import NETWORK, Plan, Tuned, announce, finetune, judge_split, line
from evaluation.labelled import open_train_val, refuse_missing
from evaluation.probe import CHUNK, History
from features import Pass
from models import Network, weights
from training.run import Run
from util import Log, run_main

METHOD = "semisup"
FIXED = (
    "model", "labels_perc", "draws", "batch", "lr", "lr_last_layer", "gamma", "decay_epochs", "wd",
    "momentum", "seed", "image_size", "precision",
)  # fmt: skip
PRECISIONS = ("prec@1", "prec@5")
RATES = {1: (0.02, 5.0), 10: (0.01, 0.2)}  # --labels_perc -> network, head: the authors', at batch 256


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; returns what goes into EXP/results.json."""
    lr, lr_head = RATES[args.labels_perc]
    args.lr, args.lr_last_layer = args.lr or lr, args.lr_last_layer or lr_head
    net = weights.load(args.model, seed=args.seed)
    told, args.image_size = net.inputs.tell(args.image_size), net.inputs.size(args.image_size)
    plan = Plan(
        args.epochs, args.lr, args.lr_last_layer, args.gamma, args.decay_epochs, args.wd, args.momentum,
        args.image_size,
    )  # fmt: skip
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
        seeds = [run.seed("few labels", number) for number in range(args.draws)]
        subsets = choose(train, args.list, args.labels_perc, seeds)
        run.keep(chosen=Chosen(subsets, args.epochs))
        tuned = Tuned(run.network(net, sync_bn=True), len(train.class_names), plan, again=args.draws > 1)
        protocol = describe(args, subsets, train, val, net, plan)
        announce(run, protocol)

        def judged(label: str) -> dict[str, float]:
            how = Pass(CHUNK, args.workers, run.device, args.precision)
            crop = central_crop(args.image_size)
            return judge_split(run, net, val, crop, how, args.skip_bad_images, label)

        found = summary(subsets, finetune(run, tuned, plan, subsets, judged, protocol))
        tell(run.log, found)
        if run.is_main:
            results.report(run.exp, METHOD, protocol | {"epochs": args.epochs}, found)
        return found


def choose(train: ImageList, names: str | None, percent: int, seeds: list[int]) -> list[ImageList]:
    """The labelled images of each training: those of the list, or drawn by its seed."""
    if names is not None:
        return [train.keep(listed_mask(train, names))] * len(seeds)
    return [train.keep(drawn_mask(train.classes, percent, seed)) for seed in seeds]


class Chosen:
    """Which images each training is on, and for how long: a part of the run, which goes on with the same."""

    def __init__(self, subsets: list[ImageList], epochs: int) -> None:
        self.state = {"digests": [images.digest() for images in subsets], "epochs": epochs}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError unless they are those of the state; a single training may be made longer."""
        if state["digests"] != self.state["digests"]:
            raise ValueError("the run was on other labelled images; give the same --list")
        if state["epochs"] != self.state["epochs"] and len(self.state["digests"]) > 1:
            raise ValueError(f"each draw had {state['epochs']} epochs, not {self.state['epochs']}")


def describe(
    args: argparse.Namespace,
    subsets: list[ImageList],
    train: ImageList,
    val: ImageList,
    net: Network,
    plan: Plan,
) -> dict[str, Any]:
    """The protocol, as it stands in results.json beside the number of epochs."""
    drawn = f"{args.labels_perc} %, {number_of_each(train.classes, args.labels_perc)} of every class, drawn"
    return {
        "data": args.data or f"{args.shards}, {args.val_shards}",
        "classes from": args.labels or ("shards" if args.shards else "sub-folders"),
        "labels": args.list or drawn,
        "train images": f"{len(subsets[0])} of {len(train)}",
        "val images": len(val),
        "classes": len(train.class_names),
        "network": f"{args.model} ({net})",
        "trained": "all of it",
        **plan.describe(),
        "batch": args.batch,
        "split reported": "val",
        "crops": "central crop",
        "best epoch chosen on": "val, the split reported",
        "draws": args.draws,
        "seed": args.seed,
        "precision": args.precision,
    }


def summary(subsets: list[ImageList], histories: list[History]) -> dict[str, Any]:
    """The best and the last epoch of each training; mean and spread of the best ones' figures, in percent."""
    trainings = [
        {
            "images": len(images),
            "classes": len(set(images.classes.tolist())),
            "best": history.best(NETWORK),
            "last": history.last(NETWORK),
        }
        for images, history in zip(subsets, histories)
    ]
    return {"trainings": trainings, **{name: spread(trainings, name) for name in PRECISIONS}}


def spread(trainings: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Mean, standard deviation of a sample (None of one), lowest and highest figure of the best epochs."""
    values = [one["best"]["val"][name] for one in trainings]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    ends = {"lowest": min(values), "highest": max(values)}
    return {"mean": statistics.fmean(values), "deviation": deviation, **ends}


def tell(log: Log, found: dict[str, Any]) -> None:
    """A line for each training, and their mean."""
    for number, one in enumerate(found["trainings"]):
        what = f"training {number}, {one['images']} images of {one['classes']} classes, best epoch"
        log(line(one["best"]["val"], f"{what} ({one['best']['epoch']})"))
    if len(found["trainings"]) > 1:
        parts = [f"{name} {found[name]['mean']:.2f} +- {found[name]['deviation']:.2f}" for name in PRECISIONS]
        log(f"mean and deviation of {len(found['trainings'])} draws: {'  '.join(parts)}")
    log("best epoch chosen on val, the split reported: as the authors did, a little optimistic")


if __name__ == "__main__":
    run_main(main, ARGS)
