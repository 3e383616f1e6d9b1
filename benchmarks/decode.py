"""What does one image cost on one core, next to the plain Pillow pipeline?

    python benchmarks/decode.py                # the two views, per core
    python benchmarks/decode.py --workers 2    # and a whole loader with 2 processes

Photo-like JPEGs of 500 x 375, ImageNet's typical size, are cut from the photographs of scikit-image and
scikit-learn. All ways run interleaved in this process on one thread; the minimum of several rounds counts.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import util

WIDTH, HEIGHT = 500, 375
SKIMAGE = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
SKLEARN = ("china.jpg", "flower.jpg")

# The plain way's crops, on Pillow images.
CENTRAL = [transforms.Resize(256), transforms.CenterCrop(224)]
TRAIN = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64, help="number of JPEGs (default: 64)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds, of which the fastest counts (default: 7)"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes, 0: no loader (default: 0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Cut the photos, time every way, print the tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cut_photos(Path(folder), args.images)
        images = data.list_images(folder)
        paths = [images.path(i) for i in range(len(images))]
        kib = np.mean([path.stat().st_size for path in paths]) / 1024
        print(f"{len(paths)} JPEGs, {kib:.0f} KiB on average\n")
        per_core(images, paths, args.rounds)
        if args.workers:
            loader(images, args.workers, args.rounds)


def cut_photos(folder: Path, count: int) -> None:
    """Write `count` crops as JPEG, quality 95, half of them 4:4:4, half 4:2:0."""
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.datasets.__file__).parent / "images"
    sources = [skimage_data / name for name in SKIMAGE] + [sklearn_data / name for name in SKLEARN]
    photos = [Image.open(path).convert("RGB") for path in sources]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        left = int(rng.integers(photo.width - WIDTH + 1))
        top = int(rng.integers(photo.height - HEIGHT + 1))
        crop = photo.crop((left, top, left + WIDTH, top + HEIGHT))
        crop.save(folder / f"{i:04d}.jpg", quality=95, subsampling=(0, 2)[i // len(photos) % 2])


def pillow_pipeline(crop: list) -> Callable[[Path], torch.Tensor]:
    """The plain way: open, convert, crop, ToTensor, Normalize."""
    normalise = transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)
    transform = transforms.Compose([*crop, transforms.ToTensor(), normalise])

    def run(path: Path) -> torch.Tensor:
        with open(path, "rb") as file:
            return transform(Image.open(file).convert("RGB"))

    return run


def fastest(
    ways: dict[str, Callable[[Path], torch.Tensor]], paths: list[Path], rounds: int
) -> dict[str, float]:
    """Milliseconds an image of each way: interleaved rounds over all images, the minimum."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            torch.manual_seed(0)  # the same random crops for every way
            start = time.perf_counter()
            for path in paths:
                way(path)
            best[name] = min(best[name], (time.perf_counter() - start) / len(paths) * 1000)
    return best


def per_core(images: data.ImageList, paths: list[Path], rounds: int) -> None:
    """Both views against Pillow's, with normalisation of ours inside and outside the measurement."""
    ours_central, ours_train = data.central_crop(224), data.train_crop(224)
    train_view = data.TrainView(images, 224, seed=0, epoch=0)
    number = {path: i for i, path in enumerate(paths)}
    ways = {
        "decode": data.decode,
        "central, Pillow": pillow_pipeline(CENTRAL),
        "central, ours": lambda path: ours_central(data.decode(path)),
        "central, ours, normalised": lambda path: data.normalise(ours_central(data.decode(path))),
        "train, Pillow": pillow_pipeline(TRAIN),
        "train, ours": lambda path: train_view[number[path], number[path]][0],
        "train, ours, normalised": lambda path: data.normalise(train_view[number[path], number[path]][0]),
    }
    best = fastest(ways, paths, rounds)
    print(
        f"{'one core':28s}{'ms/img':>8s}{'ratio':>8s}{'decode limit':>14s}{'max diff':>10s}{'mean diff':>11s}"
    )
    for name, milliseconds in best.items():
        reference = best.get(f"{name.split(',')[0]}, Pillow", milliseconds)
        ratio, limit = reference / milliseconds, best["decode"] / milliseconds
        line = f"{name:28s}{milliseconds:8.3f}{ratio:8.2f}{limit:14.2f}"
        if name in ("central, ours", "train, ours"):
            plain, ours = (CENTRAL, ours_central) if name == "central, ours" else (TRAIN, ours_train)
            line += "{:10d}{:11.4f}".format(*difference(paths, transforms.Compose(plain), ours))
        print(line)


def difference(paths: list[Path], plain: Callable, ours: Callable) -> tuple[int, float]:
    """Largest and mean absolute difference in 0..255 between our crop and Pillow's, same random numbers."""
    largest, means = 0, []
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        expected = np.asarray(plain(Image.open(path).convert("RGB"))).astype(int)
        torch.manual_seed(i)
        error = np.abs(expected - ours(data.decode(path)).permute(1, 2, 0).numpy())
        largest = max(largest, int(error.max()))
        means.append(error.mean())
    return largest, float(np.mean(means))


class PillowDataSet(Dataset):
    """The plain way as a data set: normalised float32 items."""

    def __init__(self, images: data.ImageList, crop: list):
        self.images = images
        self.run = pillow_pipeline(crop)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.run(self.images.path(i)), i


def loader(images: data.ImageList, workers: int, rounds: int) -> None:
    """Whole loaders with worker processes, batch 64, on a list long enough to hide their start."""
    images = data.ImageList(images.root, [images.paths[i % len(images)] for i in range(1024)])
    order = [(i, i) for i in range(len(images))]
    train_view = data.TrainView(images, 224, seed=0, epoch=0)
    ways = {
        "central, Pillow": lambda: DataLoader(PillowDataSet(images, CENTRAL), 64, num_workers=workers),
        "central, ours": lambda: data.make_loader(data.CentralView(images, 224), 64, workers),
        "train, Pillow": lambda: DataLoader(PillowDataSet(images, TRAIN), 64, num_workers=workers),
        "train, ours": lambda: data.make_loader(train_view, 64, workers, sampler=order),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(min(rounds, 3)):
        for name, make in ways.items():
            start = time.perf_counter()
            for _ in make():
                pass
            best[name] = min(best[name], (time.perf_counter() - start) / len(images) * 1000)
    print(f"\n{f'loader, {workers} workers':28s}{'ms/img':>8s}{'ratio':>8s}")
    for name, milliseconds in best.items():
        reference = best[f"{name.split(',')[0]}, Pillow"]
        print(f"{name:28s}{milliseconds:8.3f}{reference / milliseconds:8.2f}")


if __name__ == "__main__":
    util.run_main(main, get_parser())
