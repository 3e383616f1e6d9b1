"""First-layer filters: the pixels of the grids, and the filter that acts on the grey image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
from models.weights import load
from tests import tiny
from tests.helpers import refuses
from visu import filters


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
    weights = load(path).features[0].weight.detach().numpy()  # (8, 3, 5, 5)
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
    net = load(path)
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


@pytest.mark.parametrize(
    ("arch", "width"),
    [("resnet50", 7), ("resnet18s", 3), ("vgg16", 3), ("alexnet", 11), ("toy", 3), ("toy:sobel", 3)],
)
def test_every_network_has_a_first_layer(tmp_path, arch, width):
    run(tmp_path / "x", "--scale", "1", "--model", f"random:{arch}")
    conv = filters.first_conv(load(f"random:{arch}"))
    assert conv.kernel_size == (width, width) and conv.in_channels == (2 if "sobel" in arch else 3)


@pytest.mark.parametrize(
    ("flags", "words"), [(("--out", "x.gif"), r"--out x\.gif"), (("--scale", "0"), "--scale: 0")]
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    with refuses(words):
        run(saved(tmp_path, sobel=False), *flags)


def test_missing_model_is_named(tmp_path):
    with refuses(r"nowhere\.pth: no such"):
        run(tmp_path / "nowhere.pth")
    with refuses("--model"):
        filters.get_parser().parse_args([])


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    path = saved(tmp_path, sobel=False)
    net = load(path)
    with torch.no_grad():
        net.features[0].weight[0, 0] = float("nan")
    checkpoint.save(path, {"arch": "tiny", "state_dict": net.state_dict()})
    with refuses("not finite"):
        run(path)
    assert not (tmp_path / "exp").exists()
