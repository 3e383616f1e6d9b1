"""What does one image cost on one core, next to the plain Pillow pipeline?

    python benchmarks/decode.py                # the two views per core, the crop cache, shards, large photos
    python benchmarks/decode.py --workers 2    # and a whole loader with 2 processes

Photo-like JPEGs of 500 x 375, ImageNet's typical size, are cut from the photographs of scikit-image and
scikit-learn. All ways run interleaved in this process on one thread; the minimum of several rounds counts.
"train" draws the same boxes in both ways.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import util
from data.shards import list_shards
from tools import make_shards

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
        crop_cache(images, Path(folder) / "cache", args.rounds)
        shrunk_shards(images, Path(folder) / "shards", args.rounds)
        large_photos(Path(folder) / "large", args.rounds)
        if args.workers:
            loader(images, args.workers, args.rounds)


def open_photos() -> list[Image.Image]:
    """The photographs that the images are made of."""
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.datasets.__file__).parent / "images"
    sources = [skimage_data / name for name in SKIMAGE] + [sklearn_data / name for name in SKLEARN]
    return [Image.open(path).convert("RGB") for path in sources]


def cut_photos(folder: Path, count: int) -> None:
    """Write `count` crops as JPEG, quality 95, half of them 4:4:4, half 4:2:0."""
    photos = open_photos()
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


def fastest(ways: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Milliseconds an image of each way, called with 0 to count - 1: interleaved rounds, the minimum."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for i in range(count):
                way(i)
            best[name] = min(best[name], (time.perf_counter() - start) / count * 1000)
    return best


def per_core(images: data.ImageList, paths: list[Path], rounds: int) -> None:
    """Both views against Pillow's, with normalisation of ours inside and outside the measurement."""
    crops = {"central": (CENTRAL, data.central_crop(224)), "train": (TRAIN, data.train_crop(224))}
    train_view = data.RandomView(images, data.train_crop(224))
    seeds = [util.derive_seed(0, "crop", 0, i) for i in range(len(images))]
    plain_central, plain_train = pillow_pipeline(CENTRAL), pillow_pipeline(TRAIN)
    central_view = data.PlainView(images, data.central_crop(224))

    def pillow_train(i: int) -> None:
        torch.default_generator.manual_seed(seeds[i])  # the same boxes as ours
        plain_train(paths[i])

    def train_batch(i: int) -> list:  # by 16, as a loader asks for batches
        return train_view.__getitems__(
            [(j, j) for j in range(i, min(i + 16, len(paths)))] if i % 16 == 0 else []
        )

    ways = {
        "decode": images.decode,
        "central, Pillow": lambda i: plain_central(paths[i]),
        "central, ours": lambda i: central_view[i],
        "central, ours, normalised": lambda i: data.normalise(central_view[i][0]),
        "train, Pillow": pillow_train,
        "train, ours": lambda i: train_batch(i),
        "train, ours, normalised": lambda i: [data.normalise(view) for view, _ in train_batch(i)],
    }
    best = fastest(ways, len(images), rounds)
    print(
        f"{'one core':28s}{'ms/img':>8s}{'ratio':>8s}{'decode limit':>14s}{'max diff':>10s}{'mean diff':>11s}"
    )
    for name, milliseconds in best.items():
        view = name.split(",")[0]
        ratio = best.get(f"{view}, Pillow", milliseconds) / milliseconds
        line = f"{name:28s}{milliseconds:8.3f}{ratio:8.2f}{best['decode'] / milliseconds:14.2f}"
        if name.endswith("ours"):
            plain, ours = crops[view]
            line += "{:10d}{:11.4f}".format(*difference(paths, transforms.Compose(plain), ours))
        print(line)


def difference(paths: list[Path], plain: Callable, ours: Callable) -> tuple[int, float]:
    """Largest and mean absolute difference in 0..255 between our crop and Pillow's, same random numbers."""
    largest, means = 0, []
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        expected = np.asarray(plain(Image.open(path).convert("RGB"))).astype(int)
        torch.manual_seed(i)
        error = np.abs(expected - ours(data.decode_file(path)).permute(1, 2, 0).numpy())
        largest = max(largest, int(error.max()))
        means.append(error.mean())
    return largest, float(np.mean(means))


def crop_cache(images: data.ImageList, folder: Path, rounds: int) -> None:
    """Central crops read from the cache against decoding; filling it against not filling it."""
    filled, crop = data.CropCache(folder, images, 224), data.central_crop(224)
    plain, cached = data.PlainView(images, crop), data.PlainView(images, crop, filled)
    views = [plain[i][0] for i in range(len(images))]
    for i, view in enumerate(views):
        filled.write(i, view)
    assert all(torch.equal(cached[i][0], view) for i, view in enumerate(views))
    ways = {
        "decode and crop": lambda i: plain[i],
        "read from the cache": lambda i: cached[i],
        "write to the cache": lambda i: filled.write(i, views[i]),
        "copy in memory": lambda i: views[i].clone(),
    }
    best = fastest(ways, len(images), rounds)
    print(f"\n{'crop cache, warm':28s}{'ms/img':>8s}{'ratio':>8s}")
    for name, milliseconds in best.items():
        print(f"{name:28s}{milliseconds:8.4f}{best['decode and crop'] / milliseconds:8.1f}")


