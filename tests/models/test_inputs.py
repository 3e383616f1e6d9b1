"""What a network was trained to see, as its checkpoint tells it, and that evaluations show it that."""

import json

import pytest
import torch

import checkpoint
import data
import eval_knn
import features
import models
from models import weights
from models.inputs import IMAGENET_STD, SWAV_STD, Inputs
from tests.helpers import refuses

CPU = torch.device("cpu")


def saved(path, embedding=False, **more):
    """A file of a small network, and what else stands in it."""
    net = models.build("tiny", seed=1)
    if embedding:
        net.set_embedding(8, 6, 5, seed=2)
    checkpoint.save(path, {"arch": "tiny", "state_dict": net.state_dict(), **more})
    return path


@pytest.mark.parametrize(
    "settings, size",
    [
        ({"image_size": 64}, 64),
        ({"size_crops": [32, 96]}, 96),  # the largest, wherever it stands
        ({"size_crops": [48]}, 48),
        ({"image_size": 40, "size_crops": [96]}, 40),
        ({"image_size": None, "size_crops": [96]}, 96),
        ({}, 224),
    ],
)
def test_size_is_the_runs_and_a_flag_wins(settings, size, tmp_path):
    inputs = weights.load(saved(tmp_path / "net.pth.tar", args=settings)).inputs
    assert inputs.size() == size and inputs.size(80) == 80
    assert f"images at {size} px (" in inputs.tell() and "at 80 px (--image-size)" in inputs.tell(80)
    told = "does not tell" if size == 224 else "as in the checkpoint"
    assert told in inputs.tell() and "std 0.229 0.224 0.225" in inputs.tell()
    assert features.Settings.choose(settings, CPU).image_size == size


def test_released_files_have_224_and_their_own_std(tmp_path):
    released = weights.load(saved(tmp_path / "a.pth.tar")).inputs
    swav = weights.load(saved(tmp_path / "b.pth.tar", embedding=True)).inputs
    ours = weights.load(saved(tmp_path / "c.pth.tar", embedding=True, args={"size_crops": [32]})).inputs
    assert (released.size(), released.std) == (224, (0.229, 0.224, 0.225))
    assert (swav.size(), swav.std, swav.mean) == (224, (0.228, 0.224, 0.225), (0.485, 0.456, 0.406))
    assert (ours.size(), ours.std) == (32, IMAGENET_STD)


def test_mean_and_std_that_a_checkpoint_tells_are_taken(tmp_path):
    told = Inputs(std=SWAV_STD).state_dict()
    net = weights.load(saved(tmp_path / "net.pth.tar", args={}, inputs=told))
    assert net.inputs.std == SWAV_STD and net.folded().inputs is net.inputs
    for wrong in ({"mean": [0.5] * 3}, {"mean": [0.5] * 3, "std": [0, 1, 1]}, {"mean": [0], "std": [1]}, 3):
        with refuses("damaged, its inputs"):
            weights.load(saved(tmp_path / "wrong.pth.tar", args={}, inputs=wrong))


@pytest.mark.parametrize("size", [10, "64", 10**6, 1.5])
def test_a_size_that_no_run_has_is_refused_unless_a_flag_gives_one(size, tmp_path):
    inputs = weights.load(saved(tmp_path / "net.pth.tar", args={"image_size": size})).inputs
    assert inputs.size(64) == 64
    with refuses("--image-size: the run's own is"):
        inputs.size()


def test_activations_are_of_images_normalised_as_the_network_saw_them(tmp_path):
    net = weights.load(saved(tmp_path / "net.pth.tar", embedding=True))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = data.Batch(pixels, torch.arange(2), [])
    ((found, _),) = features.activations_of(net, ["conv2"], [batch], CPU)
    with torch.no_grad():
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), SWAV_STD))
        expected = net.activations((pixels / 255 - mean) / std, ["conv2"])["conv2"]
    torch.testing.assert_close(found["conv2"], expected, rtol=1e-4, atol=1e-5)


def test_a_run_writes_what_it_saw_and_evaluations_show_it_that(finished, photos, tmp_path, capsys):
    state = checkpoint.read(finished / "checkpoint.pth.tar")
    assert state["inputs"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(photos)
    found = []
    for flags in ([], ["--image-size", "32"], ["--image-size", "48"]):
        settings = ["--data", tmp_path / "data", "--model", finished / "checkpoint.pth.tar", "--k", 3]
        settings += ["--exp", tmp_path, "--workers", 0, "--device", "cpu", *flags]
        found.append(eval_knn.main(eval_knn.get_parser().parse_args([*map(str, settings)])))
        protocol = json.loads((tmp_path / "results.json").read_text())["knn"]["protocol"]
        size = 48 if "48" in flags else 32
        assert protocol["view"] == f"central {size}x{size}, one crop"
        assert (
            f"images at {size} px ({flags[0] if flags else 'as in the checkpoint'})"
            in capsys.readouterr().out
        )
    assert found[0] == found[1] != found[2]
