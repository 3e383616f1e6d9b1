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
from visu import gradient_ascent as ga


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="alexnet", help="alexnet or vgg16 (default: alexnet)")
    parser.add_argument("--conv", type=int, default=1, help="convolution (default: 1)")
    parser.add_argument("--filters", type=int, default=96, help="filters together (default: 96)")
    parser.add_argument("--alone", type=int, default=8, help="filters of the other two ways (default: 8)")
    parser.add_argument(
        "--idim", type=int, nargs="+", default=[224, 96], help="sizes of the input (default: 224 96)"
    )
    parser.add_argument("--niter", type=int, default=10, help="iterations (default: 10)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, of which the fastest counts (default: 3)"
    )
    util.add_device_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Time the ways for each size, print the table."""
    device = util.choose_device(args.device)
    net = models.build(args.arch, sobel=True, seed=0).eval()
    net.sobel.to(device)
    print(
        f"{args.arch} conv{args.conv}, Sobel, {args.filters} filters, {args.niter} iterations, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'idim':>5s} {'way':14s}{'ms/iteration/filter':>22s}{'s for all':>12s}{'together is':>14s}")
    for idim in args.idim:
        settings = replace(ga.preset(args.conv, net.num_convs, True, idim), niter=args.niter)
        best = fastest(net, args, settings, device)
        for name, seconds in best.items():
            each = seconds / args.filters / args.niter * 1000
            ratio = f"{seconds / best['together']:.2f} x faster" if name != "together" else ""
            print(f"{idim:5d} {name:14s}{each:22.2f}{seconds:12.2f}{ratio:>14s}")


def fastest(
    net: models.DeepClusterNet, args: argparse.Namespace, settings: ga.Settings, device: torch.device
) -> dict[str, float]:
    """Seconds for all filters of each way: the minimum of interleaved rounds."""
    everything, some = range(args.filters), range(min(args.alone, args.filters))
    ways = {
        "plain": (some, lambda channels: plain(net.to(device), args.conv, channels, settings, device)),
        "plain, 1 core": (
            some,
            lambda channels: one_core(plain, net.to(device), args.conv, channels, settings, device),
        ),
        "alone": (some, lambda channels: ours(net, args.conv, channels, settings, 1, device)),
        "together": (
            everything,
            lambda channels: ours(net, args.conv, channels, settings, args.filters, device),
        ),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(args.rounds + 1):  # the first one warms up
        for name, (channels, way) in ways.items():
            start = time.perf_counter()
            way(channels)
            seconds = (time.perf_counter() - start) / len(channels) * args.filters
            best[name] = min(best[name], seconds)
    return best


def one_core(way: Callable[..., None], *args: Any) -> None:
    """Call a way with torch on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    way(*args)
    torch.set_num_threads(before)


def ours(
    net: models.DeepClusterNet,
    conv: int,
    channels: range,
    settings: ga.Settings,
    batch: int,
    device: torch.device,
) -> None:
    """Pictures of the channels by the code that is measured."""
    list(ga.ascend_layer(net, conv, channels, settings, 31, batch, device))


def plain(
    net: models.DeepClusterNet, conv: int, channels: range, settings: ga.Settings, device: torch.device
) -> None:
    """The same pictures, one filter after the other, as one would write it down."""
    net.requires_grad_(True)
    net.sobel.requires_grad_(False)
    for channel in channels:
        x = ga.noise(31, conv, channel, settings.noise, settings)[None].to(device)
        for i in range(1, settings.niter + 1):
            x.requires_grad_()
            activation = net.activations(x, [f"conv{conv}"])[f"conv{conv}"].mean(dim=(2, 3))
            loss = activation.log_softmax(dim=1)[0, channel] - settings.wd * (x**2).sum()
            net.zero_grad()
            loss.backward()
            x = (x + settings.lr * x.grad / x.grad.norm()).detach()
            if i % settings.step == 0:
                colours = [
                    gaussian_filter(colour, settings.sig, mode="nearest") for colour in x[0].cpu().numpy()
                ]
                x = torch.from_numpy(np.stack(colours))[None].to(device)
        ga.to_pictures(x, settings.normalised)
    net.requires_grad_(False)


if __name__ == "__main__":
    util.run_main(main, get_parser().parse_args())
