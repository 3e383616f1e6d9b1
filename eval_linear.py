"""Linear classifiers on the frozen activations of a network: what does each layer know of the classes?

    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --conv 1 2 3 4 5 --exp exp/linear
    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --protocol swav --exp exp/linear
    python eval_linear.py --vocdir VOC2007 --model M --protocol deepercluster --conv 13 --exp exp/linear_voc
    python eval_linear.py --data DIR --model random:alexnet:sobel --conv 1 2 3 4 5 --exp exp/random

DIR has train/ and val/ with class sub-folders, or --labels tells the classes. The network runs once a batch,
frozen and in eval mode; on the pooled activation of each chosen layer (of a convolution after its ReLU) one
linear classifier trains. They share nothing but the batches: each is the same as when it trains alone.
--protocol gives the settings of one of the papers (docs/evaluations.md); the defaults are DeepCluster's.
"""

import argparse

from commandline import (
    OWN_SIZE,
    Parser,
    add_bad_images,
    add_image_size,
    add_machine,
    add_run,
)
from evaluation.flags import add_labels
from evaluation.probe_flags import add_judging, add_protocol, add_training
from evaluation.protocols import LINEAR, ProtocolParser, linear_protocol, tell


def get_parser() -> Parser:
    """The flags of eval_linear.py; those that scripts share are in commandline.py."""
    parser = ProtocolParser(__doc__, LINEAR, linear_protocol)
    add_subject(parser.add_argument_group("what to evaluate"))
    add_protocol(parser.add_argument_group("protocol"))
    add_judging(parser.add_argument_group("what it is judged on"))
    add_training(parser.add_argument_group("training of the classifiers"))
    add_run(parser.add_argument_group("files"))
    add_machine(parser.add_argument_group("machine"))
    return parser


