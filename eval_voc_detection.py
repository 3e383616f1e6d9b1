"""Detection on Pascal VOC 2007, or a folder of that shape: Faster R-CNN on the network, report AP.

python eval_voc_detection.py --vocdir VOCdevkit/VOC2007 --model exp/checkpoint.pth.tar --exp exp/detection
python eval_voc_detection.py ... --freeze         the paper's FC6-8: what all regions share is not trained
python eval_voc_detection.py ... --resume auto    the same command goes on exactly where it was stopped
torchrun --nproc-per-node 8 eval_voc_detection.py ...    on 8 GPUs, --batch shared among them

The detector and its training are torchvision's reference: image sizes, anchors, SGD, drops of the rate. The
published figures are of another detector and recipe: compare networks with each other here, not with them.
"""

import argparse

from commandline import Parser, add_machine, add_run, at_least
from evaluation.flags import add_transfer, add_transfer_training, add_voc_split


def get_parser() -> Parser:
    """The flags of eval_voc_detection.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_protocol(parser.add_argument_group("data, network and protocol"))
    add_optimisation(parser.add_argument_group("training"))
    add_run(parser.add_argument_group("files"))
    add_machine(parser.add_argument_group("machine"))
    return parser


def add_protocol(group: argparse._ArgumentGroup) -> None:
    add_transfer(group, "ImageSets/Main, JPEGImages and Annotations, such as VOC2007")
    add_voc_split(group, "trainval")
    group.add_argument(
        "--head",
        choices=("fpn", "c4", "fc"),
        help="fpn: a feature pyramid on a ResNet; c4: layer4 of a ResNet on regions of layer3; fc: fc6-7 of "
        "AlexNet and VGG-16 on regions of the last map (default: fpn for ResNets, else fc)",
    )
    group.add_argument(
        "--image-size",
        type=at_least(16),
        default=800,
        metavar="PIXELS",
        help="the shorter side of images; larger finds smaller objects and costs more",
    )
    group.add_argument(
        "--max-size",
        type=at_least(16),
        default=1333,
        metavar="PIXELS",
        help="the longer side at most; lower it where memory is short",
    )


def add_optimisation(group: argparse._ArgumentGroup) -> None:
    add_transfer_training(group, epochs=26, batch=16, lr=0.02)
    group.add_argument(
        "--lr-steps",
        type=at_least(1),
        nargs="*",
        default=[16, 22],
        metavar="EPOCH",
        help="the learning rate falls to a tenth after so many epochs",
    )
    group.add_argument(
        "--warmup",
        type=at_least(0),
        default=1000,
        metavar="N",
        help="iterations over which the learning rate rises to --lr; more where the loss is nan early",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
from data import PlainView, RandomView, fitted, make_loader, mirrored, to_input, whole_image
from data.sampling import ShareSampler, shuffled
from evaluation.detection import Detections, average_precisions
from evaluation.detector import Boxes, Detector, usual_head
from evaluation.objects import ObjectSplit, check, open_objects
from evaluation.results import read, report
from evaluation.transfer import colours_of, what_trains
from features import Pass
from models.weights import load
from training.optim import in_steps, sgd
from training.run import Run
from util import Log, Progress, UserError, atomic_write, derive_seed, run_main, set_precision

METHOD = "voc_detection"
CHECKPOINT, FOUND, LOG = f"{METHOD}.pth.tar", f"{METHOD}_found.npz", f"{METHOD}.log"
FIXED = (
    "split", "model", "head", "freeze", "batch", "seed", "image_size", "max_size", "lr_steps", "warmup",
)  # fmt: skip


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train on one split, test on the other, print the table; returns what goes into EXP/results.json."""
    if args.max_size < args.image_size:
        raise UserError(f"--max-size {args.max_size}: is below --image-size {args.image_size}")
    trained, tested = open_objects(args.vocdir, args.split)
    net = load(args.model, seed=args.seed)
    args.head = args.head or usual_head(net)
    seed = derive_seed(args.seed, "detector")
    detector = Detector(net, args.head, len(trained.class_names), args.freeze, seed)
    with Run(args, METHOD, FIXED, own_files=True) as run:
        read(run.exp)
        for split in (trained, tested):
            check(split, args.workers)
        run.inputs, detector = net.inputs, run.network(detector)
        protocol = describe(args, detector, trained, tested)
        run.log(
            f"{len(trained)} images of {trained.name} -> {len(tested)} of {tested.name}, "
            f"{len(trained.class_names)} classes; {net}, head {args.head}, on {run.device}, "
            f"{protocol['layers']}"
        )
        train(run, detector, trained)
        size = (args.image_size, args.max_size)
        how = Pass(1, args.workers, run.device, args.precision)
        found = detect(detector, tested, size, how, (net.inputs.mean, net.inputs.std), run.log)
        results = average_precisions(found, tested)
        print_table(results, tested, run.log)
        if run.is_main:
            save_found(run.exp / FOUND, found, tested)
            report(run.exp, f"eval_{METHOD}", protocol | {"epochs": run.epoch}, results)
        return results


