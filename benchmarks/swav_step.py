"""What do a step of SwAV, its codes and its crops cost? Ratios to what one writes first.

    python benchmarks/swav_step.py                      # ResNet-50, 2 x 224 + 6 x 96, batch 8 on a CPU
    python benchmarks/swav_step.py --batch 64 --device cuda

step: forward, codes, loss, backward, LARC and SGD. The plain step sends one crop after the other through the
network, NCHW, float32; main_swav.py's sends crops of one size together, channels last, also in bf16.
codes: Sinkhorn of 256 images with a queue of 3840, K 3000, two crops, as a share of a step at batch 256,
taken as so many times the measured one. crops: those of one image, decoded, by torchvision's transforms on
PIL images, which each decode but once, and by data/multicrop.py, a core each. Ways take turns; each figure is
the best of the rounds. Goals: a step 1.5 times as fast in fp32, 2.5 in bf16; crops 1.7; codes under 3 %.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_swav
import models
from algorithms.sinkhorn import sinkhorn
from commandline import Parser, add_device, at_least
from data import to_input
from data.decode import decode_bytes
from data.multicrop import MultiCrop
from data.views import IMAGENET_MEAN, IMAGENET_STD, collate
from models.network import Network
from training.memory import Queue
from training.multicrop import PrototypeUse
from training.optim import LARC, sgd
from util import choose_device, run_main, set_precision

ROOT = Path(__file__).resolve().parent.parent
COUNTS, SIZES, LOW, HIGH = [2, 6], [224, 96], [0.14, 0.05], [1.0, 0.14]
K, DIM, PAPERS_BATCH, QUEUE = 3000, 128, 256, 3840


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--arch", default="resnet50", help="CNN architecture")
    parser.add_argument("--batch", type=at_least(1), default=8, help="images in a step")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each way")
    add_device(parser)
    return parser


def best_of(
    ways: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each way: the ways take turns, the best round counts; one more goes before."""
    found = {name: float("inf") for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                found[name] = min(found[name], clock() - start)
    return found


def tell(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"    {name:34s} {1000 * value:9.1f} ms   {first / value:5.2f} times")


# ---------------------------------------------------------------------------------------- step


class Trainer:
    """A network with its head and optimiser, and steps of SwAV with it."""

    def __init__(self, arch: str, batch: int, device: torch.device, plain: bool, precision: str) -> None:
        net = models.build(arch, seed=0)
        net.set_embedding(2048, DIM, K, seed=0)
        layout = torch.contiguous_format if plain else torch.channels_last
        self.net = net.to(device, memory_format=layout).train()
        self.plain, self.precision, self.device = plain, precision, device
        self.larc = LARC(sgd(self.net.parameters(), 0.6, 0.9, 1e-6))
        use = PrototypeUse(K, {}, print)
        codes, queue = partial(sinkhorn, epsilon=0.05, niter=3), Queue(0, batch, 2, DIM, device)
        self.loss = partial(main_swav.loss, [0, 1], 0.1, codes, net.prototypes, queue, use)

    def step(self, views: list[torch.Tensor]) -> None:
        """One step on uint8 crops (B, 3, S_v, S_v)."""
        crops = to_input(views, self.device)
        if self.plain:
            crops = [crop.contiguous() for crop in crops]
        with set_precision(self.precision, self.device):
            loss = self.loss(partial(one_by_one, self.net) if self.plain else self.net, crops, None)
        self.larc.zero_grad(set_to_none=True)
        loss.backward()
        self.larc.step()
        loss.item()


def one_by_one(net: Network, crops: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The network's forward pass, a crop after the other."""
    outputs = [net.activations(crop, [net.output])[net.output] for crop in crops]
    z = torch.nn.functional.normalize(net.projection_head(torch.cat(outputs)), dim=1)
    return z, net.prototypes(z)


def compare_steps(arch: str, batch: int, device: torch.device, rounds: int) -> float:
    """Prints the table; returns seconds of main_swav.py's step in float32."""
    sizes = [size for count, size in zip(COUNTS, SIZES) for _ in range(count)]
    views = [torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8) for size in sizes]
    ways = {"plain fp32": (True, "fp32"), "main_swav.py fp32": (False, "fp32")}
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        ways["main_swav.py bf16"] = (False, "bf16")
    trainers = {name: Trainer(arch, batch, device, *way) for name, way in ways.items()}
    steps = {name: partial(trainer.step, views) for name, trainer in trainers.items()}
    seconds = best_of(steps, rounds)
    tell(f"a step of {batch} images, {arch}, on {device} with {torch.get_num_threads()} thread(s)", seconds)
    return seconds["main_swav.py fp32"]


def compare_codes(step: float, batch: int, device: torch.device, rounds: int) -> None:
    """Sinkhorn and queue beside a step of PAPERS_BATCH images, each of which takes step / batch seconds."""
    queue = Queue(QUEUE, PAPERS_BATCH, 2, DIM, device)
    queue.on = True
    z = torch.nn.functional.normalize(torch.randn(2, PAPERS_BATCH, DIM, device=device), dim=2)
    weight = torch.nn.functional.normalize(torch.randn(K, DIM, device=device), dim=1)
    while not queue.full:
        queue.put(z)

    def codes() -> None:
        for crop in (0, 1):
            sinkhorn(torch.cat([queue.of(crop) @ weight.T, z[crop] @ weight.T]), 0.05)
        queue.put(z)

    seconds = best_of({"codes": codes}, rounds)["codes"]
    share = seconds / (step / batch * PAPERS_BATCH)
    print(
        f"codes of {PAPERS_BATCH} images with a queue of {QUEUE}: {1000 * seconds:.1f} ms, {share:.1%} of "
        f"a step of {PAPERS_BATCH}"
    )


# ---------------------------------------------------------------------------------------- crops


class PilBlur:
    """Pillow's blur with the paper's radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item()))


def pil_pipeline(size: int, low: float, high: float) -> transforms.Compose:
    """The crops of one group as torchvision's transforms of PIL images make them."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(low, high)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([PilBlur()], p=0.5),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip


def compare_crops(rounds: int) -> None:
    """Batches of 16 images of 500 x 375 pixels, on one core; ours is normalised as a batch."""
    torch.set_num_threads(1)
    files = []
    for path in sorted((ROOT / "demo" / "pictures").glob("*.jpg"))[:16]:
        file = io.BytesIO()
        Image.open(path).convert("RGB").resize((500, 375)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    groups = zip(COUNTS, SIZES, LOW, HIGH)
    pipelines = [pil_pipeline(size, low, high) for n, size, low, high in groups for _ in range(n)]
    crops = MultiCrop(COUNTS, SIZES, LOW, HIGH)

    def pil() -> None:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        views = [[pipeline(image) for pipeline in pipelines] for image in images]
        [torch.stack(view) for view in zip(*views)]

    def ours() -> None:
        with torch.inference_mode():
            items = [(crops(decode_bytes(file, False)), i) for i, file in enumerate(files)]
            to_input(collate(items).views, torch.device("cpu"))

    clock = time.process_time  # of one thread: what else the machine does counts less
    found = best_of({"torchvision, PIL": pil, "data/multicrop.py": ours}, rounds, clock)
    seconds = {name: value / len(files) for name, value in found.items()}
    tell("decoding an image and its 2 x 224 + 6 x 96 crops, normalised, on one core", seconds)
    alone = [decode_bytes(file, False) for file in files]
    opened = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))) for image in alone]
    ways = {
        "torchvision, PIL": lambda: [pipeline(image) for image in opened for pipeline in pipelines],
        "data/multicrop.py": lambda: [crops(image) for image in alone],
    }
    seconds = {name: value / len(files) for name, value in best_of(ways, rounds, clock).items()}
    tell("the crops alone (PIL's with normalisation)", seconds)


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    step = compare_steps(args.arch, args.batch, device, args.rounds)
    compare_codes(step, args.batch, device, args.rounds)
    compare_crops(args.rounds)


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
