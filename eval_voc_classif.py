"""Pascal VOC 2007 classification: train fc6-8 (or all layers) of a network on image labels, report mAP.

    ./eval_voc_classif.sh VOCdevkit/VOC2007 exp/checkpoint.pth.tar
    python eval_voc_classif.py --vocdir VOCdevkit/VOC2007 --model exp/checkpoint.pth.tar --split trainval
    python eval_voc_classif.py ... --resume exp/voc_classif.pth.tar  go on exactly where it was stopped

Several classes may be in one image, so each class is a yes or no of its own; 'difficult' images count neither
in its loss nor in its average precision. The published figures are 72.0 and 70.4 mAP (PUBLISHED).
"""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.trunk import HEAD_STD
from sampling import DrawSampler
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import evaluation
from features import set_precision
from models import DeepClusterNet
from util import (
    AverageMeter,
    Log,
    Progress,
    UserError,
    add_device_argument,
    atomic_write,
    choose_device,
    derive_seed,
    make_folder,
    run_main,
)

SPLITS = {"train": ("train", "val"), "trainval": ("trainval", "test")}  # --split -> trained on, tested on
INIT_BIAS = 0.1  # of the head and of the re-initialised linear layers
MAX_GRAD_NORM = 10.0
NUM_CROPS = 10
# The authors' figures for their AlexNet on VOC 2007, in % mAP; the second is their erratum.
PUBLISHED = {"fc6-8, batch norm scale trained": 72.0, "fc6-8, batch norm frozen": 70.4}

