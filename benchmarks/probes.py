"""What do five linear probes side by side cost, next to one?

    python benchmarks/probes.py                                    # AlexNet at 224 pixels, 1,000 classes
    python benchmarks/probes.py --image-size 64 --batch 128 --classes 20

A training step on a batch that is in memory: forward through the frozen trunk, pooling, and one step of SGD
for every classifier. Decoding, which all of them share, is left out; with it the ratio is nearer to 1. The
ways run in turn in this process; the minimum of the rounds counts. The goal is 1.5 times the last
map's probe.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from data import to_input
from evaluation.probe import Frozen, Probes, count
from training.optim import sgd
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
    """Probes on some layers of one network."""

    def __init__(self, net: models.Network, layers: list[str], size: int, classes: int, device: torch.device):
        self.device = device
        self.probes = Probes(Frozen(net, layers, size, device), classes, seed=0)
        self.optimizers = [sgd(c.parameters(), 0.01, 0.9, 1e-4) for c in self.probes.classifiers]
        self.times: list[float] = []

    def step(self, images: torch.Tensor, target: torch.Tensor) -> None:
        """One batch, timed to the end of the device's work."""
        start = time.perf_counter()
        logits = self.probes(to_input(images, self.device))
        losses = [F.cross_entropy(scores, target, reduction="sum") for scores in logits]
        torch.stack([count(a.detach(), b.detach(), target) for a, b in zip(losses, logits)]).cpu()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (sum(losses) / len(target)).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter() - start)


def main(args: argparse.Namespace) -> None:
    """Time one at a time and all together, print the table."""
    device = choose_device(args.device)
    net = models.build(args.arch, sobel=True, seed=0)
    last = len(net.maps) - 1
    chosen = [net.maps[i] for i in sorted({round(i * last / 4) for i in range(5)})]  # VGG-16: 1, 4, 7, 10, 13
    size = (args.image_size, args.classes, device)
    ways = {f"{layer} alone": Way(net, [layer], *size) for layer in chosen}
    ways[f"{len(chosen)} together"] = Way(net, chosen, *size)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    target = torch.randint(0, args.classes, (args.batch,), generator=generator).to(device)
    for _ in range(args.rounds + 1):
        for way in ways.values():
            way.step(images, target)
    seconds = {name: min(way.times[1:]) for name, way in ways.items()}  # the first one warms up

    one = seconds[f"{chosen[-1]} alone"]
    print(
        f"{args.arch} at {args.image_size} px, batch {args.batch}, {args.classes} classes, "
        f"{device}, {torch.get_num_threads()} threads, minimum of {args.rounds}"
    )
    print(f"{'probes':<20}{'ms / image':>12}{f'to {chosen[-1]}':>12}")
    for name, value in seconds.items():
        print(f"{name:<20}{1000 * value / args.batch:>12.3f}{value / one:>12.2f}")
    alone = sum(value for name, value in seconds.items() if name.endswith("alone"))
    all_five = seconds[f"{len(chosen)} together"]
    print(f"goal at most {GOAL}: {'met' if all_five <= GOAL * one else 'missed'} ({all_five / one:.2f})")
    print(f"one after the other costs {alone / all_five:.2f} times as much as together")


if __name__ == "__main__":
    main(get_parser().parse_args())
