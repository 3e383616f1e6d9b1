"""Top images of each filter: against brute force, ties, broken files, the copies and the sheets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
from models.weights import load
from tests import tiny
from tests.helpers import refuses
from tools import make_shards
from visu import activ_retrieval


@pytest.fixture
def model(tmp_path) -> Path:
    net = tiny.tiny(False, seed=3)
    net.train()
    with torch.no_grad():  # batch norm that is not the identity
        net(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    checkpoint.save(tmp_path / "net.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    return tmp_path / "net.pth.tar"


def photos(folder: Path, count: int = 23) -> Path:
    """Smooth random pictures of several sizes in two folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize((40 + i, 60 - i), Image.Resampling.BICUBIC).save(path)
    return folder


def run(model: Path, images: Path, *flags: str) -> tuple[activ_retrieval.TopImages, Path]:
    exp = model.parent / "exp"
    command = ["--model", model, "--data", images, "--conv", "2", "--exp", exp, "--image-size", "32"]
    command += ["--workers", "0", "--device", "cpu", *flags]
    return activ_retrieval.main(activ_retrieval.get_parser().parse_args(list(map(str, command)))), exp


def brute_force(model: Path, folder: Path, conv: int) -> np.ndarray:
    """Mean activation of every image, one at a time, in the order of the list: (images, filters)."""
    net, images = load(model), data.list_images(folder)
    rows = []
    with torch.no_grad():
        for i in range(len(images)):
            view = data.central_crop(32)(images.decode(i))
            x = data.normalise(view[None])
            rows.append(net.activations(x, [f"conv{conv}"])[f"conv{conv}"][0].mean(dim=(1, 2)).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_top_images_equal_brute_force_on_stored_activations(tmp_path, model, batch):
    folder = photos(tmp_path / "images")
    means = brute_force(model, folder, conv=2)
    assert len(np.unique(means[means > 0])) > 200  # hardly any ties that rounding could break
    top, exp = run(model, folder, "--count", 4, "--batch", batch)
    images = data.list_images(folder)
    for channel in range(12):
        expected = np.argsort(-means[:, channel], kind="stable")[:4]
        np.testing.assert_array_equal(top.images[channel], expected)
        np.testing.assert_allclose(top.values[channel], means[expected, channel], rtol=1e-4, atol=1e-6)
        copies = sorted((exp / "conv2" / f"layer2-channel{channel}").iterdir())
        assert [path.name for path in copies] == [
            f"{rank}_{images.path(i).name}" for rank, i in enumerate(expected)
        ]
        for copy, i in zip(copies, expected):
            assert copy.read_bytes() == images.path(int(i)).read_bytes()


def test_ties_go_to_the_lower_index_whatever_the_order_and_size_of_batches():
    rng = np.random.default_rng(1)
    values = torch.from_numpy(rng.integers(0, 4, (50, 6)).astype(np.float32))  # ties everywhere
    expected = np.argsort(-values.numpy(), axis=0, kind="stable")[:7].T
    for size in (1, 3, 50):
        for order in (np.arange(50), rng.permutation(50)):
            top = activ_retrieval.TopImages(6, 7)
            for part in torch.from_numpy(order).split(size):
                top.add(values[part], part)
                assert top.values.shape[1] <= 7  # what is held does not grow with the images
            np.testing.assert_array_equal(top.images, expected)


def test_fewer_images_than_count_gives_all_of_them(tmp_path, model):
    top, exp = run(model, photos(tmp_path / "images", count=3))
    assert top.images.shape == (12, 3)
    assert len(list((exp / "conv2" / "layer2-channel0").iterdir())) == 3


def test_broken_images_are_left_out_and_named(tmp_path, model, capsys):
    folder = photos(tmp_path / "images", count=8)
    whole = (folder / "class1" / "03.png").read_bytes()
    (folder / "class0" / "00.png").write_bytes(b"not an image")
    (folder / "class1" / "03.png").write_bytes(whole[: len(whole) // 2])  # its header is good
    top, exp = run(model, folder, "--count", 8, "--batch", 3)
    out = capsys.readouterr().out
    assert "left out 1 of 8 images" in out and "left out" in out and "03.png: " in out
    assert "00.png\tnot an image" in (exp / "conv2" / "bad_images.txt").read_text()
    assert top.images.shape == (12, 6)
    copies = {path.name[2:] for path in (exp / "conv2" / "layer2-channel0").iterdir()}
    assert copies == {f"{i:02d}.png" for i in (1, 2, 4, 5, 6, 7)}


def test_only_broken_images_is_a_users_error(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no")
    with refuses("none of its images"):
        run(model, tmp_path / "images")


def test_shards_give_what_their_folder_gives(tmp_path, model):
    folder = photos(tmp_path / "images")
    arguments = [str(folder), str(tmp_path / "s-%02d.tar"), "--size-mb", "0.02"]
    make_shards.main(make_shards.get_parser().parse_args(arguments))
    expected, exp = run(model, folder, "--count", 3)
    names = sorted(path.name for path in (exp / "conv2" / "layer2-channel5").iterdir())
    command = ["--model", model, "--shards", tmp_path / "s-*.tar", "--conv", "2", "--exp", tmp_path / "other"]
    command += ["--image-size", "32", "--workers", "0", "--device", "cpu", "--count", "3"]
    found = activ_retrieval.main(activ_retrieval.get_parser().parse_args(list(map(str, command))))
    assert torch.equal(found.images, expected.images) and torch.equal(found.values, expected.values)
    copies = tmp_path / "other" / "conv2" / "layer2-channel5"
    assert sorted(path.name for path in copies.iterdir()) == names
    for name in names:
        assert (copies / name).read_bytes() == (exp / "conv2" / "layer2-channel5" / name).read_bytes()


@pytest.mark.parametrize(
    ("arch", "flags", "where"),
    [
        ("resnet18", ("--layer", "layer2"), "layer2/layer2-channel127"),
        ("toy", ("--layer", "b"), "b/layerb-channel19"),
    ],
)
def test_every_network_has_its_images(tmp_path, arch, flags, where):
    folder = photos(tmp_path / "images", count=4)
    run_of = ["--model", f"random:{arch}", "--data", folder, "--exp", tmp_path / "e", "--count", 2, *flags]
    run_of += ["--image-size", 32, "--workers", 0, "--device", "cpu"]
    activ_retrieval.main(activ_retrieval.get_parser().parse_args(list(map(str, run_of))))
    assert len(list((tmp_path / "e" / where).iterdir())) == 2


def test_sheet_shows_the_images_in_rows_of_filters_in_pages(tmp_path, model, monkeypatch):
    monkeypatch.setattr(activ_retrieval, "PAGE_ROWS", 5)
    folder = photos(tmp_path / "images", count=6)
    top, exp = run(model, folder, "--count", 3)
    pages = sorted((exp / "conv2").glob("layer2-page*.png"))
    assert [page.name for page in pages] == ["layer2-page0.png", "layer2-page1.png", "layer2-page2.png"]
    images = data.list_images(folder)
    picture = np.asarray(Image.open(pages[1]))  # filters 5 to 9
    for row in range(5):
        tile = np.asarray(activ_retrieval.thumbnail(images, int(top.images[5 + row, 2]), 32))
        x = picture.shape[1] - 100  # the last column: 96 pixels and a gap of 4
        found = [y for y in range(picture.shape[0] - 95) if (picture[y : y + 96, x : x + 96] == tile).all()]
        assert len(found) >= 1 and any(abs(y - (20 + row * 116)) < 12 for y in found)


def test_a_second_run_leaves_nothing_of_the_first(tmp_path, model):
    folder = photos(tmp_path / "images")
    run(model, folder, "--count", 5)
    _, exp = run(model, folder, "--count", 2)
    assert len(list((exp / "conv2" / "layer2-channel0").iterdir())) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--conv", "3"), "--conv 3: tiny has the maps conv1, conv2"),
        (("--count", "0"), "--count: 0"),
        (("--conv", "0"), "--conv: 0"),
        (("--shards", "x.tar"), "not allowed with"),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, flags, words):
    with refuses(words):
        run(model, photos(tmp_path / "images", count=2), *flags)
