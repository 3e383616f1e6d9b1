"""Crops, against torchvision's."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

import data
from data import crops, decode
from tests.data.pictures import PHOTOS, array, pixels


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73), (96, 110)])
@pytest.mark.parametrize("source", PHOTOS, ids=lambda path: path.name)
def test_central_crop_is_pillows_within_one_level(source, size, side):
    reference = v1.Compose([v1.Resize(side), v1.CenterCrop(size)])
    error = np.abs(
        pixels(reference(Image.open(source).convert("RGB")))
        - array(data.central_crop(size)(decode.decode_file(source)))
    )
    assert error.shape == (size, size, 3)
    assert error.max() <= 1 and error.mean() <= 0.01


@pytest.mark.parametrize("source", PHOTOS, ids=lambda path: path.name)
def test_train_crop_is_pillows_within_one_level(source):
    reference = v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()])
    image, decoded = Image.open(source).convert("RGB"), decode.decode_file(source)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = pixels(reference(image))
        torch.manual_seed(seed)
        error = np.abs(expected - array(data.train_crop(224)(decoded)))
        assert error.max() <= 1 and error.mean() <= 0.3  # more where a small box is enlarged


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (64, 64), (1, 1), (3, 2000), (2000, 3), (7, 5), (40, 30), (30, 40)]
)
@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.1, 0.5), (1.0, 1.0))])
def test_random_crops_and_random_state_are_torchvisions(shape, scale, ratio):
    reference = v2.Compose([v2.RandomResizedCrop(8, scale, ratio), v2.RandomHorizontalFlip()])
    crop = crops.random_resized_crop(8, scale, ratio)
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    for seed in range(100):
        torch.manual_seed(seed)
        expected, state = reference(image), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(crop(image), expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("native", [True, False])
def test_resizing_is_torchvisions_for_every_layout(photo, monkeypatch, native):
    monkeypatch.setattr(crops, "RESIZES_UINT8", native)  # False: the way of processors without AVX2
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    layouts = {
        "(H, W, 3)": image,
        "(3, H, W)": image.contiguous(),
        "a box": image[:, 20:100, 30:90],
        "a box of (3, H, W)": image.contiguous()[:, 20:100, 30:90],
        "turned": image.transpose(1, 2),
        "one value": image[:, :1, :1].expand(3, 50, 40),
    }
    for name, source in layouts.items():
        for size in ((64, 64), (30, 200), tuple(source.shape[1:])):
            expected = v2.functional.resize(source, list(size))
            assert torch.equal(crops._resize_to(source, *size), expected), (name, size)


def test_train_crop_flips_half_the_time():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    crop = data.train_crop(16)
    torch.manual_seed(0)
    flipped = sum(int(view[0, 0, 0] > view[0, 0, -1]) for view in (crop(ramp) for _ in range(400)))
    assert 160 < flipped < 240


def test_voc_crop_takes_squares_of_10_to_50_percent_of_the_area():
    # Red counts columns and green rows, so that the corners of a view tell the box it was cut from.
    columns, rows = torch.meshgrid(torch.arange(120), torch.arange(200), indexing="xy")
    image = torch.stack([columns, rows, rows * 0]).to(torch.uint8)
    crop = data.voc_train_crop(40)
    torch.manual_seed(0)
    shares, flips = [], 0
    for _ in range(200):
        view = crop(image).int()
        width, height = view[0, 0, -1] - view[0, 0, 0], view[1, -1, 0] - view[1, 0, 0]
        flips += int(width < 0)
        assert abs(abs(int(width)) - int(height)) <= 2
        shares.append((int(height) * 40 / 39) ** 2 / (120 * 200))
    assert 0.09 < min(shares) < 0.15 and 0.44 < max(shares) < 0.52
    assert 70 < flips < 130


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73)])
def test_ten_crops_are_torchvisions(size, side):
    decoded = decode.decode_file(PHOTOS[1])
    expected = torch.stack(v2.TenCrop(size)(v2.Resize(side)(decoded)))
    assert expected.shape == (10, 3, size, size)
    assert torch.equal(data.ten_crops(size)(decoded), expected)
    assert torch.equal(expected[4], data.central_crop(size)(decoded))


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73)])
def test_probe_train_crop_is_torchvisions(size, side):
    decoded = decode.decode_file(PHOTOS[1])
    reference = [v2.Resize(side), v2.CenterCrop(side), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    for seed in range(4):
        torch.manual_seed(seed)
        expected = v2.Compose(reference)(decoded)
        torch.manual_seed(seed)
        assert torch.equal(data.probe_train_crop(size)(decoded), expected)


CROPS = [data.central_crop, data.train_crop, data.voc_train_crop, data.probe_train_crop, data.ten_crops]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (1, 50000), (224, 224), (7, 5)])
@pytest.mark.parametrize("make", CROPS, ids=lambda make: make.__name__)
def test_odd_shapes_give_full_views(make, shape):
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    view = make(64)(image)
    assert view.shape[-3:] == (3, 64, 64) and view.dtype == torch.uint8
    assert (view == 77).all()  # nothing is padded


@pytest.mark.parametrize("long", [2000, 2001])
@pytest.mark.parametrize("short", [3, 4])
def test_central_crop_of_a_strip_is_its_middle(short, long):
    ramp = torch.linspace(0, 255, long).round().to(torch.uint8).expand(3, short, long)
    for image in (ramp, ramp.transpose(1, 2)):
        middle = data.central_crop(224)(image).float().mean()
        assert abs(middle - 127.5) < 0.6


def test_transforms_survive_pickling(photo):
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    for make in CROPS:
        views = []
        for transform in (make(32), pickle.loads(pickle.dumps(make(32)))):
            torch.manual_seed(3)
            views.append(transform(image))
        assert torch.equal(*views)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((50, 100), (80, 160)),  # the shorter side
        ((100, 50), (160, 80)),
        ((50, 200), (50, 200)),  # the longer one
        ((33, 47), (80, 113)),  # rounded down
        ((1, 1000), (1, 200)),  # and never to nothing
    ],
)
def test_whole_images_fit_into_both_sides(shape, expected):
    assert data.fitted(*shape, 80, 200) == expected
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    view = data.whole_image(80, 200)(image)
    assert view.shape[1:] == expected
    assert torch.equal(view, v2.functional.resize(image, list(expected)))


def place(height: int, width: int) -> torch.Tensor:
    """(4, H, W): pixels that tell their own place, and a mask that has the column too."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None, :].expand(height, width)
    return torch.stack([rows, columns, rows, columns])