def add_subject(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", metavar="DATA", help="path to dataset, with train/ and val/")
    add_labels(group)
    group.add_argument(
        "--vocdir", metavar="VOC", help="instead of --data: folder VOC2007, a yes or no for each class, mAP"
    )
    group.add_argument(
        "--split",
        choices=("train", "trainval"),
        help="of --vocdir: train, judged on val; trainval, judged on test (default)",
    )
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
    add_image_size(group, None, OWN_SIZE)
    add_bad_images(group)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import math
import os
from functools import partial
from typing import Any

import numpy as np
import torch

import data
from data import PlainView, RandomView, central_crop, probe_train_crop, ten_crops, train_crop
from data.sampling import ShareSampler, shuffled
from evaluation import results
from evaluation.probe import (
    CHUNK,
    CROPS,
    Fingerprint,
    Frozen,
    History,
    Probes,
    Tally,
    choose_layers,
    evaluate,
    table,
    write_classifiers,
)
from evaluation.probe_data import Split, divide, mean_of_folds, open_classes, open_yes_no
from features import Pass
from models import Network, weights
from training import logs
from training.optim import Schedule, bottou, cosine_by_epoch, sgd
from training.run import Run
from util import Log, UserError, run_main

FIXED = (
    "layers", "batch", "lr", "momentum", "weight_decay", "seed", "image_size", "tencrops", "val_fraction",
    "precision", "protocol", "places", "pooling", "use_bn", "train_crop", "schedule", "start", "split",
    "kfold", "fold",
)  # fmt: skip
TRAIN_CROPS = {"shift": probe_train_crop, "area": train_crop}


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and evaluate; returns one dict a layer, as in results.json. Files go into args.exp."""
    check(args)
    if args.kfold and args.fold is None:
        return every_fold(args)
    net = weights.load(args.model, args.layers or [], args.seed)
    args.layers, args.conv = layers_of(args, net), None
    told, args.image_size = net.inputs.tell(args.image_size), net.inputs.size(args.image_size)
    rates, decay = rates_of(args), 10.0**args.weight_decay
    with Run(args, "linear", FIXED, own_files=True) as run:
        run.log(told)
        results.read(run.exp)
        run.inputs, (source, val) = net.inputs, open_splits(run)
        run.keep(train_images=source.kept, val_images=val.kept, network=(fingerprint := Fingerprint(net)))
        train, judged = divide(source, val, args.seed, args.val_fraction, args.kfold, args.fold or 0)
        trunk = Frozen(net, args.layers, args.image_size, run.device, args.pooling)
        probes = Probes(trunk, len(val.class_names), args.seed, args.start, normed(run, net))
        optimizers = [
            sgd(c.parameters(), lr, args.momentum, decay) for c, lr in zip(probes.classifiers, rates)
        ]
        history = History(args.layers, list(judged)[-1], train.figure)
        run.keep(classifiers=probes.classifiers, history=history, tally=(tally := Tally(len(args.layers))))
        run.keep(**{f"optimizer_{layer}": sgd_of for layer, sgd_of in zip(args.layers, optimizers)})
        protocol = describe(args, net, {"train": train, **judged})
        announce(run, probes, protocol)
        if run.resumed and run.is_main:
            for layer in args.layers:
                logs.take_over(f"{layer}_best.pth.tar", run.origin, run.exp)

        view = RandomView(train.images, TRAIN_CROPS[args.train_crop](args.image_size))
        schedules = schedules_of(args, rates, len(train))
        for epoch in run.epochs(args.epochs):
            order = shuffled(len(train), run.seed("probe order", epoch))
            step_loss = partial(loss, run, train, train.targets, tally)
            run.train_pass(probes, optimizers, view, order, step_loss, schedule=schedules)
            splits = {"train": [train.trained(record) for record in tally.records()]}
            splits |= {name: judge_split(run, probes, name, split) for name, split in judged.items()}
            history.add(epoch, run.iteration, splits)
            tally.clear()
            protocol = describe(args, net, {"train": train, **judged})  # undecodable images have left
            finish_epoch(run, probes, history, protocol)
        fingerprint.check(net)
        return report(run, probes, history, protocol, train.figures)


def check(args: argparse.Namespace) -> None:
    """Refuse flags that are missing or do not go together."""
    if bool(args.data) == bool(args.vocdir):
        what = (
            "and --vocdir: give one of them"
            if args.data
            else "is missing: give a folder with train/ and val/, or --labels too"
        )
        raise UserError(f"--data {what}")
    alone = {
        "--labels: is of the images in --data": args.labels and args.vocdir,
        "--split: only with --vocdir": args.split and not args.vocdir,
        "--tencrops: VOC07 is judged on the central crop": args.tencrops and args.vocdir,
        "--val-fraction: for VOC07 give --kfold": args.val_fraction and args.vocdir,
        "--val-fraction and --kfold: give one of them": args.val_fraction and args.kfold,
        "--fold: only with --kfold": args.fold is not None and not args.kfold,
        f"--fold {args.fold}: folds are 0 to {(args.kfold or 1) - 1}": (args.fold or 0) >= (args.kfold or 1),
        "--places: only with --protocol deepercluster, --data and without --lr": args.places
        and (args.protocol != "deepercluster" or args.vocdir or not isinstance(args.lr, list)),
        "--resume: of all folds give auto, or choose one by --fold": args.kfold
        and args.fold is None
        and args.resume not in (None, "auto"),
        "--kfold: with several processes one fold a call, give --fold": args.kfold
        and args.fold is None
        and int(os.environ.get("WORLD_SIZE", 1)) > 1,
    }
    for message, wrong in alone.items():
        if wrong:
            raise UserError(message)
    args.split = args.split or ("trainval" if args.vocdir else None)


def every_fold(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A run for each fold, in EXP/fold<f>; the means are printed and put into EXP/results.json."""
    found = []
    for fold in range(args.kfold):
        exp = os.path.join(args.exp, f"fold{fold}")
        found.append(main(argparse.Namespace(**(vars(args) | {"fold": fold, "exp": exp}))))
    figure = "mAP" if args.vocdir else "prec@1"
    rows, log = mean_of_folds(found, figure), Log()
    for row in rows:
        of_each = "  ".join(f"{value:.2f}" for value in row["last"]["folds"])
        log(f"{row['layer']}: {figure} {row['last'][figure]:.2f} on average of the last epochs ({of_each})")
    protocol = results.read(exp)["linear"]["protocol"] | {"split reported": f"each of {args.kfold} folds"}
    results.report(args.exp, "linear", protocol, rows)
    return rows


def open_splits(run: Run) -> tuple[Split, Split]:
    """What to train on and what to judge on, as the flags name them."""
    args = run.args
    if args.vocdir:
        return open_yes_no(args.vocdir, args.split, args.workers)
    bad_list = run.exp / "bad_images.txt"
    return open_classes(args.data, args.workers, bad_list, args.skip_bad_images, run.log, args.labels)


def layers_of(args: argparse.Namespace, net: Network) -> list[str]:
    """The layers asked for; without any those of the protocol."""
    chosen = bool(args.conv or args.layers)
    if chosen or args.protocol == "deepcluster":
        return choose_layers(net, args.conv or [], args.layers or [])
    return choose_layers(net, [], [*net.maps, net.output] if args.protocol == "swav" else net.maps)


def rates_of(args: argparse.Namespace) -> list[float]:
    """The learning rate of each layer's first step."""
    if not isinstance(args.lr, list):
        return [args.lr] * len(args.layers)
    table = {f"conv{number}": lr for number, lr in enumerate(args.lr, start=1)}
    for layer in args.layers:
        if layer not in table:
            raise UserError(f"--protocol {args.protocol}: has no learning rate for {layer}; give --lr")
    return [table[layer] for layer in args.layers]


def schedules_of(args: argparse.Namespace, rates: list[float], images: int) -> list[Schedule]:
    """How each of them falls."""
    if args.schedule == "bottou":
        return [bottou(lr, 10.0**args.weight_decay) for lr in rates]
    steps = ShareSampler(np.arange(images), args.batch).steps
    return [cosine_by_epoch(lr, args.epochs, steps) for lr in rates]


def normed(run: Run, net: Network) -> list[str]:
    """The layers whose classifier has a batch norm in front."""
    args = run.args
    last = [layer for layer in args.layers if layer == net.maps[-1] and args.pooling == "overlapping"]
    if args.use_bn and not last:
        run.log(f"--use_bn: without effect, there is no {net.maps[-1]} with --pooling overlapping")
    return last if args.use_bn else []


def describe(args: argparse.Namespace, net: Network, splits: dict[str, Split]) -> dict[str, Any]:
    """The protocol, as it stands in results.json beside the number of epochs."""
    reported = f"fold {args.fold} of {args.kfold} of train" if args.kfold else "val"
    chosen = f"{reported}, the split reported"
    if args.val_fraction > 0:
        chosen = f"held-out {args.val_fraction:g} of train"
    name, lr = linear_protocol(args), "lr0" if isinstance(args.lr, list) else f"{args.lr:g}"
    falls = f"{lr} / sqrt(1 + {lr} * weight decay * steps)"
    falls = falls if args.schedule == "bottou" else f"{lr} / 2 * (1 + cos(pi * epoch / {args.epochs}))"
    each = ", ".join(f"{layer} {rate:g}" for layer, rate in zip(args.layers, rates_of(args)))
    return {
        "protocol": tell(name, LINEAR[name], vars(args), but=("epochs",)),
        "data": args.data or f"{args.vocdir}, {args.split}",
        **({"labels": args.labels} if args.labels else {}),
        **{f"{name} images": len(images) for name, images in splits.items()},
        "classes": len(splits["train"].class_names),
        "network": f"{args.model} ({net})",
        "frozen": "all of it, batch-norm statistics too (checked)",
        "layers": "+".join(args.layers),
        "pooling": f"{args.pooling}{', then batch norm' if args.use_bn else ''}",
        "image size": args.image_size,
        "train crop": args.train_crop,
        "split reported": reported,
        "crops": f"{CROPS} crops, mean softmax" if args.tencrops else "central crop",
        "best epoch chosen on": chosen,
        "batch": args.batch,
        "lr": f"{falls}, lr0 {each}" if lr == "lr0" else falls,
        "momentum": args.momentum,
        "weight decay": 10.0**args.weight_decay,
        "start": args.start,
        "seed": args.seed,
        "precision": args.precision,
    }


def announce(run: Run, probes: Probes, protocol: dict[str, Any]) -> None:
    """Say what is about to happen."""
    sizes = ", ".join(f"{protocol[name]} {name}" for name in protocol if name.endswith("images"))
    values = "  ".join(f"{layer} {n}" for layer, n in zip(probes.layers, probes.trunk.values))
    run.log(f"{protocol['data']}: {sizes}, {protocol['classes']} classes")
    run.log(f"{protocol['network']} frozen, on {run.device} at {protocol['image size']} px; values: {values}")
    name = linear_protocol(run.args)
    run.log(f"protocol {tell(name, LINEAR[name], vars(run.args))}")
    if run.args.verbose:
        run.log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(run.args).items())))


