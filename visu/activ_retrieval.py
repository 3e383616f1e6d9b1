"""Which images activate a filter most? The top images of every filter of a layer.

    python visu/activ_retrieval.py --model exp/checkpoint.pth.tar --conv 5 --data DIR --exp exp/top

One pass over the images; for each filter of convolution N the `--count` images with the largest mean
activation over space (after the ReLU) are kept. Copies them to
EXP/conv<N>/layer<N>-channel<c>/<rank>_<file name>, the best at rank 0, and shows them on contact sheets, a
row a filter: EXP/conv<N>/layer<N>.png, or layer<N>-page<p>.png where there are many filters.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluation
import util
from features import PRECISIONS, fold_batch_norm, set_precision
from models import DeepClusterNet
from util import UserError
from visu import sheet

PAGE_ROWS = 32  # filters on one contact sheet
TILE = 96  # pixels of an image on a sheet
BROKEN_SHOWN = 10  # broken images named on the terminal


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="activ_retrieval.py", description="Top images of every filter of a convolutional layer."
    )
    group = parser.add_argument_group("what to look at")
    group.add_argument("--model", required=True, metavar="MODEL", help="checkpoint of the network")
    group.add_argument(
        "--data", required=True, metavar="DIR", help="a folder of images or a .txt file of paths"
    )
    group.add_argument(
        "--conv", type=int, default=1, metavar="CONV", help="convolutional layer, from 1 (default: 1)"
    )
    group.add_argument("--count", type=int, default=9, help="images for each filter (default: 9)")
    group.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the central crop that the network sees; the shorter side is first resized to 256/224 "
        "of it (default: 224)",
    )
    group = parser.add_argument_group("machine and output")
    group.add_argument("--exp", default="exp", metavar="EXP", help="path to results (default: exp)")
    group.add_argument("--batch", type=int, default=64, help="images in a batch (default: 64)")
    group.add_argument("--workers", type=int, default=4, help="number of data loading workers (default: 4)")
    util.add_device_argument(group)
    group.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="arithmetic of the convnet (default: fp32)"
    )
    return parser


def main(args: argparse.Namespace) -> "TopImages":
    for name, least in (("conv", 1), ("count", 1), ("batch", 1), ("workers", 0), ("image_size", 16)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    device, log = util.choose_device(args.device), util.Log()
    set_precision(args.precision, device)
    layer = f"conv{args.conv}"
    net = evaluation.open_network(args.model, [layer])
    images = data.list_images(args.data)
    folder = util.make_folder(Path(args.exp) / layer)

    loader = data.make_loader(
        data.CentralView(images, args.image_size), args.batch, args.workers, pin_memory=device.type == "cuda"
    )
    progress = util.Progress(len(images), f"{layer} of {args.data}", log=log)
    top, broken = find_top(net.to(device), loader, layer, args.count, device, args.precision, progress)
    progress.close()
    name_broken(images, broken, log)
    if top is None:
        raise UserError(f"{args.data}: none of the {len(images)} images can be decoded")
    copy_images(images, top, folder, args.conv)
    pages = write_sheets(images, top, folder, args.conv, args.image_size)
    log(
        f"{len(top.images)} filters of {layer}: copies in {folder}/layer{args.conv}-channel<c>/, sheets "
        + ", ".join(str(page) for page in pages)
    )
    return top


# ------------------------------------------------------------------------------- one pass


class TopImages:
    """The running best images of every filter: memory for filters x count numbers, whatever is shown.

    values: (filters, kept) float32, largest first; images: (filters, kept) int64, their indexes. Of equal
    values the lower index comes first, so that the order and the size of batches make no difference.
    """

    def __init__(self, filters: int, count: int) -> None:
        self.count = count
        self.values = torch.empty(filters, 0)
        self.images = torch.empty(filters, 0, dtype=torch.int64)

    def add(self, values: torch.Tensor, indexes: torch.Tensor) -> None:
        """Show a batch: values (B, filters) and the image indexes (B,)."""
        values = torch.cat([self.values, values.T.float()], dim=1)
        images = torch.cat([self.images, indexes.expand(len(values), -1)], dim=1)
        order = images.argsort(dim=1)  # then a stable sort by value leaves equal ones in that order
        values, images = values.gather(1, order), images.gather(1, order)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        self.values, self.images = values.gather(1, order), images.gather(1, order)


@torch.inference_mode()
def find_top(
    net: DeepClusterNet,
    loader: DataLoader,
    layer: str,
    count: int,
    device: torch.device,
    precision: str = "fp32",
    progress: util.Progress | None = None,
) -> tuple[TopImages | None, list[int]]:
    """The `count` images with the largest mean activation of each filter of `layer`; the broken images.

    net is on `device`; loader yields (uint8 views (B, 3, S, S), indexes (B,)), an index -1 - i for an image i
    that cannot be decoded. None where nothing could be decoded. Raises UserError for activations that are not
    finite.
    """
    folded = fold_batch_norm(net.eval()).to(memory_format=torch.channels_last)
    top, broken = None, []
    with set_precision(precision, device):
        for views, indexes in loader:
            good = indexes >= 0
            broken += (-1 - indexes[~good]).tolist()
            if good.any():
                x = data.normalise(views.to(device, non_blocking=True))
                x = x.contiguous(memory_format=torch.channels_last)
                means = folded.activations(x, [layer])[layer].float().mean(dim=(2, 3)).cpu()[good]
                if not means.isfinite().all():
                    raise UserError(f"{layer}: activations are not finite, the network has diverged")
                top = top or TopImages(means.shape[1], count)
                top.add(means, indexes[good])
            if progress is not None:
                progress.update(len(indexes))
    return top, sorted(broken)


def name_broken(images: data.ImageList, broken: list[int], log: util.Log) -> None:
    """Say which images were left out, and why; of many the first few."""
    for i in broken[:BROKEN_SHOWN]:
        log(f"left out {images.path(i)}: {data.broken_reason(images, i)}")
    if len(broken) > BROKEN_SHOWN:
        log(f"left out {len(broken)} images in all that cannot be decoded")


# ------------------------------------------------------------------------------- what is written


def copy_images(images: data.ImageList, top: TopImages, folder: Path, conv: int) -> None:
    """Copy each filter's images to folder/layer<N>-channel<c>/<rank>_<file name>; earlier copies go."""
    for channel, row in enumerate(top.images.tolist()):
        target = folder / f"layer{conv}-channel{channel}"
        if target.is_dir():
            shutil.rmtree(target)
        util.make_folder(target)
        for rank, i in enumerate(row):
            copy = target / f"{rank}_{Path(images.paths[i]).name}"
            copy.write_bytes(images.read(i))  # from a file, or from within a shard