CHECKPOINT, SCORES, LOG = "voc_classif.pth.tar", "voc_classif_scores.npz", "voc_classif.log"
# A resumed run is the same run: these settings must be what they were ...
FIXED_SETTINGS = ("split", "fc6_8", "train_batchnorm", "batch", "seed", "image_size")
NOTED_SETTINGS = ("lr", "stepsize", "wd", "momentum")  # ... and a change of these is written down


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval_voc_classif.py",
        description="Classification on Pascal VOC 2007, or a folder of that shape, with a network.",
        formatter_class=DefaultsFormatter,
    )
    group = parser.add_argument_group("data and network")
    group.add_argument("--vocdir", help="folder VOC2007, with ImageSets/Main and JPEGImages")
    group.add_argument(
        "--split",
        choices=list(SPLITS),
        default="train",
        help="train: test on val; trainval: test on test, as published",
    )
    group.add_argument(
        "--model", help="checkpoint of the network (ours or the authors'; Sobel is seen from it)"
    )
    group.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side of the crops")

    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--fc6_8", type=int, choices=(0, 1), default=1, help="1: train fc6-8 only; 0: train all layers"
    )
    group.add_argument(
        "--train_batchnorm",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: with --fc6_8 1, train the scale and shift of the batch norms too (the published 72.0)",
    )
    group.add_argument(
        "--eval_random_crops",
        type=int,
        choices=(0, 1),
        default=1,
        help="test on 10 random crops (1), or on the corners, the centre and their mirror images (0)",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--nit", type=int, default=80000, help="number of iterations")
    group.add_argument("--stepsize", type=int, default=5000, help="halve the lr every so many iterations")
    group.add_argument("--lr", type=float, default=0.003, help="learning rate at the start")
    group.add_argument("--wd", type=float, default=1e-6, help="weight decay (itself, not its power of ten)")
    group.add_argument("--momentum", type=float, default=0.9, help="momentum")
    group.add_argument("--batch", type=int, default=16, help="mini-batch size")
    group.add_argument("--seed", type=int, default=31, help="random seed")

    group = parser.add_argument_group("files and machine")
    group.add_argument("--exp", default="exp", help=f"folder for {CHECKPOINT}, {SCORES} and results.json")
    group.add_argument("--resume", metavar="PATH", help=f"go on from this EXP/{CHECKPOINT}")
    group.add_argument(
        "--checkpoint-every", type=int, default=5000, metavar="N", help="iterations between two checkpoints"
    )
    group.add_argument("--workers", type=int, default=4, help="number of data loading workers")
    add_device_argument(group)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train on one split, test on the other, print the table; returns what goes into EXP/results.json."""
    check_arguments(args)
    device = choose_device(args.device)
    set_precision("fp32", device)
    trained, tested = open_voc(args.vocdir, args.split)
    exp = make_folder(args.exp)
    log = Log(exp / LOG)
    if args.resume:
        saved = checkpoint.read(args.resume)
        check_same_run(saved, args, trained, log)
        net = checkpoint.build_from(saved, args.resume)
        args.model = saved["args"]["model"]  # may be left out on the command line
    else:
        refuse_to_overwrite(exp / CHECKPOINT)
        saved = None
        net = evaluation.open_network(args.model, layers=["pool"])
        renew_classifier(net, len(trained.class_names), args.seed)
    check_images([trained, tested], args.workers)
    net.to(device, memory_format=torch.channels_last)
    log(
        f"{len(trained)} images of {trained.name} -> {len(tested)} of {tested.name}, "
        f"{len(trained.class_names)} classes; {net.arch}{' with Sobel' if net.sobel is not None else ''} on "
        f"{device}, {layers_trained(args)}"
    )

    train(net, trained, args, saved, exp, log)
    scores = predict(net, tested, args, log)
    save_scores(exp / SCORES, scores, tested)
    results = average_precisions(scores, tested)
    print_table(results, tested, log)
    evaluation.report(exp, "eval_voc_classif", describe(args, net, trained, tested), results)
    return results


# ------------------------------------------------------------------------------- before any long work


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    if not args.vocdir:
        raise UserError("--vocdir is missing: give the folder VOC2007, e.g. VOCdevkit/VOC2007")
    for flag, smallest in (
        ("nit", 1), ("stepsize", 1), ("batch", 1), ("checkpoint-every", 1), ("workers", 0), ("seed", 0),
        ("image-size", 16),
    ):  # fmt: skip
        value = getattr(args, flag.replace("-", "_"))
        if value < smallest:
            raise UserError(f"--{flag} {value}: must be at least {smallest}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise UserError(f"--lr {args.lr}: must be a positive number (published: 0.003)")
    if not (math.isfinite(args.wd) and args.wd >= 0):
        raise UserError(f"--wd {args.wd}: must be a number >= 0, here not a power of ten (published: 1e-6)")
    if not 0 <= args.momentum < 1:
        raise UserError(f"--momentum {args.momentum}: must be in [0, 1) (published: 0.9)")


def refuse_to_overwrite(path: Path) -> None:
    """UserError where a run that was not finished would be lost."""
    if not path.exists():
        return
    old = checkpoint.read(path)
    done, nit = old.get("iteration", 0), old.get("args", {}).get("nit", 0)
    if done < nit:
        raise UserError(
            f"{path}: an unfinished run, {done} of {nit} iterations; go on with --resume {path}, remove "
            "it, or choose another --exp"
        )


def check_same_run(saved: dict[str, Any], args: argparse.Namespace, trained: "VocSplit", log: Log) -> None:
    """A checkpoint goes on only with the settings, network and images it was made with; says which differ."""
    missing = [name for name in ("iteration", "optimizer", "args", "data") if name not in saved]
    if missing:
        raise UserError(
            f"--resume {args.resume}: holds no {missing[0]}, so it is not a {CHECKPOINT} of this program; to "
            "evaluate the network in it use --model"
        )
    was = saved["args"]
    for name in FIXED_SETTINGS:
        if was[name] != getattr(args, name):
            raise UserError(
                f"--resume {args.resume}: was run with {name} {was[name]}, not {getattr(args, name)}"
            )
    if args.model and os.path.realpath(args.model) != was["model"]:
        raise UserError(f"--resume {args.resume}: was run with --model {was['model']}, not {args.model}")
    if saved["data"] != trained.digest():
        raise UserError(
            f"--resume {args.resume}: was run on other images or labels than {args.vocdir} has now"
        )
    if saved["iteration"] > args.nit:
        raise UserError(
            f"--resume {args.resume}: has {saved['iteration']} iterations, more than --nit {args.nit}"
        )
    for name in NOTED_SETTINGS:
        if was[name] != getattr(args, name):
            log(f"note: {name} was {was[name]} and is {getattr(args, name)} from here on")


# ------------------------------------------------------------------------------- the data set


@dataclass
class VocSplit:
    """The images of one split in the order of its lists, with labels (N, C) int8: 1 yes, -1 no, 0 ignored."""

    name: str
    images: data.ImageList
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Hex digest of file names, class names and labels."""
        text = "\n".join([self.images.digest(), *self.class_names])
        return hashlib.sha256(text.encode() + self.labels.tobytes()).hexdigest()


def open_voc(vocdir: str | Path, split: str) -> tuple[VocSplit, VocSplit]:
    """The split to train on and the one to test on, with the same classes in the same (sorted) order.

    The classes are those with a list ImageSets/Main/<class>_<split>.txt. Raises UserError for a missing
    folder or list, a list that is empty or wrong, and images that are listed but absent.
    """
    vocdir = Path(vocdir)
    lists = vocdir / "ImageSets" / "Main"
    for folder in (lists, vocdir / "JPEGImages"):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing (expected VOC2007/ImageSets/Main and VOC2007/JPEGImages)")
    names = SPLITS[split]
    found = [
        {path.name.removesuffix(f"_{name}.txt") for path in lists.glob(f"*_{name}.txt")} for name in names
    ]
    class_names = sorted(set.union(*found))
    if not class_names:
        raise UserError(f"{lists}: no list of a class there (expected files such as cat_{names[0]}.txt)")
    for name, classes in zip(names, found):
        for class_name in class_names:
            if class_name not in classes:
                raise UserError(f"{lists / f'{class_name}_{name}.txt'} is missing (--split {split} needs it)")
    trained, tested = (open_split(vocdir, name, class_names) for name in names)
    return trained, tested


def open_split(vocdir: Path, name: str, class_names: list[str]) -> VocSplit:
    """Images and labels of the lists <class>_<name>.txt, which must all name the same images."""
    first: dict[str, int] = {}
    columns = []
    for class_name in class_names:
        path = vocdir / "ImageSets" / "Main" / f"{class_name}_{name}.txt"
        labels = read_list(path)
        first = first or labels
        odd = sorted(set(first) ^ set(labels))
        if odd:
            pair = (path.name, f"{class_names[0]}_{name}.txt")
            lists, lacks = pair if odd[0] in labels else pair[::-1]
            raise UserError(
                f"{path.parent}: {lists} lists {odd[0]} and {lacks} does not; both need the same images"
            )
        columns.append([labels[image] for image in first])
    images = data.ImageList(vocdir / "JPEGImages", [f"{image}.jpg" for image in first])
    absent = [i for i in range(len(images)) if not images.path(i).is_file()]
    if absent:
        raise UserError(
            f"{images.path(absent[0])} does not exist but is listed in {class_names[0]}_{name}.txt "
            f"({len(absent)} of {len(images)} images of {name} are absent)"
        )
    return VocSplit(name, images, np.array(columns, dtype=np.int8).T.copy(), class_names)


def read_list(path: Path) -> dict[str, int]:
    """Image name -> 1, -1 or 0 from a list of lines `000012 -1`, in its order; UserError if it is not one."""
    labels: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read") from error
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in ("1", "-1", "0", "+1"):
            raise UserError(f"{path} line {number}: {line.strip()!r} is not an image name and 1, -1 or 0")
        if fields[0] in labels:
            raise UserError(f"{path} line {number}: {fields[0]} is listed twice")
        labels[fields[0]] = int(fields[1])
    if not labels:
        raise UserError(f"{path} lists no image (expected a line `<image name> <1, -1 or 0>` for each)")
    return labels


def check_images(splits: list[VocSplit], workers: int) -> None:
    """Decode every image once: better a list of the broken ones now than one of them hours later."""
    for split in splits:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            reasons = list(pool.map(partial(data.broken_reason, split.images), range(len(split))))
        broken = [f"{split.images.path(i)}: {reason}" for i, reason in enumerate(reasons) if reason]
        if broken:
            more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
            raise UserError(
                f"{len(broken)} of {len(split)} images of {split.name} cannot be decoded "
                f"({'; '.join(broken[:10])}{more}); fetch them again"
            )


# ------------------------------------------------------------------------------- the network


def renew_classifier(net: DeepClusterNet, num_classes: int, seed: int) -> None:
    """A fresh head 4096 -> num_classes and fresh linear layers: weights N(0, 0.01), bias 0.1."""
    net.set_head(num_classes, derive_seed(seed, "voc head"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "voc classifier"))
    with torch.no_grad():
        for layer in net.classifier:
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, HEAD_STD, generator=generator)
                layer.bias.fill_(INIT_BIAS)
        net.top_layer.bias.fill_(INIT_BIAS)