def test_a_mask_is_cut_with_its_image_and_its_labels_are_not_mixed():
    flips, zooms, filled = 0, [], 0
    for seed in range(200):
        view = data.seeded(data.masked_crop(48), place(60, 80), seed)
        assert view.shape == (4, 48, 48) and view.dtype == torch.uint8
        inside = view[3] != data.VOID
        assert inside[0, 0] and (view[3][inside].int() - view[1][inside].int()).abs().max() <= 2
        assert not view[:3, ~inside].any()
        filled += int(not inside.all())
        row = view[1, 0, : int(inside[0].sum())].float()
        flips += int(row[0] > row[-1])
        zooms.append((len(row) - 1) / abs((row[-1] - row[0]).item()))
    assert 70 < flips < 130 and 0 < filled < 150
    # The shorter side of 60 becomes 26 to 104 pixels: 0.43 to 1.73 times.
    assert 0.4 < min(zooms) < 0.5 and 1.6 < max(zooms) < 1.9


def test_a_strip_with_a_mask_gives_a_full_view_without_growing():
    assert data.masked_crop(48)(place(2, 250)).shape == (4, 48, 48)


def test_test_view_of_a_mask_is_the_mask_itself():
    image = place(30, 50)
    colours, mask = data.colours_and_mask(60, 1000)(image)
    assert torch.equal(colours, data.whole_image(60, 1000)(image[:3])) and torch.equal(mask, image[3:])