# ---------------------------------------------------------------------------------------- training


def train(run: Run, detector: Detector, split: ObjectSplit) -> None:
    """Train up to --epochs, from where the run stands: all images of an epoch once, each flipped or not."""
    args = run.args
    optimizer = sgd(detector.parameters(), args.lr, args.momentum, args.wd)
    run.keep(data=split, detector=detector, optimizer=optimizer)
    each = ShareSampler(np.arange(len(split)), args.batch).steps  # iterations of an epoch
    schedule = in_steps(args.lr, [epoch * each for epoch in args.lr_steps], args.warmup)
    view = RandomView(split.images, whole_image(args.image_size, args.max_size), then=mirrored)
    step_loss = partial(loss, split, (args.image_size, args.max_size))
    for epoch in run.epochs(args.epochs):
        order = shuffled(len(split), run.seed("detection order", epoch))
        flips = np.random.default_rng(run.seed("detection flips", epoch)).integers(0, 2, len(split))
        draws = np.stack([order, flips[order]], 1)
        run.train_pass(detector, [optimizer], view, draws, step_loss, schedule=schedule)
        run.finish_epoch()


def loss(
    split: ObjectSplit,
    size: tuple[int, int],
    detector: torch.nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    flip: torch.Tensor,
) -> torch.Tensor:
    """The detector's losses of the images index (B,), flipped where flip (B,) is 1, summed over the images.

    x (B, 3, H, W), images resized to `size`, shorter and longer side. Difficult objects are left out.
    """
    sizes = [fitted(*split.sizes[i], *size) for i in index]
    targets = [target(split, int(i), to, bool(f), x.device) for i, to, f in zip(index, sizes, flip)]
    return sum(detector(x, sizes, targets).values()) * len(index)


def target(split: ObjectSplit, i: int, size: tuple[int, int], flip: bool, device: torch.device) -> Boxes:
    """What the detector is to find in image i, resized to `size` and maybe flipped."""
    objects = split.objects[i]
    boxes = torch.from_numpy(objects.boxes[~objects.difficult] * scale_of(split, i, size))
    if flip:
        boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
    labels = torch.from_numpy(objects.labels[~objects.difficult] + 1)  # 0 is the background
    return {"boxes": boxes.to(device), "labels": labels.to(device)}


def scale_of(split: ObjectSplit, i: int, size: tuple[int, int]) -> np.ndarray:
    """By what the boxes (x1, y1, x2, y2) of image i are multiplied when it is resized: (4,) float32."""
    height, width = np.array(size) / split.sizes[i]
    return np.array([width, height, width, height], np.float32)


