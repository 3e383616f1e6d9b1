"""DeeperCluster's geometry of VGG-16, its exact fold, and the forms in which its weights come."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import models
from models import weights
from models.vgg16 import fold_sobel
from tests.helpers import refuses

SIDES = [226, 226, 113, 113, 56, 56, 56, 28, 28, 28, 14, 14, 14]


@pytest.fixture(scope="module")
def wide():
    """With Sobel, biases and batch-norm statistics that are not the trivial ones."""
    net = models.build("vgg16wide", sobel=True, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in net.features:
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.bias.normal_(0, 0.1, generator=generator)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1, generator=generator)
                layer.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


def picture(side=64, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
@pytest.mark.parametrize("sobel", [True, False])
@torch.no_grad()
def test_maps_are_a_ring_larger(sobel):
    net = models.build("vgg16wide", sobel, seed=0).eval()
    found = net.activations(picture(224, 1), [*net.maps, "pool"])
    assert [found[name].shape[-1] for name in net.maps] == SIDES
    assert found["pool"].shape == (1, 512 * 7 * 7)


@torch.no_grad()
def test_sobel_and_the_first_convolution_fold_into_one_exactly(wide):
    folded, x = fold_sobel(wide), picture()
    assert folded.sobel is None and folded.features[0].weight.shape == (64, 3, 5, 5)
    taps = folded.features[0].weight
    assert (taps.abs().amax((0, 1)) > 0).all()  # all 25 of them
    assert torch.equal(taps[:, 0], taps[:, 1]) and torch.equal(taps[:, 0], taps[:, 2])
    before = F.conv2d(wide.sobel(x), wide.features[0].weight, wide.features[0].bias, padding=1)
    after = folded.features[0](x)
    assert after.shape == before.shape == (2, 64, 66, 66)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()  # the outermost ring too
    names = [name for name in wide.activation_names if name != "sobel"]
    expected, found = wide.activations(x, names), folded.activations(x, names)
    for name in names:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_tap_by_tap_the_fold_is_the_sum_of_products(wide):
    w1, sobel = wide.features[0].weight.double(), wide.sobel[1].weight.double()
    expected = torch.zeros(64, 5, 5, dtype=torch.float64)
    for p in range(3):
        for u in range(3):
            for r in range(3):
                for v in range(3):
                    expected[:, p + r, u + v] += sum(w1[:, g, p, u] * sobel[g, 0, r, v] for g in (0, 1)) / 3
    assert torch.allclose(fold_sobel(wide).features[0].weight[:, 1].double(), expected, atol=1e-6)


def test_what_cannot_be_folded_is_refused():
    for arch, sobel in (("vgg16wide", False), ("vgg16", True)):
        with pytest.raises(ValueError, match="only a vgg16wide with Sobel"):
            fold_sobel(models.build(arch, sobel, seed=0))


@torch.no_grad()
def test_a_folded_network_is_written_and_read_as_what_it_is(wide, tmp_path):
    folded, x = fold_sobel(wide), picture(32, 1)
    expected = folded.activations(x, ["conv1", "fc7"])
    state = folded.state_dict()
    checkpoint.save(tmp_path / "net.pth", {"arch": folded.arch, "state_dict": state})
    loaded = weights.load(tmp_path / "net.pth")
    assert (loaded.arch, loaded.sobel, loaded.features[0].padding) == ("vgg16folded", None, (3, 3))
    for name, value in loaded.activations(x, ["conv1", "fc7"]).items():
        assert torch.equal(value, expected[name])
    bare = {f"module.body.{name}": value for name, value in state.items()}  # as others would name it
    assert weights.model_weights(bare, "bare.pth")[0] == "vgg16folded"
    assert wide.arch == "vgg16wide" and wide.sobel is not None  # the one it was made of is what it was


def test_a_folded_network_is_drawn_as_its_own_architecture():
    net, again, other = (models.build("vgg16folded", seed=seed) for seed in (4, 4, 5))
    taps = net.features[0].weight
    assert taps.shape == (64, 3, 5, 5) and abs(taps.std().item() / (2 / (25 * 64)) ** 0.5 - 1) < 0.03
    assert torch.equal(taps, again.features[0].weight) and not torch.equal(taps, other.features[0].weight)
    assert torch.equal(net.classifier[3].bias, again.classifier[3].bias) and net.classifier[3].bias.any()
    with refuses("vgg16folded: holds Sobel in its first convolution"):
        models.build("vgg16folded", sobel=True)


def test_linear_layers_start_as_pytorchs_do():
    net, again = (models.build("vgg16wide", seed=4) for _ in range(2))
    bound = 1 / math.sqrt(25088)
    assert net.classifier[0].weight.abs().max() <= bound < 1.01 * net.classifier[0].weight.abs().max()
    assert torch.equal(net.classifier[3].bias, again.classifier[3].bias) and net.classifier[3].bias.any()


FORMS = {
    "module.body.": lambda name: f"module.{name}" if name.startswith("sobel.") else f"module.body.{name}",
    "body.": lambda name: name if name.startswith("sobel.") else f"body.{name}",
    "module.": lambda name: f"module.{name}",
    "features.module.": lambda name: name.replace("features.", "features.module."),
    "plain": lambda name: name,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sobel", [True, False])
@torch.no_grad()
def test_released_files_load_in_all_forms_of_their_names(form, sobel, tmp_path):
    net = models.build("vgg16wide" if "body" in form else "vgg16", sobel, seed=5).eval()
    x = picture(32, 1)
    expected = net.activations(x, ["conv1", "fc7"])
    state = {FORMS[form](name): value for name, value in net.state_dict().items()}
    lean = {k: v for k, v in state.items() if "num_batches_tracked" not in k and "sobel." not in k}
    for number, content in enumerate([{"state_dict": state}, lean]):
        path = tmp_path / f"{number}.pth"
        checkpoint.save(path, content)
        loaded = weights.load(path)
        assert loaded.arch == net.arch and (loaded.sobel is not None) == sobel
        for name, value in loaded.activations(x, ["conv1", "fc7"]).items():
            assert torch.equal(value, expected[name])


def test_a_classifier_comes_along_and_a_file_of_a_head_alone_is_an_error(tmp_path):
    net = models.build("vgg16", seed=5)
    state = {f"module.body.{name}": value for name, value in net.state_dict().items()}
    state |= {"module.pred_layer.weight": torch.zeros(4, 4096), "module.pred_layer.bias": torch.zeros(4)}
    checkpoint.save(tmp_path / "net.pth", {"state_dict": state})
    assert weights.load(tmp_path / "net.pth").top_layer.out_features == 4
    for name, head in (
        ("one", {"module.weight": torch.zeros(4, 4096), "module.bias": torch.zeros(4)}),
        ("two", {"pred_layer.weight": torch.zeros(4, 4096), "pred_layer.bias": torch.zeros(4)}),
    ):
        checkpoint.save(tmp_path / f"{name}.pth", {"state_dict": head})
        with refuses("not a network of this repository"):
            weights.load(tmp_path / f"{name}.pth")
