"""How fast are features extracted? Ratios to the plain forward pass, and whether the loader keeps it busy.

    python benchmarks/extraction.py [--arch alexnet] [--images 192] [--device cpu]

1. Forward alone, batches in memory at 224 pixels: the plain way (float32, contiguous, batch norm as it
   stands, autograd off) against ours in each precision that the device has. Goal: bf16 at least 3 times on a
   CPU with AMX, fp32 at least 1.5 times.
2. From JPEG files: images/s of the whole pass against the slower of `decode alone` and `forward alone`.
   Goal: at least 0.9. On two cores decoding takes its time from the forward pass, so fast forwards miss it.

The ways take turns; each figure is the best of several rounds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
from commandline import PRECISIONS
from features import activations_of
from util import UserError, choose_device, set_precision

PICTURES = Path(__file__).resolve().parent.parent / "demo" / "pictures"


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 like ImageNet's, cut from the demo's photographs."""
    rng = np.random.default_rng(0)
    pictures = [Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*.jpg"))]
    for i in range(count):
        picture = pictures[i % len(pictures)]
        width = int(picture.width * rng.uniform(0.6, 1.0))
        height = min(int(width * 0.75), picture.height)
        x, y = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        picture.crop((x, y, x + width, y + height)).resize((500, 375)).save(
            folder / f"{i:04}.jpg", quality=92
        )


def best_of(ways: dict, rounds: int) -> dict[str, float]:
    """Seconds of each way, the best of several interleaved rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()  # warm up
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def available_precisions(device: torch.device) -> list[str]:
    """The precisions that this device computes in."""
    found = []
    for precision in PRECISIONS:
        try:
            set_precision(precision, device)
            found.append(precision)
        except UserError:
            pass
    return found


class Race:
    """The ways to get the features of some JPEG files."""

    def __init__(self, arch: str, folder: Path, batch: int, workers: int, device: torch.device) -> None:
        self.device = device
        self.plain = models.build(arch, sobel=True, seed=0).eval().to(device)  # contiguous, as constructed
        self.net = models.build(arch, sobel=True, seed=0).eval().to(device)
        self.view = data.PlainView(data.list_images(folder), data.central_crop(224))
        self.load = lambda: data.make_loader(self.view, batch, workers, device)
        self.batches = list(data.make_loader(self.view, batch, 0, device))

    @torch.inference_mode()
    def plain_forward(self) -> None:
        """Float32, contiguous, batch norm as it stands."""
        with set_precision("fp32", self.device):
            for batch in self.batches:
                x = data.normalise(batch.views.to(self.device).contiguous())
                self.plain.activations(x, [self.plain.feature])

    def ours(self, batches: Iterable[data.views.Batch], precision: str) -> None:
        """As features.extract_features computes and keeps them."""
        feature = self.net.feature
        for found, _ in activations_of(self.net, [feature], batches, self.device, precision):
            found[feature].cpu().numpy()

    def decode(self) -> None:
        """The loader alone."""
        for _ in self.load():
            pass


def main(args: argparse.Namespace) -> None:
    """Time both and print the tables."""
    device = choose_device(args.device)
    precisions = available_precisions(device)
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), args.images)
        race = Race(args.arch, Path(folder), args.batch, args.workers, device)
        ways = {"plain": race.plain_forward}
        ways |= {f"ours {p}": partial(race.ours, race.batches, p) for p in precisions}
        seconds = best_of(ways, args.rounds)
        print(f"{args.arch}, {args.images} images at 224 on {device}, {torch.get_num_threads()} threads")
        print(f"{'forward alone':<16} {'img/s':>8} {'ratio':>7}")
        for name, value in seconds.items():
            print(f"{name:<16} {args.images / value:8.0f} {seconds['plain'] / value:7.2f}")
        if device.type == "cuda":
            torch.cuda.synchronize()

        loading = {"decode alone": race.decode}
        loading |= {f"whole {p}": lambda p=p: race.ours(race.load(), p) for p in precisions}
        whole = best_of(loading, args.rounds)
        print(f"\n{'from JPEG, ' + str(args.workers) + ' worker(s)':<28} {'img/s':>8} {'of the slower':>14}")
        print(f"{'decode alone':<28} {args.images / whole['decode alone']:8.0f}")
        for p in precisions:
            slower = max(whole["decode alone"], seconds[f"ours {p}"])
            rate, part = args.images / whole[f"whole {p}"], slower / whole[f"whole {p}"]
            print(f"{'whole ' + p:<28} {rate:8.0f} {part:14.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="alexnet")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default=None)
    main(parser.parse_args())