def freeze(net: DeepClusterNet, fc6_8: bool, train_batchnorm: bool) -> None:
    """Set what trains: fc6_8 leaves out the convolutions, and the batch norms unless train_batchnorm."""
    net.features.requires_grad_(not fc6_8)
    for layer in net.features:
        if isinstance(layer, nn.BatchNorm2d) and train_batchnorm:
            layer.requires_grad_(True)


def train_mode(net: DeepClusterNet) -> None:
    """Dropout on, but the batch norms of the feature part use, and leave alone, their global statistics."""
    net.train()
    net.features.eval()


# ------------------------------------------------------------------------------- training


def train(
    net: DeepClusterNet,
    split: VocSplit,
    args: argparse.Namespace,
    saved: dict[str, Any] | None,
    exp: Path,
    log: Log,
) -> None:
    """Train up to args.nit iterations from the start, or from `saved` on; checkpoints go into exp."""
    freeze(net, bool(args.fc6_8), bool(args.train_batchnorm))
    train_mode(net)
    optimizer = make_optimizer(net, args, saved)
    first = 0 if saved is None else saved["iteration"]
    if saved is not None:
        log(f"resuming {args.resume} after {first} of {args.nit} iterations")
    device = next(net.parameters()).device
    progress, meter = Progress(args.nit - first, "voc training", unit="it", log=log), AverageMeter()
    for iteration, images, labels in batches(split, args, first, pin_memory=device.type == "cuda"):
        lr = set_learning_rate(optimizer, args.lr, iteration, args.stepsize)
        torch.manual_seed(derive_seed(args.seed, "voc step", iteration))  # of dropout
        loss = train_step(net, optimizer, to_input(images, device), labels.to(device), iteration)
        meter.update(loss, len(labels))
        progress.update(1, f"loss {meter.avg:.4f}")
        done = iteration + 1
        if done % args.checkpoint_every == 0 or done == args.nit:
            save_run(exp / CHECKPOINT, net, optimizer, split, args, done)
            log(f"iteration {done}/{args.nit}  mean loss {meter.avg:.4f}  lr {lr:g}")
            meter = AverageMeter()
    progress.close()


