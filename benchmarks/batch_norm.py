"""Batch norm of a training step on a CPU: how exact are its statistics, and what does that cost?

    python benchmarks/batch_norm.py                 # maps of AlexNet (224 and 64 pixels) and VGG-16
    python benchmarks/batch_norm.py --threads 2 --rounds 5

Ways: torch's in NCHW, torch's in channels_last, models/norm.py in channels_last. They take turns; times are
the best of the rounds, forward and backward, in ratio to torch's in channels_last. Errors are the largest
relative ones of the variances against float64.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from commandline import Parser, at_least
from models.norm import BatchNorm2d
from util import run_main, say

SHAPES = {
    "AlexNet conv1, 224 px, batch 128": (128, 96, 55, 55),
    "AlexNet conv3, 224 px, batch 256": (256, 384, 13, 13),
    "AlexNet conv1, 64 px, batch 256": (256, 96, 15, 15),
    "VGG-16 conv1, 224 px, batch 32": (32, 64, 224, 224),
}
WAYS = {
    "torch, NCHW": (nn.BatchNorm2d, torch.contiguous_format),
    "torch, channels_last": (nn.BatchNorm2d, torch.channels_last),
    "models/norm.py, channels_last": (BatchNorm2d, torch.channels_last),
}


def get_parser() -> Parser:
    """The flags of batch_norm.py."""
    parser = Parser(__doc__)
    parser.add_argument("--threads", type=at_least(1), default=1, help="of torch")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="the best of which counts")
    return parser


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for name, shape in SHAPES.items():
        found = compare(shape, args.rounds)
        base, _ = found["torch, channels_last"]
        say(name)
        for way, (seconds, error) in found.items():
            ms, ratio = seconds * 1e3, seconds / base
            say(f"  {way:30}  {ratio:5.2f} times  {ms:6.0f} ms  variance off by {error:.1e}")


def compare(shape: tuple[int, ...], rounds: int) -> dict[str, tuple[float, float]]:
    """{way: (seconds of a forward and a backward pass, relative error of the variance)}."""
    x, gradient = torch.randn(shape).add_(0.5), torch.randn(shape)
    exact = x.double().var((0, 2, 3))
    best = {way: (float("inf"), 0.0) for way in WAYS}
    for _ in range(rounds):
        for way, (layer, layout) in WAYS.items():
            norm = layer(shape[1], momentum=1.0)
            given = x.to(memory_format=layout, copy=True).requires_grad_()
            back = gradient.to(memory_format=layout, copy=True)
            start = time.perf_counter()
            norm(given).backward(back)
            seconds = time.perf_counter() - start
            error = float((norm.running_var.double() / exact - 1).abs().max())
            best[way] = (min(seconds, best[way][0]), error)
    return best


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
