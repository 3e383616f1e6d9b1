"""Linear classifiers on the frozen activations of a network: what does each layer know of the classes?

    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --conv 1 2 3 4 5 --exp exp/linear
    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --layers layer4 avgpool --exp exp/linear
    python eval_linear.py --data DIR --model random:alexnet:sobel --conv 1 2 3 4 5 --exp exp/random

DIR has train/ and val/ with class sub-folders, or --labels tells the classes. The network runs once a batch,
frozen and in eval mode; on the pooled activation of each chosen layer (of a convolution after its ReLU) one
linear classifier trains. They share nothing but the batches: each is the same as when it trains alone.
"""

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


def get_parser() -> Parser:
    """The flags of eval_linear.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_subject(parser.add_argument_group("what to evaluate"))
    add_training(parser.add_argument_group("training of the classifiers"))
    add_run(parser.add_argument_group("files"))
    add_machine(parser.add_argument_group("machine"))
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", metavar="DATA", help="path to dataset, with train/ and val/")
    add_labels(group)
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="path to model (a checkpoint of ours or one that the authors released), or random:ARCH or "
        "random:ARCH:sobel for the network that main.py --seed SEED starts from",
    )
    group.add_argument(
        "--conv",
        type=int,
        nargs="+",
        metavar="N",
        help="on top of which convolutional layers train logistic regression (AlexNet 1-5, VGG-16 1-13); "
        "several train side by side at little more than the cost of one",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="layers by name, e.g. layer1 layer2 layer3 layer4 avgpool of a ResNet, fc7 of AlexNet; a wrong "
        "name is answered by the list",
    )
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
    add_image_size(group, None, OWN_SIZE)
    add_bad_images(group)


def add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=at_least(1), default=90, help="number of total epochs to run")
    group.add_argument(
        "--batch_size",
        "--batch",
        dest="batch",
        type=at_least(1),
        default=256,
        help="mini-batch size, of all processes together",
    )
    group.add_argument(
        "--lr",
        type=positive,
        default=0.01,
        help="learning rate of the first step, falling with the steps; lower it where the loss diverges",
    )
    group.add_argument("--momentum", type=within(0, 1, "high"), default=0.9, help="momentum")
    group.add_argument(
        "--weight_decay",
        "--wd",
        type=within(-100, 0),
        default=-4,
        help="weight decay pow: -7 for 10**-7; higher where prec@1 on train is far above that on val",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import data
from data import ImageList, PlainView, RandomView, central_crop, probe_train_crop, ten_crops
from evaluation import results
from evaluation.labelled import hold_out, open_train_val
from evaluation.probe import (
    CHUNK,
    CROPS,
    Fingerprint,
    Frozen,
    History,
    Probes,
    Tally,
    choose_layers,
    count,
    evaluate,
    table,
    write_classifiers,
)
from features import Pass
from models import Network, weights
from training import logs
from training.optim import bottou, sgd
from training.run import Run
from util import UserError, run_main

FIXED = (
    "layers", "batch", "lr", "momentum", "weight_decay", "seed", "image_size", "tencrops", "val_fraction",
    "precision",
)  # fmt: skip


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and evaluate; returns one dict a layer, as in results.json. Files go into args.exp."""
    if not args.data:
        raise UserError("--data is missing: give a folder with train/ and val/, or --labels too")
    net = weights.load(args.model, args.layers or [], args.seed)
    args.layers, args.conv = choose_layers(net, args.conv or [], args.layers or []), None
    told, args.image_size = net.inputs.tell(args.image_size), net.inputs.size(args.image_size)
    with Run(args, "linear", FIXED, own_files=True) as run:
        run.log(told)
        results.read(run.exp)
        run.inputs, bad_list = net.inputs, run.exp / "bad_images.txt"
        images, val = open_train_val(
            args.data, args.workers, bad_list, args.skip_bad_images, run.log, args.labels
        )
        run.keep(train_images=images, val_images=val, network=(fingerprint := Fingerprint(net)))
        train, held_out = hold_out(images, args.val_fraction, args.seed)
        judged = {"val": val} | ({} if held_out is None else {"held_out": held_out})
        probes = Probes(
            Frozen(net, args.layers, args.image_size, run.device), len(val.class_names), args.seed
        )
        decay = 10.0**args.weight_decay
        optimizers = [sgd(c.parameters(), args.lr, args.momentum, decay) for c in probes.classifiers]
        history, tally = History(args.layers, list(judged)[-1]), Tally(len(args.layers))
        run.keep(classifiers=probes.classifiers, history=history, tally=tally)
        run.keep(**{f"optimizer_{layer}": sgd_of for layer, sgd_of in zip(args.layers, optimizers)})
        protocol = describe(args, net, {"train": train, **judged})
        announce(run, probes, protocol)
        if run.resumed and run.is_main:
            for layer in args.layers:
                logs.take_over(f"{layer}_best.pth.tar", run.origin, run.exp)

        view = RandomView(train, probe_train_crop(args.image_size))
        labels = torch.from_numpy(train.classes)
        for epoch in run.epochs(args.epochs):
            order = np.random.default_rng(run.seed("probe order", epoch)).permutation(len(train))
            step_loss = partial(loss, run, labels, tally)
            run.train_pass(probes, optimizers, view, order, step_loss, schedule=bottou(args.lr, decay))
            splits = {"train": tally.records()}
            splits |= {name: judge_split(run, probes, name, split) for name, split in judged.items()}
            history.add(epoch, run.iteration, splits)
            tally.clear()
            protocol = describe(args, net, {"train": train, **judged})  # undecodable images have left
            finish_epoch(run, probes, history, protocol)
        fingerprint.check(net)
        return report(run, probes, history, protocol)


