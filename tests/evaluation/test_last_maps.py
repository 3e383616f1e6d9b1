"""evaluation/last_maps.py: pixels as Pillow's, boxes, networks up to their last map."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

import data
import models
from evaluation import last_maps
from evaluation.last_maps import Item, resized_view
from features import Pass
from models import weights
from tests.cities import PICTURES
from util import UserError

CPU = torch.device("cpu")


def maps_of(net, items, sizes=(96,), workers=0):
    return list(last_maps.last_maps(net, items, sizes, Pass(1, workers, CPU)))


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("picture", ["cat", "coins", "astronaut"])
@pytest.mark.parametrize("size", [112, 333, 1024])
def test_pixels_are_those_of_pillows_bilinear_resize(picture, size):
    """Down and up, colour and grey (coins): the paper's code calls im.resize(size, Image.BILINEAR)."""
    path = PICTURES / f"{picture}.jpg"
    image = Image.open(path).convert("RGB")
    ratio = size / max(image.size)
    expected = np.asarray(image.resize([round(side * ratio) for side in image.size], Image.BILINEAR))
    ours = resized_view(Item(path), last_maps.open_rgb(path), size)
    assert ours.dtype == torch.uint8 and max(ours.shape) == size
    np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_turns_nothing(tmp_path):
    """The boxes of queries are in pixels of the file."""
    image = Image.open(PICTURES / "cat.jpg").convert("RGB").resize((300, 200))
    plain, turned = tmp_path / "plain.jpg", tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(plain)
    image.save(turned, exif=exif)
    assert data.decode_file(turned).shape == (3, 300, 200)  # elsewhere it is
    box = (30.0, 20.0, 200.0, 90.0)
    views = [resized_view(Item(path, box), last_maps.open_rgb(path), 150) for path in (plain, turned)]
    assert views[0].shape == (3, 35, 85) and torch.equal(*views)


def test_longer_side_becomes_s_and_the_box_is_cut_out_after_resizing():
    pixels = torch.zeros(3, 200, 400, dtype=torch.uint8)
    pixels[:, 50:100, 100:300] = 255
    image = as_image(pixels)
    whole = resized_view(Item(Path("x")), image, 100)
    assert whole.shape == (3, 50, 100)
    assert resized_view(Item(Path("x")), as_image(pixels.transpose(1, 2)), 100).shape == (3, 100, 50)
    view = resized_view(Item(Path("x"), (100.0, 20.0, 302.0, 100.0)), image, 100)
    assert torch.equal(view, whole[:, 5:25, 25:76])  # cut out of the resized image: a quarter of the box
    beyond = resized_view(Item(Path("x"), (-8.0, 40.0, 999.0, 999.0)), image, 100)
    assert torch.equal(beyond, whole[:, 10:])
    with pytest.raises(data.ImageError, match="holds no pixel"):
        resized_view(Item(Path("x"), (390.0, 10.0, 390.0, 20.0)), image, 100)


def test_tiny_views_are_padded_with_the_mean_colour():
    image = as_image(torch.full((3, 3, 40), 200, dtype=torch.uint8))
    view = resized_view(Item(Path("x")), image, 40)
    assert view.shape == (3, 16, 40) and bool((view[:, :3] == 200).all())
    assert data.normalise(view)[:, 3:].abs().max() < 0.01
    assert resized_view(Item(Path("x"), (0, 0, 5, 3)), image, 40).shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"hello", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_named_in_one_line(tmp_path, content, workers):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        file = io.BytesIO()
        Image.open(PICTURES / "cat.jpg").save(file, "JPEG")
        content = file.getvalue()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jpg: ") as error:
        maps_of(models.build("tiny", seed=0).eval(), [Item(path)], workers=workers)
    assert "\n" not in str(error.value)


def test_the_stamp_of_files_changes_with_each_of_them(tmp_path):
    items = [Item(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    for item in items:
        item.path.write_bytes(b"12345")
    before = last_maps.stamps_digest(items)
    assert last_maps.stamps_digest(items) == before
    items[1].path.write_bytes(b"54321")
    assert last_maps.stamps_digest(items) != before


# ---------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("arch", ["alexnet", "vgg16", "resnet18", "tiny"])
def test_what_is_described_is_the_last_map_after_its_relu(arch):
    """For flat networks that is the last ReLU without its pooling."""
    net = models.build(arch, sobel=arch != "tiny", seed=0).eval()
    with torch.no_grad():  # statistics that differ from layer to layer, as those of a trained net
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    item = Item(PICTURES / "cat.jpg")
    [[small, large]] = maps_of(net, [item], sizes=(64, 96))
    view = resized_view(item, last_maps.open_rgb(item.path), 96)
    with torch.no_grad():
        x = data.normalise(view[None])
        x = x if net.sobel is None else net.sobel(x)
        if arch == "resnet18":
            expected = net.activations(data.normalise(view[None]), ["layer4"])["layer4"][0]
        else:
            expected = net.features[:-1](x)[0]
    assert large.dtype == torch.float32 and small.shape[0] == expected.shape[0] and small.shape != large.shape
    torch.testing.assert_close(large, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_each_item_has_its_maps_in_order_whatever_the_workers():
    net = models.build("tiny", seed=0).eval()
    items = [
        Item(PICTURES / "cat.jpg"),
        Item(PICTURES / "coins.jpg"),
        Item(PICTURES / "cat.jpg", (0, 0, 99, 99)),
    ]
    alone = [maps_of(net, [item], (64, 96))[0] for item in items]
    for workers in (0, 2):
        together = maps_of(net, items, (64, 96), workers)
        assert [len(maps) for maps in together] == [2, 2, 2]
        assert all(torch.equal(a, b) for x, y in zip(alone, together) for a, b in zip(x, y))


def test_pretrained_is_torchvisions_vgg16_up_to_its_last_relu(monkeypatch):
    with torch.device("meta"):  # its classifier takes seconds and stays untouched
        net = vgg16(weights=None)
    net.features.to_empty(device="cpu")
    for parameter in net.features.parameters():
        torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1)
    monkeypatch.setattr(last_maps, "vgg16", lambda weights, progress: net)
    item = Item(PICTURES / "cat.jpg")
    view = resized_view(item, last_maps.open_rgb(item.path), 64)
    [[ours]] = maps_of(last_maps.open_model("pretrained", CPU), [item], (64,))
    with torch.no_grad():
        expected = net.features[:30](data.normalise(view[None]))[0]
    assert isinstance(net.features[30], torch.nn.MaxPool2d) and expected.shape[0] == 512
    assert expected.max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_pretrained_that_cannot_be_downloaded_is_one_line(monkeypatch):
    def offline(**_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(last_maps, "vgg16", offline)
    with pytest.raises(
        UserError, match=r"pretrained: .*Name or service not known.*put https://\S+\.pth"
    ) as error:
        last_maps.open_model("pretrained", CPU)
    assert "\n" not in str(error.value)


def test_networks_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    names = [str(tmp_path / "a"), str(tmp_path / "b"), "pretrained", "random:tiny", "random:tiny:sobel"]
    assert len({last_maps.model_digest(name) for name in names}) == 5
    with pytest.raises(UserError, match="no such checkpoint"):
        last_maps.model_digest(str(tmp_path / "c"))
    with pytest.raises(UserError, match="--model is missing"):
        last_maps.open_model(None, CPU)
    opened = last_maps.open_model("random:tiny", CPU).state_dict()
    again = weights.load("random:tiny").state_dict()
    assert all(torch.equal(opened[name], again[name]) for name in again)