# ---------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def detect(
    detector: Detector,
    split: ObjectSplit,
    size: tuple[int, int],
    how: Pass,
    colours: tuple[Sequence[float], Sequence[float]],
    log: Log,
) -> Detections:
    """What the detector finds in all images of the split, on every rank, which each look at a part of them.

    how: one image at a time, so that what is found in it depends on no other one. colours: mean and std.
    Boxes are in the pixels of the image as it is.
    """
    device = how.device
    detector.eval()
    rows = distributed.share_of(len(split))
    loader = make_loader(
        PlainView(split.images, whole_image(*size)), how.batch, how.workers, device, sampler=rows
    )
    progress, parts = Progress(len(rows), f"detection on {split.name}", log=log), []
    for batch in loader:
        if batch.broken:
            raise UserError(f"{split.images.path(batch.broken[0])}: was readable before and is no longer")
        i, to = int(batch.index), batch.views.shape[-2:]
        with set_precision(how.precision, device):
            (found,) = detector(to_input(batch.views, device, *colours), [tuple(to)])
        found = {name: value.cpu().numpy() for name, value in found.items()}
        if not np.isfinite(found["boxes"]).all():
            raise UserError("the detector gives boxes that are not finite; train again with a lower --lr")
        boxes = found["boxes"] / scale_of(split, i, tuple(to))
        where = np.full(len(boxes), i)
        parts.append(Detections(where, found["labels"] - 1, found["scores"], boxes))
        progress.update()
    progress.close()
    return Detections.joined([part for all_of in distributed.gather_objects(parts) for part in all_of])


# ---------------------------------------------------------------------------------------- what comes out


def save_found(path: Path, found: Detections, split: ObjectSplit) -> None:
    """Every detection, so that any other metric can be computed: number of its image, class, score, box."""
    names = [Path(path).stem for path in split.images.paths]
    with atomic_write(path, "wb") as file:
        np.savez(file, **found._asdict(), images=names, classes=split.class_names)


def print_table(results: dict[str, Any], split: ObjectSplit, log: Log) -> None:
    """A line a class: objects, AP50, the same by 11 points, AP75, AP; then the means."""
    metrics = list(results["by class"])
    width = max(map(len, ["class", *split.class_names]))
    log(f"{'class':<{width}}  objects  " + "  ".join(f"{metric:>12}" for metric in metrics))
    for label, name in enumerate(split.class_names):
        number = sum(int(((o.labels == label) & ~o.difficult).sum()) for o in split.objects)
        values = "  ".join(f"{show(results['by class'][metric][name]):>12}" for metric in metrics)
        log(f"{name:<{width}}  {number:7d}  {values}")
    log(f"{'mean':<{width}}  {'':7}  " + "  ".join(f"{show(results[metric]):>12}" for metric in metrics))
    without = [name for name, ap in results["by class"]["AP50"].items() if ap is None]
    if without:
        log(f"warning: no object in {split.name}, left out of the means: {', '.join(without)}")


def show(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def describe(
    args: argparse.Namespace, detector: Detector, trained: ObjectSplit, tested: ObjectSplit
) -> dict[str, Any]:
    """The protocol, to be printed and kept beside the numbers."""
    box_head = {"fpn": "pyramid and new heads", "c4": "layer4 and new heads", "fc": "fc6-7 and new heads"}
    return {
        "data": str(args.vocdir),
        "split": f"{trained.name} -> {tested.name}",
        "images": f"{len(trained)} -> {len(tested)}",
        "classes": len(trained.class_names),
        "model": str(args.model),
        "arch": detector.net.arch,
        "sobel": detector.net.sobel is not None,
        "detector": f"Faster R-CNN, head {args.head}",
        "layers": what_trains(args.freeze, box_head[args.head]),
        "batch norm statistics": "of the pre-training",
        "mean, std": colours_of(detector.net),
        "image size": f"{args.image_size}, at most {args.max_size}",
        "augmentation": "flips",
        "batch": args.batch,
        "lr": f"{args.lr:g}, a tenth after epochs {args.lr_steps}, {args.warmup} iterations of warm-up",
        "weight decay": args.wd,
        "momentum": args.momentum,
        "seed": args.seed,
        "precision": args.precision,
        "processes": distributed.world_size(),
        "AP": "VOC's rules: difficult objects left out of training and test; at the last epoch; percent",
    }


if __name__ == "__main__":
    run_main(main, ARGS)
