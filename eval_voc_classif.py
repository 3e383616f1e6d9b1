"""Classification on Pascal VOC 2007, or a folder of that shape: train fc6-8 (or all layers), report mAP.

./eval_voc_classif.sh VOCdevkit/VOC2007 exp/checkpoint.pth.tar
python eval_voc_classif.py --vocdir VOCdevkit/VOC2007 --model exp/checkpoint.pth.tar --split trainval
python eval_voc_classif.py ... --resume auto    the same command goes on exactly where it was stopped
"""

import argparse

from commandline import (
    OWN_SIZE,
    Parser,
    add_image_size,
    add_machine,
    add_run,
    at_least,
    positive,
    within,
    word,
)
from evaluation.flags import add_voc_split
from evaluation.protocols import VOC, ProtocolParser, tell, voc_protocol

SHOWN = VOC["deepcluster"]  # as the defaults, in the help


def get_parser() -> Parser:
    """The flags of eval_voc_classif.py; those that scripts share are in commandline.py."""
    parser = ProtocolParser(__doc__, VOC, voc_protocol)
    add_data(parser.add_argument_group("data and network"))
    add_protocol(parser.add_argument_group("protocol"))
    add_training(parser.add_argument_group("training"))
    add_run(parser.add_argument_group("files"))
    add_machine(parser.add_argument_group("machine"))
    return parser


def add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vocdir", metavar="VOC", required=True, help="folder VOC2007, with ImageSets/Main and JPEGImages"
    )
    add_voc_split(group, "train")
    group.add_argument(
        "--model",
        metavar="PATH",
        required=True,
        help="checkpoint of the network (ours or the authors'; Sobel is seen from it), or random:ARCH",
    )
    add_image_size(group, None, OWN_SIZE)


def add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--protocol",
        choices=("deepcluster", "deepercluster"),
        default="deepcluster",
        help="whose settings the flags of training have where they are not given (docs/evaluations.md)",
    )
    group.add_argument(
        "--fc6_8",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: train what stands on the convolutions (fc6-8; of a ResNet the head alone); 0: all layers",
    )
    group.add_argument(
        "--train_batchnorm",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: with --fc6_8 1, train the scale and shift of the batch norms too",
    )
    group.add_argument(
        "--eval_random_crops",
        type=word,
        default=True,
        metavar="BOOL",
        help="test on 10 random crops (1), or on the corners, the centre and their mirror images (0)",
    )
    group.add_argument(
        "--pessimistic_ties",
        type=word,
        default=SHOWN["pessimistic_ties"],
        metavar="BOOL",
        help="take 1e-5 off the positives' scores before AP: they come behind what scores nearly the same",
    )


