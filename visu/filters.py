"""What does the first layer see? Its filters as pictures (figure 3 of the paper).

    python visu/filters.py --model exp/checkpoint.pth.tar --exp exp

Without Sobel a filter acts on RGB and is shown in colour. With Sobel it acts on the two gradients of the
grey image: three grids, side by side, show its part for the horizontal gradient, its part for the vertical
one, and what the two do together to the grey image, that is the filter composed with the Sobel kernels (two
pixels larger on either axis). Mid-grey is 0. Writes EXP/filters.png.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import Parser, add_exp, add_model, at_least


def get_parser() -> Parser:
    """The flags of filters.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_model(parser)
    add_exp(parser, "filters.png")
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write instead, .png (default: EXP/filters.png)"
    )
    parser.add_argument(
        "--scale",
        type=at_least(1),
        metavar="N",
        help="pixels a weight (default: so that a filter has about 44)",
    )
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import torch
from PIL import Image
from torch import nn

import util
from models import weights
from models.network import Network
from util import UserError
from visu import sheet
from visu.layers import first_conv

GRIDS_GAP = 16  # pixels between the grids


def main(args: argparse.Namespace) -> Path:
    path = Path(args.out or Path(args.exp) / "filters.png")
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: must end in .png")
    net = weights.load(args.model)
    conv = first_conv(net)
    if not conv.weight.isfinite().all():
        raise UserError(f"{args.model}: weights of the first layer are not finite, the network has diverged")
    sheet.folder_of_pictures(path.parent)
    grids = filter_grids(net, args.scale or max(1, round(44 / conv.kernel_size[0])))
    sheet.save_picture(beside(grids), path)
    util.say(f"{conv.out_channels} filters of {net.arch}'s first layer in {path}")
    return path


# ------------------------------------------------------------------------------- weights -> pictures


def filter_grids(net: Network, scale: int) -> list[Image.Image]:
    """The grids of a network: one in colour, or three in grey where Sobel stands in front."""
    weights = first_conv(net).weight.detach().cpu()  # (filters, 3 or 2, k, k)
    if net.sobel is None:
        return [grid(to_pictures(weights), scale, "first layer, RGB")]
    together = compose(weights, net.sobel[1].weight.detach().cpu())
    parts = to_pictures(weights)  # both gradients of a filter share one scale
    return [
        grid(parts[:, :1], scale, "horizontal gradient"),
        grid(parts[:, 1:], scale, "vertical gradient"),
        grid(to_pictures(together), scale, "on the grey image"),
    ]


def compose(weights: torch.Tensor, sobel: torch.Tensor) -> torch.Tensor:
    """The filters on the grey image: weights (F, 2, k, k), sobel (2, 1, 3, 3) -> (F, 1, k + 2, k + 2).

    A cross-correlation after another is one with the full convolution of their kernels. (In the network the
    gradients are padded by zeros before the first layer, so that at the border the two differ.)
    """
    return nn.functional.conv_transpose2d(weights, sobel)


def to_pictures(weights: torch.Tensor) -> torch.Tensor:
    """Weights (F, C, k, k) -> uint8: 0 is mid-grey, a filter's largest magnitude black or white."""
    largest = weights.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return (127.5 + 127.5 * weights / largest).round().to(torch.uint8)


def grid(pictures: torch.Tensor, scale: int, title: str) -> Image.Image:
    """uint8 (F, 1 or 3, k, k) -> one picture of all of them, each weight scale x scale pixels."""
    tiles = []
    for picture in pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy():
        tile = Image.fromarray(picture)
        tiles.append(tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST))
    columns = sheet.square_columns(len(tiles))
    return sheet.contact_sheet(tiles, columns, title=title, gap=2)


def beside(grids: list[Image.Image]) -> Image.Image:
    """The grids in a row, their tops level, on one picture."""
    width = sum(grid.width for grid in grids) + GRIDS_GAP * (len(grids) - 1)
    picture = Image.new("RGB", (width, max(grid.height for grid in grids)), sheet.PAPER)
    left = 0
    for grid in grids:
        picture.paste(grid, (left, 0))
        left += grid.width + GRIDS_GAP
    return picture


if __name__ == "__main__":
    util.run_main(main, ARGS)
