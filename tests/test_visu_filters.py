"""First-layer filters: the pixels of the grids, and the filter that acts on the grey image."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
from tests import tiny
from util import UserError
from visu import filters


@pytest.fixture(autouse=True)
def _tiny():
    tiny.register()


def saved(folder: Path, sobel: bool) -> Path:
    net = tiny.tiny(sobel, seed=3)
    checkpoint.save(folder / "net.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    return folder / "net.pth.tar"


def run(model: Path, *flags: str) -> np.ndarray:
    args = filters.get_parser().parse_args(
        ["--model", str(model), "--exp", str(model.parent / "exp"), *flags]
    )
    return np.asarray(Image.open(filters.main(args)))


def test_colour_filters_stand_in_order_zero_is_grey_and_the_largest_weight_is_extreme(tmp_path):
    path = saved(tmp_path, sobel=False)
    picture = run(path, "--scale", "2")
    weights = checkpoint.load_model(path).features[0].weight.detach().numpy()  # (8, 3, 5, 5)
    top = picture.shape[0] - 3 * (10 + 2)  # under the title: three rows of tiles of 10 pixels, gap 2
    for i, filter_ in enumerate(weights):
        y, x = top + i // 3 * 12, 2 + i % 3 * 12
        tile = picture[y : y + 10 : 2, x : x + 10 : 2].transpose(2, 0, 1)
        np.testing.assert_array_equal(tile, np.round(127.5 + 127.5 * filter_ / np.abs(filter_).max()))
        np.testing.assert_array_equal(
            picture[y : y + 10, x : x + 10], tile.repeat(2, 1).repeat(2, 2).transpose(1, 2, 0)
        )


def test_composed_filter_equals_sobel_then_filter_away_from_the_border():
    net = tiny.tiny(True, seed=5).eval()
    conv = net.features[0]
    together = filters.compose(conv.weight.detach(), net.sobel[1].weight)
    assert together.shape == (8, 1, 7, 7)
    x = torch.randn(2, 3, 31, 31, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = conv(net.sobel(x))
        grey = x.mean(dim=1, keepdim=True)
        found = torch.nn.functional.conv2d(grey, together, stride=2, padding=3)
    torch.testing.assert_close(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=1e-4)


def test_sobel_net_shows_both_gradients_and_the_composed_filter(tmp_path):
    path = saved(tmp_path, sobel=True)
    net = checkpoint.load_model(path)
    grids = filters.filter_grids(net, scale=1)
    weights = net.features[0].weight.detach().numpy()
    for channel, grid in enumerate(grids[:2]):
        pixels = np.asarray(grid)
        top = pixels.shape[0] - 3 * 7
        scale = np.abs(weights[0]).max()  # both gradients of a filter share it
        expected = np.round(127.5 + 127.5 * weights[0, channel] / scale)
        for colour in range(3):
            np.testing.assert_array_equal(pixels[top : top + 5, 2:7, colour], expected)
    assert grids[2].width == 2 + 3 * (7 + 2)
    picture = run(path, "--scale", "1")
    assert picture.shape[1] > sum(grid.width for grid in grids)


def test_out_names_the_file(tmp_path):
    run(saved(tmp_path, sobel=False), "--out", str(tmp_path / "deep" / "x.png"))
    assert (tmp_path / "deep" / "x.png").is_file()


@pytest.mark.parametrize("flags", [("--out", "x.gif"), ("--scale", "0")])
def test_mistakes_are_one_line(tmp_path, flags):
    args = filters.get_parser().parse_args(["--model", str(saved(tmp_path, sobel=False)), *flags])
    with pytest.raises(UserError, match=flags[0]):
        filters.main(args)


def test_missing_model_is_named():
    with pytest.raises(UserError, match=r"nowhere\.pth: no such"):
        filters.main(argparse.Namespace(model="nowhere.pth", exp="exp", out=None, scale=None))