def loss(
    run: Run,
    split: Split,
    targets: torch.Tensor,
    tally: Tally,
    probes: torch.nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """The split's loss of the images index (B,), summed over them and over the classifiers.

    x (B, 3, S, S). As the sum's gradient is 1, each classifier gets its own loss's gradient to the bit.
    """
    target = targets[index].to(x.device, non_blocking=True)
    logits = probes(x)
    losses = [split.loss(scores, target) for scores in logits]
    tally.add(torch.stack([split.count(a.detach(), b.detach(), target) for a, b in zip(losses, logits)]))
    for layer, record in zip(run.args.layers, tally.records()):
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"the loss on {layer} is {record['loss']} at iteration {run.position - 1} of epoch "
                f"{run.epoch}: start again in another --exp with a lower --lr"
            )
    return sum(losses)


def judge_split(run: Run, probes: Probes, name: str, split: Split) -> list[dict[str, float]]:
    """A record for each classifier; images that cannot be decoded leave the list or end the run."""
    args, images = run.args, split.images
    crop = ten_crops(args.image_size) if args.tencrops else central_crop(args.image_size)
    how = Pass(CHUNK // CROPS if args.tencrops else CHUNK, args.workers, run.device, args.precision)
    view, label = PlainView(images, crop), f"epoch {run.epoch} {name}"
    records, broken = evaluate(probes, view, how, label, run.log, split.meter(len(probes.layers)))
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


def report(
    run: Run, probes: Probes, history: History, protocol: dict[str, Any], figures: str
) -> list[dict[str, Any]]:
    """Print the table by layer, put it with the protocol into EXP/results.json, and return it."""
    found = history.results(probes.trunk.values)
    run.log("")
    for line in table(found):
        run.log(line)
    of = f"{protocol['split reported']} ({protocol['crops']})"
    run.log(f"{figures} on {of}; in brackets the epoch, counted from 0")
    warning = (
        ""
        if run.args.val_fraction > 0
        else ": as the authors did, a little optimistic (--val-fraction, --kfold)"
    )
    run.log(f"best epoch chosen on {protocol['best epoch chosen on']}{warning}")
    if run.is_main:
        results.report(run.exp, "linear", protocol | {"epochs": run.epoch}, found)
    return found


if __name__ == "__main__":
    run_main(main, ARGS)
