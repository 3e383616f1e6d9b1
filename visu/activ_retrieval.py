"""Which images activate a filter most? The top images of every filter of a layer.

    python visu/activ_retrieval.py --model exp/checkpoint.pth.tar --conv 5 --data DIR --exp exp/top
    python visu/activ_retrieval.py --model resnet.pth.tar --layer layer4 --shards 'val-*.tar' --exp exp/top

One pass over the images; for each filter of convolution N the `--count` images with the largest mean
activation over space (after the ReLU) are kept. Copies them to
EXP/conv<N>/layer<N>-channel<c>/<rank>_<file name>, the best at rank 0, and shows them on contact sheets, a
row a filter: EXP/conv<N>/layer<N>.png, or layer<N>-page<p>.png where there are many filters. Of a ResNet's
layer4: EXP/layer4/layer4-channel<c>/. Images that cannot be decoded are left out and named.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import (
    OWN_SIZE,
    Parser,
    add_exp,
    add_image_size,
    add_machine,
    add_map,
    add_model,
    add_shards,
    at_least,
)


def get_parser() -> Parser:
    """The flags of activ_retrieval.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to look at")
    add_model(group)
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR", help="a folder of images or a .txt file of paths")
    add_shards(source, "--data")
    add_map(group)
    group.add_argument("--count", type=at_least(1), default=9, help="images for each filter")
    add_image_size(group, None, OWN_SIZE)
    group = parser.add_argument_group("machine and output")
    add_exp(group, "the results")
    group.add_argument("--batch", type=at_least(1), default=64, help="images in a batch")
    add_machine(group)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import shutil

import torch
from PIL import Image

import data
import util
from data import ImageList, PlainView
from features import Pass, activation_batches
from models import weights
from models.network import Network
from util import UserError
from visu import sheet
from visu.layers import choose_map, file_stem

PAGE_ROWS = 32  # filters on one contact sheet
TILE = 96  # pixels of an image on a sheet
BROKEN_SHOWN = 10  # broken images named on the terminal


def main(args: argparse.Namespace) -> "TopImages":
    device, log = util.choose_device(args.device), util.Log()
    util.set_precision(args.precision, device)
    net = weights.load(args.model).to(device)
    log(net.inputs.tell(args.image_size))
    args.image_size = net.inputs.size(args.image_size)
    name = choose_map(net, args.conv, args.layer)
    folder = sheet.folder_of_pictures(Path(args.exp) / name)
    images = data.open_images(
        args.data, args.shards, bad_list=folder / "bad_images.txt", skip_bad=True, all_splits=True,
        workers=args.workers, log=log,
    )  # fmt: skip
    progress = util.Progress(len(images), f"{name} of {images.name}", log=log)
    view = PlainView(images, data.central_crop(args.image_size))
    how = Pass(args.batch, args.workers, device, args.precision)
    top, broken = find_top(net, name, view, args.count, how, progress)
    progress.close()
    name_broken(images, broken, log)
    if top is None:
        raise UserError(f"{images.name}: none of its images can be decoded")
    copy_images(images, top, folder, file_stem(name))
    pages = write_sheets(images, top, folder, name, args.image_size)
    log(
        f"{len(top.images)} filters of {name}: copies in {folder}/{file_stem(name)}-channel<c>/, sheets "
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


def find_top(
    net: Network, name: str, view: PlainView, count: int, how: Pass, progress: util.Progress
) -> tuple[TopImages | None, list[int]]:
    """The `count` images with the largest mean activation of each filter of a map; the broken images.

    net is on the device of `how`. None where nothing could be decoded. Raises UserError for activations that
    are not finite.
    """
    top, broken = None, []
    for found, index, bad in activation_batches(net, [name], view, how):
        if found:
            means = found[name].mean(dim=(2, 3)).cpu()  # (B, filters)
            if not means.isfinite().all():
                raise UserError(f"{name}: activations are not finite, the network has diverged")
            top = top or TopImages(means.shape[1], count)
            top.add(means, torch.from_numpy(index))
        broken += bad
        progress.update(len(index) + len(bad))
    return top, sorted(broken)


def name_broken(images: ImageList, broken: list[int], log: util.Log) -> None:
    """Say which images were left out, and why; of many the first few."""
    for i, reason in data.reasons(images, broken[:BROKEN_SHOWN]):
        log(f"left out {images.path(i)}: {reason}")
    if len(broken) > BROKEN_SHOWN:
        log(f"left out {len(broken)} images in all that cannot be decoded")


# ------------------------------------------------------------------------------- what is written


def copy_images(images: ImageList, top: TopImages, folder: Path, stem: str) -> None:
    """Copy each filter's images to folder/<stem>-channel<c>/<rank>_<file name>; earlier copies go."""
    for channel, row in enumerate(top.images.tolist()):
        target = folder / f"{stem}-channel{channel}"
        if target.is_dir():
            shutil.rmtree(target)
        util.make_folder(target)
        for rank, i in enumerate(row):
            copy = target / f"{rank}_{Path(images.paths[i]).name}"
            copy.write_bytes(images.read(i))  # from a file, or from within a shard


def write_sheets(images: ImageList, top: TopImages, folder: Path, name: str, image_size: int) -> list[Path]:
    """Contact sheets of the views that the network saw, a row a filter, PAGE_ROWS a page; their paths."""
    rows = top.images.tolist()
    pages = [range(start, min(start + PAGE_ROWS, len(rows))) for start in range(0, len(rows), PAGE_ROWS)]
    paths = []
    for number, channels in enumerate(pages):
        ending = ".png" if len(pages) == 1 else f"-page{number}.png"
        shown = {i for channel in channels for i in rows[channel]}
        tiles = {i: thumbnail(images, i, image_size) for i in shown}
        page = sheet.contact_sheet(
            [tiles[i] for channel in channels for i in rows[channel]],
            columns=len(rows[0]),
            captions=[f"{value:.3g}" for channel in channels for value in top.values[channel].tolist()],
            row_labels=[str(channel) for channel in channels],
            title=f"{name}: filter; top images by mean activation",
        )
        paths.append(folder / f"{file_stem(name)}{ending}")
        sheet.save_picture(page, paths[-1])
    return paths


def thumbnail(images: ImageList, i: int, image_size: int) -> Image.Image:
    """The central view of image i as the network sees it, small."""
    view = data.central_crop(image_size)(images.decode(i))
    picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    util.run_main(main, ARGS)
