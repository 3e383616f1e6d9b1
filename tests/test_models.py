import math

import pytest
import torch
from models.trunk import make_sobel
from torch import nn

import models
from util import UserError


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
    assert net.num_convs == len(convs)


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


@pytest.mark.parametrize("side", [16, 32, 64, 97])
def test_any_input_size_works(side):
    net = models.build("alexnet", sobel=True, num_clusters=3, seed=0).eval()
    with torch.no_grad():
        assert net(torch.randn(2, 3, side, side)).shape == (2, 3)


def test_sobel_is_the_gradient_of_the_grey_image():
    x = torch.zeros(1, 3, 6, 6)
    x[..., 3:] = torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1)  # a vertical edge: grey jumps by 6
    out = make_sobel()(x)
    assert torch.allclose(out[0, 0, 2, 2:4], torch.tensor([-24.0, -24.0]), atol=1e-5)  # 6 * (1 + 2 + 1)
    assert torch.allclose(out[0, 1, 2, 1:4], torch.zeros(3), atol=1e-5)  # nothing changes downwards
    assert not any(p.requires_grad for p in make_sobel().parameters())


def test_initial_weights_have_the_papers_spread():
    net = models.build("alexnet", sobel=True, num_clusters=500, seed=0)
    for conv in parameters_of(net.features, nn.Conv2d):
        expected = math.sqrt(2 / (conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert torch.count_nonzero(conv.bias) == 0
    for linear in parameters_of(net, nn.Linear):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
        assert torch.count_nonzero(linear.bias) == 0


def test_the_seed_alone_fixes_the_weights_and_the_head():
    torch.manual_seed(1)
    one = models.build("alexnet", sobel=True, num_clusters=5, seed=3)
    torch.manual_seed(2)
    two = models.build("alexnet", sobel=True, num_clusters=5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    two.set_head(5, seed=4)
    assert not torch.equal(one.top_layer.weight, two.top_layer.weight)
    assert torch.equal(one.classifier[1].weight, two.classifier[1].weight)


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


def test_a_layer_the_network_lacks_is_named():
    with pytest.raises(KeyError, match="conv6"):
        models.build("alexnet", False, seed=0).activations(torch.zeros(1, 3, 64, 64), ["conv6"])
    with pytest.raises(UserError, match=r"resnet.*alexnet, vgg16"):
        models.build("resnet", False)