def make_optimizer(
    net: DeepClusterNet, args: argparse.Namespace, saved: dict[str, Any] | None
) -> torch.optim.SGD:
    """SGD over what trains, with the momentum of a saved run; lr, wd and momentum are the command line's."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.wd, fused=True
    )
    if saved is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    return optimizer


def save_run(
    path: Path,
    net: DeepClusterNet,
    optimizer: torch.optim.Optimizer,
    split: VocSplit,
    args: argparse.Namespace,
    iteration: int,
) -> None:
    """Everything from which the run goes on exactly after `iteration` iterations, also a file for --model."""
    checkpoint.save(
        path,
        {
            "iteration": iteration,
            "arch": net.arch,
            "state_dict": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": vars(args) | {"model": os.path.realpath(args.model)},
            "data": split.digest(),
            "class_names": split.class_names,
        },
    )


def batches(
    split: VocSplit, args: argparse.Namespace, first: int, pin_memory: bool = False
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(iteration, uint8 crops (B, 3, S, S), labels (B, C) int8) from iteration `first` to args.nit.

    An epoch visits every image once in an order of its own; its last batch may be short. Order and crops
    depend on (seed, epoch, position) alone, so that any iteration can be the first one.
    """
    labels = torch.from_numpy(split.labels)
    per_epoch = math.ceil(len(split) / args.batch)
    crop = data.voc_train_crop(args.image_size)
    iteration = first
    while iteration < args.nit:
        epoch, step = divmod(iteration, per_epoch)
        order = epoch_order(len(split), args.seed, epoch)[: (args.nit - epoch * per_epoch) * args.batch]
        loader = data.make_loader(
            data.TrainView(split.images, args.image_size, args.seed, epoch, transform=crop),
            args.batch,
            args.workers,
            sampler=DrawSampler(order, first=step * args.batch),
            pin_memory=pin_memory,
        )
        for images, index in loader:
            yield iteration, images, labels[index]
            iteration += 1