def describe(args: argparse.Namespace, net: Network, splits: dict[str, ImageList]) -> dict[str, Any]:
    """The protocol, as it stands in results.json beside the number of epochs."""
    chosen = "val, the split reported"
    if args.val_fraction > 0:
        chosen = f"held-out {args.val_fraction:g} of train"
    return {
        "data": args.data,
        **({"labels": args.labels} if args.labels else {}),
        **{f"{name} images": len(images) for name, images in splits.items()},
        "classes": len(splits["train"].class_names),
        "network": f"{args.model} ({net})",
        "frozen": "all of it, batch-norm statistics too (checked)",
        "layers": "+".join(args.layers),
        "image size": args.image_size,
        "split reported": "val",
        "crops": f"{CROPS} crops, mean softmax" if args.tencrops else "central crop",
        "best epoch chosen on": chosen,
        "batch": args.batch,
        "lr": f"{args.lr:g} / sqrt(1 + {args.lr:g} * weight decay * steps)",
        "momentum": args.momentum,
        "weight decay": 10.0**args.weight_decay,
        "seed": args.seed,
        "precision": args.precision,
    }


def announce(run: Run, probes: Probes, protocol: dict[str, Any]) -> None:
    """Say what is about to happen."""
    sizes = ", ".join(f"{protocol[name]} {name}" for name in protocol if name.endswith("images"))
    values = "  ".join(f"{layer} {n}" for layer, n in zip(probes.layers, probes.trunk.values))
    run.log(f"{protocol['data']}: {sizes}, {protocol['classes']} classes")
    run.log(f"{protocol['network']} frozen, on {run.device} at {protocol['image size']} px; values: {values}")
    if run.args.verbose:
        run.log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(run.args).items())))


def loss(
    run: Run,
    labels: torch.Tensor,
    tally: Tally,
    probes: torch.nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the classes of the images index (B,), summed over them and over the classifiers.

    x (B, 3, S, S). As the sum's gradient is 1, each classifier gets its own loss's gradient to the bit.
    """
    target = labels[index].to(x.device, non_blocking=True)
    logits = probes(x)
    losses = [F.cross_entropy(scores, target, reduction="sum") for scores in logits]
    tally.add(torch.stack([count(a.detach(), b.detach(), target) for a, b in zip(losses, logits)]))
    for layer, record in zip(run.args.layers, tally.records()):
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"the loss on {layer} is {record['loss']} at iteration {run.position - 1} of epoch "
                f"{run.epoch}: start again in another --exp with a lower --lr"
            )
    return sum(losses)


def judge_split(run: Run, probes: Probes, name: str, images: ImageList) -> list[dict[str, float]]:
    """A record for each classifier; images that cannot be decoded leave the list or end the run."""
    args = run.args
    crop = ten_crops(args.image_size) if args.tencrops else central_crop(args.image_size)
    how = Pass(CHUNK // CROPS if args.tencrops else CHUNK, args.workers, run.device, args.precision)
    view, label = PlainView(images, crop), f"epoch {run.epoch} {name}"
    records, broken = evaluate(probes, view, how, label, run.log)
    data.leave_out(
        images, data.reasons(images, broken), run.exp / "bad_images.txt", args.skip_bad_images, run.log
    )
    return records


def finish_epoch(run: Run, probes: Probes, history: History, protocol: dict[str, Any]) -> None:
    """Write log, classifiers and, last, the checkpoint: a run that is killed before does the epoch again."""
    for layer in probes.layers:
        run.log(f"epoch {run.epoch} {layer}  {history.line(layer)}")
    if run.is_main:
        write_classifiers(run.exp, probes, history, protocol)
    run.finish_epoch(layers={layer: history.last(layer) for layer in probes.layers})


def report(run: Run, probes: Probes, history: History, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Print the table by layer, put it with the protocol into EXP/results.json, and return it."""
    found = history.results(probes.trunk.values)
    run.log("")
    for line in table(found):
        run.log(line)
    run.log(f"prec@1 / prec@5 in % on val ({protocol['crops']}); in brackets the epoch, counted from 0")
    warning = (
        "" if run.args.val_fraction > 0 else ": as the authors did, a little optimistic (--val-fraction)"
    )
    run.log(f"best epoch chosen on {protocol['best epoch chosen on']}{warning}")
    if run.is_main:
        results.report(run.exp, "linear", protocol | {"epochs": run.epoch}, found)
    return found


if __name__ == "__main__":
    run_main(main, ARGS)