def add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train_crop",
        choices=("squares", "area"),
        default=SHOWN["train_crop"],
        help="views for training and random crops, flipped or not: squares of 10 to 50%% of the area; "
        "area, 8 to 100%% of it",
    )
    group.add_argument("--nit", type=at_least(1), default=SHOWN["nit"], help="number of iterations")
    group.add_argument(
        "--stepsize",
        type=at_least(1),
        default=SHOWN["stepsize"],
        help="halve the lr every so many iterations",
    )
    group.add_argument(
        "--lr",
        type=positive,
        default=SHOWN["lr"],
        help="learning rate at the start; lower it when the loss is nan",
    )
    group.add_argument(
        "--wd", type=within(0, 1), default=SHOWN["wd"], help="weight decay (itself, not its power of ten)"
    )
    group.add_argument("--momentum", type=within(0, 1, "high"), default=SHOWN["momentum"], help="momentum")
    group.add_argument(
        "--batch", type=at_least(1), default=SHOWN["batch"], help="mini-batch size, of all processes"
    )
    group.add_argument(
        "--checkpoint-every",
        dest="checkpoints",
        type=at_least(1),
        default=5000,
        metavar="N",
        help="iterations between two checkpoints",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import distributed
from data import RandomView, Transform, make_loader, ten_crops, train_crop, voc_train_crop
from data.sampling import ShareSampler, shuffled
from evaluation.results import report
from evaluation.voc import (
    GlobalStatistics,
    VocSplit,
    average_precisions,
    check_images,
    freeze,
    open_voc,
    renew,
    voc_loss,
)
from features import Pass, activations_of
from models.network import Network
from models.weights import load
from training.optim import halved, sgd
from training.run import Run
from util import Log, Progress, UserError, atomic_write, run_main

METHOD = "voc_classif"
CHECKPOINT, SCORES, LOG = f"{METHOD}.pth.tar", f"{METHOD}_scores.npz", f"{METHOD}.log"
FIXED = (
    "split",
    "model",
    "fc6_8",
    "train_batchnorm",
    "batch",
    "seed",
    "image_size",
    "protocol",
    "train_crop",
)
MAX_GRAD_NORM = 10.0
NUM_CROPS = 10
TRAIN_CROPS = {"squares": voc_train_crop, "area": train_crop}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train on one split, test on the other, print the table; returns what goes into EXP/results.json."""
    trained, tested = open_voc(args.vocdir, args.split)
    net = load(args.model, seed=args.seed)
    renew(net, len(trained.class_names), args.seed)
    told, args.image_size = net.inputs.tell(args.image_size), net.inputs.size(args.image_size)
    with Run(args, METHOD, FIXED, own_files=True) as run:
        for split in (trained, tested):
            check_images(split, args.workers)
        run.log(told)
        run.inputs, net = net.inputs, run.network(net)
        run.log(f"protocol {tell(voc_protocol(args), VOC[voc_protocol(args)], vars(args))}")
        run.log(
            f"{len(trained)} images of {trained.name} -> {len(tested)} of {tested.name}, "
            f"{len(trained.class_names)} classes; {net} on {run.device}, {layers_trained(args, net)}"
        )
        train(run, net, trained)

        crop = TRAIN_CROPS[args.train_crop](args.image_size)
        crops = random_crops(crop) if args.eval_random_crops else ten_crops(args.image_size)
        view = RandomView(tested.images, crops).at(run.seed("voc evaluation"), epoch=0)
        how = Pass(args.batch, args.workers, run.device, args.precision)
        label = f"voc test on {tested.name}"
        scores = predict(net, view, how, distributed.share_of(len(tested)), label, run.log)
        scores = distributed.all_gather_rows(scores)
        if not np.isfinite(scores).all():
            raise UserError("the network gives scores that are not finite; train again with a lower --lr")
        results = average_precisions(scores, tested, args.pessimistic_ties)
        print_table(results, tested, run.log)
        if run.is_main:
            save_scores(run.exp / SCORES, scores, tested)
            report(run.exp, "eval_voc_classif", describe(args, net, trained, tested), results)
        return results


# ---------------------------------------------------------------------------------------- training


def train(run: Run, net: Network, split: VocSplit) -> None:
    """Train net up to --nit iterations, from where the run stands.

    An epoch is a pass over all images in an order of its own. Where --nit ends within one, the run stays
    there, so that a larger --nit goes on with it.
    """
    args = run.args
    freeze(net, bool(args.fc6_8), bool(args.train_batchnorm))
    optimizer = sgd(net.parameters(), args.lr, args.momentum, args.wd)
    run.keep(data=split, net=net, optimizer=optimizer)
    if run.iteration > args.nit:
        raise UserError(f"--resume {args.resume}: has {run.iteration} iterations, more than --nit {args.nit}")
    if run.iteration == args.nit:
        run.log(f"nothing to train: this run has its {args.nit} iterations")
        return
    view = RandomView(split.images, TRAIN_CROPS[args.train_crop](args.image_size))
    each = len(ShareSampler(np.arange(len(split)), args.batch))  # iterations of an epoch
    for epoch in run.epochs(-(-args.nit // each)):
        order = shuffled(len(split), run.seed("voc order", epoch))
        left = args.nit - epoch * each
        run.train_pass(
            GlobalStatistics(net),
            [optimizer],
            view,
            order if left >= each else order[: left * args.batch],
            partial(loss, torch.from_numpy(split.labels)),
            schedule=halved(args.lr, args.stepsize),
            clip=MAX_GRAD_NORM,
        )
        if left < each:
            break
        run.finish_epoch(save=False)  # of few steps: --checkpoint-every says when
    run.save(run.folder.last)


def loss(labels: torch.Tensor, net: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """voc_loss of the images index (B,), x (B, 3, S, S), with their rows of labels (N, C)."""
    return voc_loss(net(x).float(), labels[index].to(x.device))


# ---------------------------------------------------------------------------------------- evaluation


def random_crops(crop: Transform) -> Transform:
    """Ten random crops as in training: (10, 3, size, size)."""
    return partial(_crop_repeatedly, crop=crop)


def _crop_repeatedly(image: torch.Tensor, crop: Transform) -> torch.Tensor:
    return torch.stack([crop(image) for _ in range(NUM_CROPS)])


def predict(net: Network, view: RandomView, how: Pass, rows: range, label: str, log: Log) -> np.ndarray:
    """Scores (len(rows), C) float32 of some images: the logits, summed over the ten crops of view.

    Random crops depend on the view's seed and the image alone.
    """
    scores = np.zeros((len(rows), net.top_layer.out_features), dtype=np.float32)
    loader = make_loader(view, how.batch, how.workers, how.device, sampler=[(i, i) for i in rows])
    batches = (batch._replace(views=batch.views.flatten(0, 1)) for batch in loader)  # (B * 10, 3, S, S)
    progress = Progress(len(rows), label, log=log)
    for found, batch in activations_of(net, ["logits"], batches, how.device, how.precision):
        logits = found["logits"].unflatten(0, (len(batch.index), NUM_CROPS))
        scores[batch.index.numpy() - rows.start] = logits.sum(1).cpu().numpy()
        progress.update(len(batch.index))
    progress.close()
    return scores


# ---------------------------------------------------------------------------------------- what comes out


def save_scores(path: Path, scores: np.ndarray, split: VocSplit) -> None:
    """Scores and labels of every test image, so that any other metric can be computed from them."""
    names = [Path(path).stem for path in split.images.paths]
    with atomic_write(path, "wb") as file:
        np.savez(file, scores=scores, labels=split.labels, images=names, classes=split.class_names)


def print_table(results: dict[str, Any], split: VocSplit, log: Log) -> None:
    """A line a class: positives, ignored, AP, 11-point AP; then the means."""
    width = max(map(len, ["class", *split.class_names]))
    log(f"{'class':<{width}}  positives  ignored      AP  11-point AP")
    for c, name in enumerate(split.class_names):
        labels = split.labels[:, c]
        ap, ap_11 = show(results["AP"][name]), show(results["AP_11point"][name])
        log(f"{name:<{width}}  {(labels > 0).sum():9d}  {(labels == 0).sum():7d}  {ap:>6}  {ap_11:>11}")
    log(f"{'mean':<{width}}  {'':9}  {'':7}  {show(results['mAP']):>6}  {show(results['mAP_11point']):>11}")
    without = [name for name, ap in results["AP"].items() if ap is None]
    if without:
        log(f"warning: no positive in {split.name}, left out of the means: {', '.join(without)}")


def show(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def layers_trained(args: argparse.Namespace, net: Network) -> str:
    """In words: what trains."""
    if not args.fc6_8:
        return "all layers trained, batch norm scale and shift too"
    what = "fc6-8" if list(net.parts()[1].parameters()) else "head"
    return f"{what} trained, batch norm scale and shift {'trained too' if args.train_batchnorm else 'frozen'}"


def describe(args: argparse.Namespace, net: Network, trained: VocSplit, tested: VocSplit) -> dict[str, Any]:
    """The protocol, to be printed and kept beside the numbers."""
    ties = ", 1e-5 off the positives" if args.pessimistic_ties else ""
    crops = "random" if args.eval_random_crops else "fixed (corners, centre, mirrored)"
    name = voc_protocol(args)
    return {
        "protocol": tell(name, VOC[name], vars(args)),
        "data": str(args.vocdir),
        "split": f"{trained.name} -> {tested.name}",
        "images": f"{len(trained)} -> {len(tested)}",
        "classes": len(trained.class_names),
        "model": str(args.model),
        "arch": net.arch,
        "sobel": net.sobel is not None,
        "layers": layers_trained(args, net),
        "batch norm statistics": "global",
        "crops": f"{NUM_CROPS} {crops}, logits summed",
        "image size": args.image_size,
        "train crop": args.train_crop,
        "iterations": args.nit,
        "batch": args.batch,
        "lr": f"{args.lr:g} halved every {args.stepsize}",
        "weight decay": args.wd,
        "momentum": args.momentum,
        "seed": args.seed,
        "precision": args.precision,
        "AP": f"difficult images ignored{ties}; at the last iteration",
    }


if __name__ == "__main__":
    run_main(main, ARGS)