def epoch_order(number: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of the images for each epoch: (number,) int64, every index once."""
    return np.random.default_rng(derive_seed(seed, "voc order", epoch)).permutation(number)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, iteration: int, stepsize: int) -> float:
    """lr, halved after every `stepsize` iterations; sets and returns it."""
    lr = lr * 0.5 ** (iteration // stepsize)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def train_step(
    net: DeepClusterNet,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    labels: torch.Tensor,
    iteration: int,
) -> float:
    """One SGD step on normalised images x (B, 3, S, S) and labels (B, C) of 1, -1, 0; returns the loss.

    Raises UserError, before anything is changed, where the loss or its gradient is not finite.
    """
    loss = voc_loss(net(x), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], MAX_GRAD_NORM)
    value, size = loss.item(), norm.item()
    if not (math.isfinite(value) and math.isfinite(size)):
        raise UserError(
            f"the loss is {value} and the norm of its gradient {size} at iteration {iteration}; start again "
            "with a lower --lr, or go on with one from the last checkpoint by --resume"
        )
    optimizer.step()
    return value


def to_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (B, 3, S, S) -> normalised float32 on the device, channels last."""
    x = data.normalise(images.to(device, non_blocking=True))
    return x.contiguous(memory_format=torch.channels_last)


def voc_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits (B, C), summed over the classes, mean over the images.

    labels (B, C): 1 present, -1 absent, 0 ignored, which adds nothing to loss and gradient.
    """
    present, counts = (labels > 0).to(logits.dtype), (labels != 0).to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, present, weight=counts, reduction="sum")
    return total / len(labels)


# ------------------------------------------------------------------------------- evaluation


def random_crops(size: int) -> data.Transform:
    """Ten random crops as in training: (10, 3, size, size)."""
    return partial(_crop_repeatedly, crop=data.voc_train_crop(size))


def _crop_repeatedly(image: torch.Tensor, crop: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.stack([crop(image) for _ in range(NUM_CROPS)])


@torch.inference_mode()
def predict(net: DeepClusterNet, split: VocSplit, args: argparse.Namespace, log: Log) -> np.ndarray:
    """Scores (N, C) float32: the logits summed over ten crops. Random crops depend on (seed, image) alone."""
    net.eval()
    device = next(net.parameters()).device
    crops = random_crops if args.eval_random_crops else data.ten_crops
    seed = derive_seed(args.seed, "voc evaluation")
    view = data.TrainView(split.images, args.image_size, seed, epoch=0, transform=crops(args.image_size))
    loader = data.make_loader(
        view,
        args.batch,
        args.workers,
        sampler=DrawSampler(np.arange(len(split))),
        pin_memory=device.type == "cuda",
    )
    scores = np.zeros((len(split), len(split.class_names)), dtype=np.float32)
    progress = Progress(len(split), f"voc test on {split.name}", log=log)
    for images, index in loader:  # images (B, 10, 3, S, S)
        logits = net(to_input(images.flatten(0, 1), device))
        scores[index.numpy()] = logits.unflatten(0, (len(index), NUM_CROPS)).sum(1).cpu().numpy()
        progress.update(len(index))
    progress.close()
    if not np.isfinite(scores).all():
        raise UserError("the network gives scores that are not finite; train again with a lower --lr")
    return scores


def average_precisions(scores: np.ndarray, split: VocSplit) -> dict[str, Any]:
    """AP of each class over the images that are not ignored, and the means, in percent.

    A class without any positive has no AP (None) and is left out of the means.
    """
    ap: dict[str, float | None] = {}
    ap_11: dict[str, float | None] = {}
    for c, name in enumerate(split.class_names):
        counts = split.labels[:, c] != 0
        present, score = split.labels[counts, c] > 0, scores[counts, c]
        defined = present.any()
        ap[name] = 100 * float(average_precision_score(present, score)) if defined else None
        ap_11[name] = 100 * eleven_point(present, score) if defined else None
    return {
        "unit": "percent",
        "mAP": mean(ap),
        "mAP_11point": mean(ap_11),
        "AP": ap,
        "AP_11point": ap_11,
        "published": {"what": "mAP, DeepCluster AlexNet, VOC 2007", **PUBLISHED},
    }


def mean(values: dict[str, float | None]) -> float | None:
    """Mean of the values that are there; None where there is none."""
    there = [value for value in values.values() if value is not None]
    return float(np.mean(there)) if there else None


def eleven_point(present: np.ndarray, scores: np.ndarray) -> float:
    """The VOC 2007 challenge's metric: mean over recalls 0, 0.1 ... 1 of the best precision from there on.

    present (N,) bool with at least one True, scores (N,); equal scores rank in the order given.
    Everingham et al., 'The PASCAL Visual Object Classes (VOC) Challenge', 2010, section 3.4.1.
    """
    hits = np.cumsum(present[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    # In whole numbers, hits * 10 >= tenths * positives: 3 of 10 positives is a recall of 0.3 and not less.
    return float(np.mean([precision[hits * 10 >= tenths * hits[-1]].max() for tenths in range(11)]))


# ------------------------------------------------------------------------------- what comes out


def save_scores(path: Path, scores: np.ndarray, split: VocSplit) -> None:
    """Scores and labels of every test image, so that any other metric can be computed from them."""
    names = [Path(path).stem for path in split.images.paths]
    with atomic_write(path, "wb") as file:
        np.savez(file, scores=scores, labels=split.labels, images=names, classes=split.class_names)


def print_table(results: dict[str, Any], split: VocSplit, log: Log) -> None:
    """A line a class: positives, AP, 11-point AP; then the means beside the published ones."""
    width = max(len("published: "), *map(len, split.class_names))
    log(f"{'class':<{width}}  positives  ignored      AP  11-point AP")
    for c, name in enumerate(split.class_names):
        labels = split.labels[:, c]
        ap, ap_11 = show(results["AP"][name]), show(results["AP_11point"][name])
        log(f"{name:<{width}}  {(labels > 0).sum():9d}  {(labels == 0).sum():7d}  {ap:>6}  {ap_11:>11}")
    log(f"{'mean':<{width}}  {'':9}  {'':7}  {show(results['mAP']):>6}  {show(results['mAP_11point']):>11}")
    without = [name for name, ap in results["AP"].items() if ap is None]
    if without:
        log(f"warning: no positive in {split.name}, left out of the means: {', '.join(without)}")
    for setting, value in PUBLISHED.items():
        log(f"published, not measured here: {value:.1f} mAP (DeepCluster AlexNet, VOC 2007, {setting})")


def show(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def layers_trained(args: argparse.Namespace) -> str:
    """In words: what trains."""
    if not args.fc6_8:
        return "all layers trained, batch norm scale and shift too"
    return "fc6-8 trained, batch norm scale and shift " + (
        "trained too" if args.train_batchnorm else "frozen"
    )


def describe(
    args: argparse.Namespace, net: DeepClusterNet, trained: VocSplit, tested: VocSplit
) -> dict[str, Any]:
    """The protocol, to be printed and kept beside the numbers."""
    crops = "random" if args.eval_random_crops else "fixed (corners, centre, mirrored)"
    return {
        "data": str(args.vocdir),
        "split": f"{trained.name} -> {tested.name}",
        "images": f"{len(trained)} -> {len(tested)}",
        "classes": len(trained.class_names),
        "model": str(args.model),
        "arch": net.arch,
        "sobel": net.sobel is not None,
        "layers": layers_trained(args),
        "batch norm statistics": "global",
        "crops": f"{NUM_CROPS} {crops}, logits summed",
        "image size": args.image_size,
        "iterations": args.nit,
        "batch": args.batch,
        "lr": f"{args.lr:g} halved every {args.stepsize}",
        "weight decay": args.wd,
        "momentum": args.momentum,
        "seed": args.seed,
        "AP": "difficult images ignored; at the last iteration",
    }


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
