"""Gradient ascent visualisation: what does a filter look for?

    python visu/gradient_ascent.py --model exp/checkpoint.pth.tar --conv 5 --exp exp/ascent
    python visu/gradient_ascent.py --model exp/checkpoint.pth.tar --conv 1 --filters 0 5 17 --exp exp/ascent
    python visu/gradient_ascent.py --model resnet.pth.tar --layer layer3 --exp exp/ascent

A picture for every filter of a layer, found by gradient ascent from noise (visu/ascent.py): EXP/conv<N>/
layer<N>-channel<c>.jpeg, and all of them on one sheet, EXP/conv<N>/layer<N>.jpeg. Of a ResNet's layer3:
EXP/layer3/layer3-channel<c>.jpeg.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import Parser, add_device, add_exp, add_map, add_model, add_seed, at_least, positive, within


def get_parser() -> Parser:
    """The flags of gradient_ascent.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to look at")
    add_model(group)
    group.add_argument(
        "--arch", metavar="ARCH", help="checked against what the checkpoint says (default: what it says)"
    )
    add_map(group)
    group.add_argument(
        "--filters",
        type=at_least(0),
        nargs="+",
        metavar="C",
        help="channels, from 0 (default: all of the layer)",
    )
    add_exp(group, "the results")
    add_ascent(parser.add_argument_group("ascent"))
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch",
        type=at_least(1),
        default=96,
        help="filters optimised together; fewer take less memory, the pictures do not depend on it",
    )
    add_device(group)
    return parser


def add_ascent(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start from faint noise in the network's input space, with lr, wd, sig and niter that suit the "
        "layer; each of these flags that is given wins. --no-preset: the defaults below, from noise in "
        "0..255, as the authors' code did",
    )
    group.add_argument(
        "--lr",
        type=positive,
        metavar="LR",
        help="learning rate: length of a step, as the gradient is divided by its norm; raise it where the "
        "picture is still noise (default: 3)",
    )
    group.add_argument(
        "--wd",
        type=within(0, math.inf),
        metavar="WD",
        help="weight decay, times the squared norm of x; lower it where the picture stays grey "
        "(default: 10^-5)",
    )
    group.add_argument(
        "--sig",
        type=within(0, math.inf),
        metavar="SIG",
        help="gaussian blur, sigma in pixels, 0 for none; raise it where the picture is all fine grain "
        "(default: 0.3)",
    )
    group.add_argument(
        "--step", type=at_least(1), metavar="STEP", help="number of iter between gaussian blurs (default: 5)"
    )
    group.add_argument(
        "--niter", type=at_least(1), metavar="NITER", help="total number of iterations (default: 1000)"
    )
    group.add_argument(
        "--idim", type=at_least(16), default=224, metavar="IDIM", help="size of input image, in pixels"
    )
    add_seed(group)


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import statistics
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

import util
from models import weights
from models.network import Network
from util import UserError
from visu import sheet
from visu.ascent import Ascent, Settings, ascend_layer, preset
from visu.layers import choose_map, file_stem, width

SHEET_TILE = 112  # pixels of a picture on the contact sheet


def main(args: argparse.Namespace) -> list[Ascent]:
    device, log = util.choose_device(args.device), util.Log()
    net = weights.load(args.model)
    if args.arch and args.arch != net.arch:
        raise UserError(f"--arch {args.arch}: {args.model} holds {net.arch}; leave --arch out")
    if not all(weight.isfinite().all() for weight in net.parameters()):
        raise UserError(f"{args.model}: has weights that are not finite, the network has diverged")
    name = choose_map(net, args.conv, args.layer)
    channels = choose_channels(args.filters, net, name, args.idim)
    settings = choose_settings(args, net, name)
    folder = sheet.folder_of_pictures(Path(args.exp) / name)
    log(
        f"{net.arch} {name}, {len(channels)} filters at {settings.idim} pixels: "
        f"lr {settings.lr:.3g}, wd {settings.wd:g}, sig {settings.sig:.3g}, step {settings.step}, "
        f"niter {settings.niter}, start {'in 0..255' if settings.released else 'normalised'}"
    )
    progress = util.Progress(len(channels), name, unit="filters", log=log)
    results = []
    for result in ascend_layer(net, name, channels, settings, args.seed, args.batch, device):
        picture = Image.fromarray(result.picture)
        sheet.save_picture(picture, folder / f"{file_stem(name)}-channel{result.channel}.jpeg")
        results.append(result)
        progress.update()
    progress.close()
    overview = folder / f"{file_stem(name)}.jpeg"
    sheet.save_picture(layer_sheet(results, f"{net.arch} {name}"), overview)
    log(summary(name, results))
    log(f"pictures in {folder}, all on one sheet in {overview}")
    return results


def choose_channels(filters: list[int] | None, net: Network, name: str, size: int) -> list[int]:
    """The channels to visualise, each once; UserError for one that the layer lacks."""
    count = width(net, name, size)
    channels = list(range(count)) if filters is None else list(dict.fromkeys(filters))
    for channel in channels:
        if channel >= count:
            raise UserError(f"--filters {channel}: {name} of {net.arch} has filters 0 to {count - 1}")
    return channels


def choose_settings(args: argparse.Namespace, net: Network, name: str) -> Settings:
    """The preset of the layer, or the plain defaults, with the flags that the user gave."""
    base = Settings(idim=args.idim)
    if args.preset:
        depth = net.maps.index(name) / max(1, len(net.maps) - 1)
        base = preset(depth, net.sobel is not None, args.idim)
    given = {flag: getattr(args, flag) for flag in ("lr", "wd", "sig", "step", "niter")}
    return replace(base, **{flag: value for flag, value in given.items() if value is not None})


def layer_sheet(results: Sequence[Ascent], title: str) -> Image.Image:
    """All pictures of a layer in a grid, each with its channel and how many times its activation grew."""
    size = (SHEET_TILE, SHEET_TILE)
    tiles = [Image.fromarray(result.picture).resize(size, Image.Resampling.LANCZOS) for result in results]
    captions = [f"{result.channel}  x{result.strict_growth:.3g}" for result in results]
    title += ": channel, activation over that of noise"
    return sheet.contact_sheet(tiles, sheet.square_columns(len(tiles)), captions, title=title)


def summary(name: str, results: Sequence[Ascent]) -> str:
    """One line on how much the activations grew, median and least, by the three measures of `Ascent`."""
    own, strict, even = (
        f"x{statistics.median(values):.3g} (least x{min(values):.3g})"
        for values in zip(*[(r.growth, r.strict_growth, r.even_growth) for r in results])
    )
    return (
        f"{name}: activation against that of noise: median {own}; against the layer's average in noise, "
        f"where that is larger: {strict}; the same at the contrast of noise: {even}"
    )


if __name__ == "__main__":
    util.run_main(main, ARGS)
