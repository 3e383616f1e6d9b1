"""Semantic segmentation on Pascal VOC 2012, or a folder of that shape: FCN on the network, report mean IoU.

python eval_voc_segmentation.py --vocdir VOCdevkit/VOC2012 --model exp/checkpoint.pth.tar --exp exp/masks
python eval_voc_segmentation.py ... --freeze         the network is frozen, the head alone trains
python eval_voc_segmentation.py ... --resume auto    the same command goes on exactly where it was stopped
torchrun --nproc-per-node 8 eval_voc_segmentation.py ...    on 8 GPUs, --batch shared among them

Trained on train, tested on val, 21 classes with the background. Head, crops and training are torchvision's
reference. The published figures are of another FCN: compare networks with each other here, not with them.
"""

import argparse

from commandline import Parser, add_machine, add_run, at_least
from evaluation.flags import add_transfer, add_transfer_training


def get_parser() -> Parser:
    """The flags of eval_voc_segmentation.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data, network and protocol")
    add_transfer(group, "ImageSets/Segmentation, JPEGImages and SegmentationClass, such as VOC2012")
    group.add_argument(
        "--image-size",
        type=at_least(16),
        default=480,
        metavar="PIXELS",
        help="side of the training crops; whole images are tested with a shorter side of 520/480 of it. "
        "Smaller is faster and loses thin objects",
    )
    add_transfer_training(parser.add_argument_group("training"), epochs=30, batch=8, lr=0.01)
    add_run(parser.add_argument_group("files"))
    add_machine(parser.add_argument_group("machine"))
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from typing import Any

import numpy as np
import torch

import distributed
from data import (
    PlainView,
    RandomView,
    colours_and_mask,
    make_loader,
    masked_crop,
    segmentation_side,
    to_input,
)
from data.sampling import ShareSampler, shuffled
from evaluation.results import read, report
from evaluation.segmentation import (
    CLASSES,
    MaskedImages,
    Segmenter,
    count_pixels,
    mean_iou,
    open_masks,
    segmentation_loss,
)
from evaluation.transfer import colours_of, what_trains
from evaluation.voc import decoded_sizes
from features import Pass
from models.weights import load
from training.optim import polynomial, sgd
from training.run import Run
from util import Log, Progress, UserError, derive_seed, run_main, set_precision

METHOD = "voc_segmentation"
CHECKPOINT, LOG = f"{METHOD}.pth.tar", f"{METHOD}.log"
FIXED = ("model", "freeze", "batch", "seed", "image_size")
LONGEST = 16  # an image's longer side by its shorter one, beyond which it is made smaller


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train on train, test on val, print the table; returns what goes into EXP/results.json."""
    trained, tested = open_masks(args.vocdir)
    net = load(args.model, seed=args.seed)
    segmenter = Segmenter(net, args.freeze, derive_seed(args.seed, "segmenter"))
    with Run(args, METHOD, FIXED, own_files=True) as run:
        read(run.exp)
        for images in (trained, tested):
            decoded_sizes(images, images.split, args.workers)
        run.inputs, segmenter = net.inputs, run.network(segmenter, sync_bn=True)
        protocol = describe(args, segmenter, trained, tested)
        run.log(
            f"{len(trained)} images of train -> {len(tested)} of val, {len(CLASSES)} classes; {net} on "
            f"{run.device}, {protocol['layers']}"
        )
        train(run, segmenter, trained)
        side = segmentation_side(args.image_size)
        how = Pass(1, args.workers, run.device, args.precision)
        pixels = test(segmenter, tested, side, how, run.log)
        results = mean_iou(pixels)
        print_table(results, pixels, run.log)
        if run.is_main:
            report(run.exp, f"eval_{METHOD}", protocol | {"epochs": run.epoch}, results)
        return results


def train(run: Run, segmenter: Segmenter, images: MaskedImages) -> None:
    """Train up to --epochs, from where the run stands: a crop of every image in an epoch."""
    args = run.args
    optimizer = sgd(segmenter.parameters(), args.lr, args.momentum, args.wd)
    run.keep(images=images, segmenter=segmenter, optimizer=optimizer)
    each = ShareSampler(np.arange(len(images)), args.batch).steps  # iterations of an epoch
    schedule = polynomial(args.lr, args.epochs * each)
    view = RandomView(images, masked_crop(args.image_size))
    for epoch in run.epochs(args.epochs):
        order = shuffled(len(images), run.seed("segmentation order", epoch))
        run.train_pass(segmenter, [optimizer], view, order, loss, schedule=schedule)
        run.finish_epoch()


