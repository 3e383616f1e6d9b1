"""What do five linear probes side by side cost, next to one?

    python benchmarks/probes.py                                    # AlexNet at 224 pixels, 1,000 classes
    python benchmarks/probes.py --image-size 64 --batch 128 --classes 20

A training step on a batch that is in memory: forward through the frozen trunk, pooling, and one step of SGD
for every classifier. Decoding, which all of them share, is left out; with it the ratio is nearer to 1. The
ways run in turn in this process; the minimum of the rounds counts. The goal is 1.5 times the probe on conv 5.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_linear
import models
from util import choose_device

GOAL = 1.5


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="alexnet", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


class Way:
    """Some convolutions' probes on one trunk."""

    def __init__(self, net: models.DeepClusterNet, convs: list[int], args: argparse.Namespace):
        settings = eval_linear.get_parser().parse_args([])
        self.device = choose_device(args.device)
        self.trunk = eval_linear.Trunk(net, convs, args.image_size, self.device, "fp32")
        self.probes = [
            eval_linear.Probe(conv, values, args.classes, settings, self.device)
            for conv, values in self.trunk.values.items()
        ]
        self.times: list[float] = []

    def step(self, images: torch.Tensor, target: torch.Tensor) -> None:
        """One batch, timed to the end of the device's work."""
        start = time.perf_counter()
        rows = self.trunk(images, self.trunk.values)
        for probe in self.probes:
            probe.step(rows[probe.conv], target)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter() - start)


def main(args: argparse.Namespace) -> None:
    """Time one at a time and all together, print the table."""
    net = models.build(args.arch, sobel=True, seed=0)
    last = net.num_convs
    chosen = sorted({round(1 + i * (last - 1) / 4) for i in range(5)})  # 1 to 5; VGG-16: 1, 4, 7, 10, 13
    ways = {f"conv{conv} alone": Way(net, [conv], args) for conv in chosen}
    ways[f"{len(chosen)} together"] = together = Way(net, chosen, args)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    target = torch.randint(0, args.classes, (args.batch,), generator=generator).to(together.device)
    for _ in range(args.rounds + 1):
        for way in ways.values():
            way.step(images, target)
    seconds = {name: min(way.times[1:]) for name, way in ways.items()}  # the first one warms up

    one = seconds[f"conv{last} alone"]
    print(
        f"{args.arch} at {args.image_size} px, batch {args.batch}, {args.classes} classes, "
        f"{together.device}, {torch.get_num_threads()} threads, minimum of {args.rounds}"
    )
    print(f"{'probes':<20}{'ms / image':>12}{f'to conv{last}':>12}")
    for name, value in seconds.items():
        print(f"{name:<20}{1000 * value / args.batch:>12.3f}{value / one:>12.2f}")
    alone = sum(value for name, value in seconds.items() if name.endswith("alone"))
    all_five = seconds[f"{len(chosen)} together"]
    print(f"goal at most {GOAL}: {'met' if all_five <= GOAL * one else 'missed'} ({all_five / one:.2f})")
    print(f"one after the other costs {alone / all_five:.2f} times as much as together")


if __name__ == "__main__":
    main(get_parser().parse_args())
