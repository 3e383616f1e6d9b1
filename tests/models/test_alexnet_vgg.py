"""AlexNet and VGG-16: names, shapes and first weights as the paper and the released files have them."""

import math

import pytest
import torch
from torch import nn

import models


def parameters_of(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    "arch, convs, linears, last_map",
    [
        ("alexnet", [0, 4, 8, 11, 14], [1, 4], (256, 6, 6)),
        ("vgg16", [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40], [0, 3], (512, 7, 7)),
    ],
)
def test_parameter_names_are_the_contract_of_released_checkpoints(arch, convs, linears, last_map):
    net = models.build(arch, sobel=True, num_clusters=11, seed=0)
    names = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    expected = {f"features.{i}.{part}" for i in convs for part in ("weight", "bias")}
    expected |= {
        f"features.{i + 1}.{p}" for i in convs for p in ("weight", "bias", "running_mean", "running_var")
    }
    expected |= {f"classifier.{i}.{part}" for i in linears for part in ("weight", "bias")}
    expected |= {
        f"{layer}.{part}" for layer in ("top_layer", "sobel.0", "sobel.1") for part in ("weight", "bias")
    }
    assert names == expected
    assert net.classifier[linears[0]].in_features == math.prod(last_map)
    assert net.maps == [f"conv{n + 1}" for n in range(len(convs))]


def test_alexnet_shapes_at_224_are_the_papers():
    net = models.build("alexnet", sobel=True, num_clusters=7, seed=0).eval()
    wanted = ["conv1", "conv2", "conv3", "conv4", "conv5", "pool", "fc6", "fc7.pre", "logits"]
    with torch.no_grad():
        found = net.activations(torch.randn(1, 3, 224, 224), wanted)
    shapes = {name: tuple(value.shape[1:]) for name, value in found.items()}
    assert shapes == {
        "conv1": (96, 55, 55),
        "conv2": (256, 27, 27),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "pool": (9216,),
        "fc6": (4096,),
        "fc7.pre": (4096,),
        "logits": (7,),
    }


def test_the_adaptive_pool_is_the_identity_at_224():
    net = models.build("alexnet", sobel=False, seed=0).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        trunk = net.features(x)
        assert torch.equal(net.activations(x, ["pool"])["pool"], trunk.flatten(1))


def test_initial_weights_have_the_papers_spread():
    net = models.build("alexnet", sobel=True, num_clusters=500, seed=0)
    for conv in parameters_of(net.features, nn.Conv2d):
        expected = math.sqrt(2 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert torch.count_nonzero(conv.bias) == 0
    for linear in parameters_of(net, nn.Linear):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert torch.count_nonzero(linear.bias) == 0


def test_activations_are_those_of_the_layers_called_one_by_one():
    net = models.build("vgg16", sobel=True, num_clusters=4, seed=0).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = net.activations(x, ["conv2.pre", "conv2", "fc7.pre", "fc7", "logits"])
        by_hand = net.features[:6](net.sobel(x))
        assert torch.equal(found["conv2"], by_hand)
        assert torch.equal(found["conv2.pre"], net.features[:5](net.sobel(x)))
        assert torch.equal(found["conv2.pre"].relu(), found["conv2"])
        assert (found["fc7.pre"] < 0).any()
        assert torch.equal(found["fc7.pre"].relu(), found["fc7"])
        assert torch.equal(net(x), found["logits"])
        assert torch.equal(net.top_layer(found["fc7"]), found["logits"])


def test_the_forward_pass_stops_at_the_last_layer_asked_for():
    net = models.build("alexnet", sobel=False, seed=0)
    net.features[8] = None  # conv3 would fail
    assert set(net.activations(torch.randn(1, 3, 64, 64), ["conv2"])) == {"conv2"}
