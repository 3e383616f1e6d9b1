"""How much faster are all filters of a layer together than one after the other?

    python benchmarks/gradient_ascent.py                          # AlexNet's conv1, 96 filters
    python benchmarks/gradient_ascent.py --arch vgg16 --conv 5 --filters 16 --idim 64

The time of an iteration does not depend on their number, so that a few are enough; the ratios are of whole
calls, start and end included. Four ways, interleaved, the fastest of several rounds:

- plain: one filter after the other, straightforward code on the unchanged network (weights that want
  gradients, batch norm on its own, strided convolutions, SciPy's blur), torch on all cores.
- plain, 1 core: the same, torch on one core.
- alone: our code with --batch 1, a core.
- together: our code with all filters in a batch.

Of all ways but the last only some filters are timed (--alone) and scaled up to all.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import util
from commandline import Parser, add_device, add_map, at_least
from models.network import Network
from visu import ascent
from visu.layers import choose_map


def get_parser() -> Parser:
    """The flags of this benchmark."""
    parser = Parser(__doc__)
    parser.add_argument("--arch", default="alexnet", help="a network by name")
    add_map(parser)
    parser.add_argument("--filters", type=at_least(1), default=96, help="filters together")
    parser.add_argument("--alone", type=at_least(1), default=8, help="filters of the other ways")
    parser.add_argument("--idim", type=at_least(16), nargs="+", default=[224, 96], help="sizes of the input")
    parser.add_argument("--niter", type=at_least(1), default=10, help="iterations")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="rounds, of which the fastest counts")
    add_device(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Time the ways for each size, print the table."""
    device = util.choose_device(args.device)
    net = models.build(args.arch, sobel=True, seed=0).eval()
    name = choose_map(net, args.conv, args.layer)
    print(
        f"{args.arch} {name}, Sobel, {args.filters} filters, {args.niter} iterations, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'idim':>5s} {'way':14s}{'ms/iteration/filter':>22s}{'s for all':>12s}{'together is':>16s}")
    depth = net.maps.index(name) / max(1, len(net.maps) - 1)
    for idim in args.idim:
        settings = replace(ascent.preset(depth, True, idim), niter=args.niter)
        best = fastest(net, name, args.filters, args.alone, args.rounds, settings, device)
        for way, seconds in best.items():
            each = seconds / args.filters / args.niter * 1000
            ratio = f"{seconds / best['together']:.2f} x faster" if way != "together" else ""
            print(f"{idim:5d} {way:14s}{each:22.2f}{seconds:12.2f}{ratio:>16s}")


def fastest(
    net: Network,
    name: str,
    filters: int,
    alone: int,
    rounds: int,
    settings: ascent.Settings,
    device: torch.device,
) -> dict[str, float]:
    """Seconds for all filters of each way: the minimum of interleaved rounds."""
    everything, some = range(filters), range(min(alone, filters))
    net = net.to(device)
    ways = {
        "plain": (some, lambda channels: plain(net, name, channels, settings, device)),
        "plain, 1 core": (some, lambda channels: one_core(plain, net, name, channels, settings, device)),
        "alone": (some, lambda channels: ours(net, name, channels, settings, 1, device)),
        "together": (everything, lambda channels: ours(net, name, channels, settings, filters, device)),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):  # the first one warms up
        for way, (channels, run) in ways.items():
            start = time.perf_counter()
            run(channels)
            seconds = (time.perf_counter() - start) / len(channels) * filters
            best[way] = min(best[way], seconds)
    return best


def one_core(way: Callable[..., None], *args: Any) -> None:
    """Call a way with torch on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    way(*args)
    torch.set_num_threads(before)


def ours(
    net: Network,
    name: str,
    channels: range,
    settings: ascent.Settings,
    batch: int,
    device: torch.device,
) -> None:
    """Pictures of the channels by the code that is measured."""
    list(ascent.ascend_layer(net, name, channels, settings, 31, batch, device))


def plain(net: Network, name: str, channels: range, settings: ascent.Settings, device: torch.device) -> None:
    """The same pictures, one filter after the other, as one would write it down."""
    for channel in channels:
        x = ascent.noise(31, name, channel, settings.noise, settings)[None].to(device)
        for i in range(1, settings.niter + 1):
            x.requires_grad_()
            activation = net.activations(x, [name])[name].mean(dim=(2, 3))
            loss = activation.log_softmax(dim=1)[0, channel] - settings.wd * (x**2).sum()
            net.zero_grad()
            loss.backward()
            x = (x + settings.lr * x.grad / x.grad.norm()).detach()
            if i % settings.step == 0:
                colours = [
                    gaussian_filter(colour, settings.sig, mode="nearest") for colour in x[0].cpu().numpy()
                ]
                x = torch.from_numpy(np.stack(colours))[None].to(device)
        ascent.to_pictures(x, settings.released)


if __name__ == "__main__":
    util.run_main(main, get_parser().parse_args())
