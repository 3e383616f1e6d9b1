"""What does a training step cost in each precision and layout? Ratios to the plain float32 step.

    python benchmarks/train_step.py                       # AlexNet, Sobel, k 1000, 224 pixels, batch 256
    python benchmarks/train_step.py --batch 64 --rounds 2 # quicker
    python benchmarks/train_step.py --device cuda

A step is that of training/steps.py: uint8 crops to the device, normalised, forward with dropout,
cross-entropy of the labels, backward, SGD with momentum for the body and without for the head. The plain step
is what one writes first: float32, NCHW, SGD as a loop over the parameters. The ways take turns; each figure
is the best of several rounds. Compiling is timed apart, and once more after the head was replaced, as an
epoch does.

Then every way makes 100 steps from the same weights on the same small images, whose labels can be learnt: how
far do the losses drift apart? `plain, other dropout` shows how far chance alone takes them.
Goal: at least 1.5 times the plain step at batch 256 on a CPU.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
from commandline import add_device
from util import choose_device, cpu_has_bf16, run_main, set_precision

GOAL = 1.5
MOMENTUM, DECAY = 0.9, 1e-5  # main.py's defaults
TAIL = 10  # the loss "after 100 steps" is the mean of the last ten: single batches scatter


@dataclass(frozen=True)
class Way:
    """One way to make a training step."""

    name: str
    precision: str = "fp32"
    channels_last: bool = False
    fused: bool = False
    compiled: bool = False


def ways_for(device: torch.device, compiled: bool) -> list[Way]:
    """What this device can do; the first one is the plain way."""
    fast = {"channels_last": True, "fused": True}
    ways = [
        Way("plain fp32"),
        Way("channels_last", channels_last=True),
        Way("fused SGD", fused=True),
        Way("main.py fp32", **fast),
    ]
    if device.type == "cuda":
        ways.append(Way("main.py tf32", "tf32", **fast))
    if device.type == "cuda" or cpu_has_bf16():
        ways.append(Way("main.py bf16", "bf16", **fast))
    if device.type == "cuda":
        ways.append(Way("main.py fp16, scaler", "fp16", **fast))
    if compiled:
        ways += [
            Way(f"compile {way.precision}", way.precision, **fast, compiled=True)
            for way in ways[3:]
            if way.precision in ("fp32", "bf16")
        ]
    return ways


class Trainer:
    """A network and its two optimisers, which make steps in one way."""

    def __init__(self, way: Way, arch: str, k: int, lr: float, device: torch.device) -> None:
        self.way, self.lr, self.device = way, lr, device
        net = models.build(arch, sobel=True, num_clusters=k, seed=0).to(device)
        self.net = net.to(memory_format=self.memory_format).train()
        self.forward = torch.compile(self.net) if way.compiled else self.net
        self.scaler = torch.amp.GradScaler(device.type, enabled=way.precision == "fp16")
        body = [p for name, p in net.named_parameters() if p.requires_grad and "top_layer" not in name]
        self.body = self.sgd(body, MOMENTUM)
        self.head = self.sgd(net.top_layer.parameters(), 0.0)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.way.channels_last else torch.contiguous_format

    def sgd(self, parameters, momentum: float) -> torch.optim.SGD:
        how = {"fused": True} if self.way.fused else {"foreach": False, "fused": False}
        return torch.optim.SGD(parameters, lr=self.lr, momentum=momentum, weight_decay=DECAY, **how)

    def fresh_head(self) -> None:
        """Another head and its optimiser, as at the start of an epoch."""
        self.net.set_head(self.net.top_layer.out_features, seed=1)
        self.head = self.sgd(self.net.top_layer.parameters(), 0.0)

    def step(self, images: torch.Tensor, target: torch.Tensor, seed: int) -> float:
        """One training step on uint8 images (B, 3, S, S) and labels (B,); returns the loss."""
        torch.manual_seed(seed)
        x = data.normalise(images.to(self.device)).contiguous(memory_format=self.memory_format)
        target = target.to(self.device)
        with set_precision(self.way.precision, self.device):
            loss = F.cross_entropy(self.forward(x).float(), target)
        value = loss.item()
        for optimizer in (self.body, self.head):
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        for optimizer in (self.body, self.head):
            self.scaler.step(optimizer)
        self.scaler.update()
        return value

    def seconds(self, images: torch.Tensor, target: torch.Tensor) -> float:
        """How long one step takes, to its very end."""
        start = time.perf_counter()
        self.step(images, target, seed=0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def make_batch(batch: int, size: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (batch, 3, size, size) uint8 with structure, and labels (batch,) that can be told from them.

    A label has a coarse pattern of its own; an image is that pattern, smooth, of random contrast, in noise.
    """
    patterns = torch.randn(k, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (batch,), generator=generator)
    contrast = 20 + 40 * torch.rand(batch, 1, 1, 1, generator=generator)
    smooth = F.interpolate(patterns[labels], (size, size), mode="bilinear", align_corners=False)
    noise = 10 * torch.randn(batch, 3, size, size, generator=generator)
    return (128 + contrast * smooth + noise).clamp(0, 255).to(torch.uint8), labels