def shrunk_shards(images: data.ImageList, folder: Path, rounds: int) -> None:
    """Decoding from shards, unchanged and with the shorter side resized to 256 at quality 95."""
    lists = {"folder": images}
    for name, options in {"shards": [], "shards, --resize 256": ["--resize", "256"]}.items():
        pattern = str(folder / name.replace(" ", "") / "%06d.tar")
        arguments = [str(images.root), pattern, "--workers", "0", *options]
        with contextlib.redirect_stdout(io.StringIO()):
            written = make_shards.main(make_shards.get_parser().parse_args(arguments))
        lists[name] = list_shards(written[0])
    crop = data.central_crop(224)
    views = {name: data.PlainView(listed, data.central_crop(224)) for name, listed in lists.items()}
    ways = {f"{name}: decode": listed.decode for name, listed in lists.items()}
    ways |= {f"{name}: central": view.__getitem__ for name, view in views.items()}
    best = fastest(ways, len(images), rounds)
    expected = [crop(images.decode(i)) for i in range(len(images))]
    print(f"\n{'folder and shards':32s}{'ms/img':>8s}{'ratio':>8s}{'KiB/img':>9s}{'mean diff':>11s}")
    for way, milliseconds in best.items():
        name, _, part = way.rpartition(": ")
        listed = lists[name]
        kib = np.mean([len(listed.read(i)) for i in range(len(listed))]) / 1024
        line = f"{way:32s}{milliseconds:8.3f}{best[f'folder: {part}'] / milliseconds:8.2f}{kib:9.0f}"
        if part == "central":
            errors = [(crop(listed.decode(i)).int() - view.int()).abs() for i, view in enumerate(expected)]
            line += f"{torch.stack(errors).float().mean():11.4f}"
        print(line)


def large_photos(folder: Path, rounds: int) -> None:
    """--scaled-decoding on photographs of 2000 x 1500, enlarged and grained as a sensor grains them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, photo in enumerate(open_photos()):
        photo = ImageOps.fit(photo, (2000, 1500), Image.Resampling.LANCZOS)
        grained = np.asarray(photo) + rng.normal(0, 4, (1500, 2000, 3))
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
    plain, scaled = data.list_images(folder), data.list_images(folder)
    scaled.scaled = True
    count = len(plain)
    crops = {"central": data.central_crop(224), "train": data.train_crop(224)}
    ways: dict[str, Callable[[int], object]] = {"decode": plain.decode, "decode, scaled": scaled.decode}
    for name, crop in crops.items():
        ways[name] = lambda i, crop=crop: crop(plain.decode(i))
        ways[f"{name}, scaled"] = lambda i, crop=crop: crop(scaled.decode(i))
    best = fastest(ways, count, rounds)
    print(f"\n{'photos of 2000 x 1500':28s}{'ms/img':>8s}{'ratio':>8s}{'max diff':>10s}{'mean diff':>11s}")
    for name, milliseconds in best.items():
        what = name.removesuffix(", scaled")
        line = f"{name:28s}{milliseconds:8.3f}{best[what] / milliseconds:8.2f}"
        if what in crops and name != what:
            errors = scaled_difference(plain, scaled, what)
            line += f"{errors.max():10d}{errors.mean():11.4f}"
        print(line)


def scaled_difference(plain: data.ImageList, scaled: data.ImageList, what: str) -> np.ndarray:
    """Absolute differences in 0..255 between the views of photos decoded in full and scaled.

    The same random numbers mean another box in a smaller image; compared are resized boxes of the same place.
    """
    errors = []
    for i in range(len(plain)):
        whole, small = plain.decode(i), scaled.decode(i)
        by = whole.shape[1] // small.shape[1]
        if what == "central":
            views = [data.central_crop(224)(image) for image in (whole, small)]
        else:
            draw = v2.RandomResizedCrop(224)
            torch.manual_seed(i)
            box = draw.make_params([small])
            larger = {name: value * by for name, value in box.items()}
            views = [
                functional.resized_crop(whole, **larger, size=draw.size, antialias=True),
                functional.resized_crop(small, **box, size=draw.size, antialias=True),
            ]
        errors.append(views[0].numpy().astype(int) - views[1].numpy())
    return np.abs(np.stack(errors))


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
    device = torch.device("cpu")
    order = [(i, i) for i in range(len(images))]
    central_view = data.PlainView(images, data.central_crop(224))
    train_view = data.RandomView(images, data.train_crop(224))
    ways = {
        "central, Pillow": lambda: DataLoader(PillowDataSet(images, CENTRAL), 64, num_workers=workers),
        "central, ours": lambda: data.make_loader(central_view, 64, workers, device),
        "train, Pillow": lambda: DataLoader(PillowDataSet(images, TRAIN), 64, num_workers=workers),
        "train, ours": lambda: data.make_loader(train_view, 64, workers, device, sampler=order),
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
    util.run_main(main, get_parser().parse_args())