def write_sheets(
    images: data.ImageList, top: TopImages, folder: Path, conv: int, image_size: int
) -> list[Path]:
    """Contact sheets of the views that the network saw, a row a filter, PAGE_ROWS a page; their paths."""
    rows = top.images.tolist()
    pages = [range(start, min(start + PAGE_ROWS, len(rows))) for start in range(0, len(rows), PAGE_ROWS)]
    paths = []
    for number, channels in enumerate(pages):
        name = f"layer{conv}.png" if len(pages) == 1 else f"layer{conv}-page{number}.png"
        shown = {i for channel in channels for i in rows[channel]}
        tiles = {i: thumbnail(images, i, image_size) for i in shown}
        page = sheet.contact_sheet(
            [tiles[i] for channel in channels for i in rows[channel]],
            columns=len(rows[0]),
            captions=[f"{value:.3g}" for channel in channels for value in top.values[channel].tolist()],
            row_labels=[str(channel) for channel in channels],
            title=f"conv{conv}: filter; top images by mean activation",
        )
        paths.append(folder / name)
        sheet.save_picture(page, paths[-1])
    return paths


def thumbnail(images: data.ImageList, i: int, image_size: int) -> Image.Image:
    """The central view of image i as the network sees it, small."""
    view = data.central_crop(image_size)(images.decode(i))
    picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    util.run_main(main, get_parser().parse_args())