def gauge() -> float:
    """GFLOP/s of a 2048-cube float32 product now: low means that the cores are busy with something else."""
    a = torch.randn(2048, 2048)
    a @ a
    start = time.perf_counter()
    a @ a
    return 2 * 2048**3 / (time.perf_counter() - start) / 1e9


def time_steps(args: argparse.Namespace, ways: list[Way], device: torch.device) -> None:
    """The table of times."""
    batch = make_batch(args.batch, args.image_size, args.k, seed=1)
    trainers, first, again = [], {}, {}
    for way in ways:
        trainer = Trainer(way, args.arch, args.k, args.lr, device)
        first[way] = trainer.seconds(*batch)
        if way.compiled:
            trainer.fresh_head()
            again[way] = trainer.seconds(*batch)
        trainers.append(trainer)
    best, speed = dict.fromkeys(ways, math.inf), []
    for _ in range(args.rounds):
        speed.append(gauge())
        for way, trainer in zip(ways, trainers):
            best[way] = min(best[way], trainer.seconds(*batch))
    print(
        f"{args.arch}, Sobel, k {args.k}, {args.image_size} px, batch {args.batch}, {device}, "
        f"{torch.get_num_threads()} threads; gauge {min(speed):.0f} to {max(speed):.0f} GFLOP/s"
    )
    print(f"{'way':<22}{'ms/image':>10}{'ratio':>8}   (goal {GOAL})")
    for way in ways:
        line = f"{way.name:<22}{1000 * best[way] / args.batch:>10.2f}{best[ways[0]] / best[way]:>8.2f}"
        if way.compiled:
            line += f"   compiling {first[way] - best[way]:.0f} s"
            line += f", after a new head {max(again[way] - best[way], 0):.1f} s"
        print(line, flush=True)


def losses(way: Way, args: argparse.Namespace, device: torch.device, seed: int = 0) -> float:
    """Mean loss of the last steps of a short training in one way; `seed` changes the dropout only."""
    trainer = Trainer(way, args.arch, args.loss_k, args.loss_lr, device)
    values = []
    for step in range(args.steps):
        batch = make_batch(args.loss_batch, args.loss_image_size, args.loss_k, seed=step)
        values.append(trainer.step(*batch, seed=step + 1000 * seed))
    return sum(values[-TAIL:]) / len(values[-TAIL:])


def compare_losses(args: argparse.Namespace, ways: list[Way], device: torch.device) -> None:
    """The table of losses after 100 steps."""
    print(
        f"\nloss after {args.steps} steps (mean of the last {TAIL}), k {args.loss_k} (log k "
        f"{math.log(args.loss_k):.2f}), {args.loss_image_size} px, batch {args.loss_batch}, lr {args.loss_lr}"
    )
    print(f"{'way':<22}{'loss':>9}{'minus plain':>13}")
    plain = None
    for name, way, seed in [*((way.name, way, 0) for way in ways), ("plain, other dropout", ways[0], 1)]:
        loss = losses(way, args, device, seed)
        plain = loss if plain is None else plain
        print(f"{name:<22}{loss:>9.4f}{loss - plain:>+13.4f}", flush=True)


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="alexnet", help="default: %(default)s")
    parser.add_argument("--k", type=int, default=1000, help="outputs of the head (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="0: no times (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--steps", type=int, default=100, help="0: no losses (default: %(default)s)")
    parser.add_argument("--loss-batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--loss-image-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--loss-k", type=int, default=50, help="default: %(default)s")
    parser.add_argument(
        "--loss-lr", type=float, default=0.01, help="default: %(default)s, as small data want"
    )
    add_device(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print both tables."""
    device = choose_device(args.device)
    torch._inductor.config.fallback_random = True  # compiled or not, a seed gives the same dropout
    ways = ways_for(device, not args.no_compile)
    if args.rounds:
        time_steps(args, ways, device)
    if args.steps:
        compare_losses(args, ways, device)


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