def loss(segmenter: torch.nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Summed over the images of x (B, 4, S, S): colours, normalised, and the mask."""
    return segmentation_loss(segmenter(x[:, :3], tuple(x.shape[-2:])), x[:, 3].long())


@torch.inference_mode()
def test(segmenter: Segmenter, images: MaskedImages, side: int, how: Pass, log: Log) -> torch.Tensor:
    """The pixels of all images by class and by what they were taken for, as count_pixels; on every rank.

    Whole images with a shorter side of `side`, one at a time; logits are brought to the image's own size.
    """
    device, inputs = how.device, segmenter.net.inputs
    segmenter.eval()
    rows = distributed.share_of(len(images))
    view = PlainView(images, colours_and_mask(side, LONGEST * side))
    loader = make_loader(view, how.batch, how.workers, device, sampler=rows)
    progress = Progress(len(rows), "segmentation of val", log=log)
    pixels = torch.zeros((len(CLASSES), len(CLASSES)), dtype=torch.int64)
    for batch in loader:
        if batch.broken:
            raise UserError(f"{images.path(batch.broken[0])}: was readable before and is no longer")
        colours, ((mask,),) = batch.views
        with set_precision(how.precision, device):
            logits = segmenter(to_input(colours, device, inputs.mean, inputs.std), tuple(mask.shape))
        if not torch.isfinite(logits).all():
            raise UserError("the network gives scores that are not finite; train again with a lower --lr")
        pixels += count_pixels(logits[0].argmax(0).cpu(), mask)
        progress.update()
    progress.close()
    return distributed.all_reduce(pixels)


# ---------------------------------------------------------------------------------------- what comes out


def print_table(results: dict[str, Any], pixels: torch.Tensor, log: Log) -> None:
    """A line a class: its pixels in the masks, IoU; then the mean."""
    width = max(map(len, CLASSES))
    log(f"{'class':<{width}}      pixels     IoU")
    for name, number in zip(CLASSES, pixels.sum(1).tolist()):
        log(f"{name:<{width}}  {number:10d}  {show(results['IoU'][name]):>6}")
    log(f"{'mean':<{width}}  {'':10}  {show(results['mIoU']):>6}")
    log(f"pixel accuracy {show(results['pixel accuracy'])}")
    without = [name for name, iou in results["IoU"].items() if iou is None]
    if without:
        log(f"warning: no pixel in val, left out of the mean: {', '.join(without)}")


def show(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def describe(
    args: argparse.Namespace, segmenter: Segmenter, trained: MaskedImages, tested: MaskedImages
) -> dict[str, Any]:
    """The protocol, to be printed and kept beside the numbers."""
    side = segmentation_side(args.image_size)
    return {
        "data": str(args.vocdir),
        "split": "train -> val",
        "images": f"{len(trained)} -> {len(tested)}",
        "classes": f"{len(CLASSES)} with the background",
        "model": str(args.model),
        "arch": segmenter.net.arch,
        "sobel": segmenter.net.sobel is not None,
        "head": f"FCN on {segmenter.net.maps[-1]}, stride {segmenter.trunk.strides[0]}",
        "layers": what_trains(args.freeze, "head"),
        "batch norm statistics": "of the pre-training; the head's own by the batch",
        "mean, std": colours_of(segmenter.net),
        "crops": f"{args.image_size} of images of 0.5 to 2 times {side}, flips; test: whole images of {side}",
        "batch": args.batch,
        "lr": f"{args.lr:g} * (1 - share of the steps done)**0.9",
        "weight decay": args.wd,
        "momentum": args.momentum,
        "seed": args.seed,
        "precision": args.precision,
        "mIoU": "at the size of the image, void left out, over all pixels; at the last epoch; percent",
    }


if __name__ == "__main__":
    run_main(main, ARGS)
