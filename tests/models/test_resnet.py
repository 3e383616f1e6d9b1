"""ResNets: torchvision's, bit for bit, wider or with a small stem."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import checkpoint
import models
from models import weights
from tests.helpers import refuses

PARAMETERS = {  # without the classifier
    "resnet18": 11_176_512,
    "resnet50": 23_508_032,
    "resnet50w2": 93_907_072,
    "resnet50w4": 375_378_176,
    "resnet50w5": 586_450_240,
}


def state_of(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network of torchvision without its classifier."""
    return {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}


def their_forward(theirs: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The activations of torchvision's forward, by our names."""
    found = {"conv1.pre": theirs.bn1(theirs.conv1(x))}
    found["conv1"] = theirs.relu(found["conv1.pre"].clone())
    x = theirs.maxpool(found["conv1"])
    for n in (1, 2, 3, 4):
        x = found[f"layer{n}"] = getattr(theirs, f"layer{n}")(x)
    found["avgpool"] = theirs.avgpool(x).flatten(1)
    return found


def with_statistics(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1, generator=generator)
                module.bias.uniform_(-0.1, 0.1, generator=generator)
    return net.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("side", [64, 97])
def test_equals_torchvisions_bit_for_bit(arch, side):
    torch.manual_seed(0)
    theirs = with_statistics(getattr(torchvision.models, arch)())
    net = models.build(arch, seed=1).eval()
    net.load_state_dict(state_of(theirs))
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = their_forward(theirs, x)
        found = net.activations(x, list(expected))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        theirs.fc = nn.Identity()
        assert torch.equal(net(x), theirs(x))


def test_the_wide_one_equals_torchvisions_blocks_built_twice_as_wide():
    """torchvision's own wide networks widen only the inside of a bottleneck; here every layer is wider."""
    with torch.device("meta"):
        theirs = ResNet(Bottleneck, [3, 4, 6, 3])
        theirs.inplanes = 128
        theirs.conv1, theirs.bn1 = nn.Conv2d(3, 128, 7, 2, 3, bias=False), nn.BatchNorm2d(128)
        for n, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2))):
            setattr(theirs, f"layer{n + 1}", theirs._make_layer(Bottleneck, 128 * 2**n, blocks, stride))
    net = models.build("resnet50w2", seed=1)
    expected = {name: value.shape for name, value in state_of(theirs).items()}
    assert {name: value.shape for name, value in net.state_dict().items()} == expected
    assert net.feature_dim == 4096


def on_meta(arch: str, monkeypatch) -> models.Network:
    """The network without memory for its weights."""
    monkeypatch.setattr(nn.Module, "to_empty", lambda module, device: module)
    monkeypatch.setattr(models.resnet, "initialise", lambda *_: None)
    return models.build(arch)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_number_of_parameters(arch, monkeypatch):
    net = on_meta(arch, monkeypatch)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[arch]
    assert net.feature_dim == {"18": 512, "50": 2048, "w2": 4096, "w4": 8192, "w5": 10240}[arch[-2:]]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_are_torchvisions(arch):
    names = list(state_of(getattr(torchvision.models, arch)()))
    assert list(models.build(arch, seed=0).state_dict()) == names


def test_the_small_stem_keeps_the_size_and_has_no_pooling():
    net = models.build("resnet18s", seed=0).eval()
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        sides = {name: value.shape[-1] for name, value in net.activations(x, net.maps).items()}
    assert sides == {"conv1": 28, "layer1": 28, "layer2": 14, "layer3": 7, "layer4": 4}
    assert net.conv1.weight.shape == (64, 3, 3, 3)
    usual = models.build("resnet18", seed=0)
    assert net.state_dict().keys() == usual.state_dict().keys()
    with torch.no_grad():
        shapes = {name: value.shape[-1] for name, value in usual.eval().activations(x, net.maps).items()}
    assert shapes == {"conv1": 14, "layer1": 7, "layer2": 4, "layer3": 2, "layer4": 1}


def test_sobel_in_front_takes_two_channels():
    net = models.build("resnet18", sobel=True, seed=0).eval()
    assert net.conv1.weight.shape == (64, 2, 7, 7)
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        found = net.activations(x, ["sobel", "conv1.pre"])
        assert torch.equal(found["conv1.pre"], net.bn1(net.conv1(net.sobel(x))))
    assert found["sobel"].shape == (1, 2, 40, 40)


def test_first_weights_are_he_normal_and_batch_norm_is_trivial():
    net = models.build("resnet50", seed=0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert not module.running_mean.any() and (module.running_var == 1).all()


@pytest.mark.parametrize("arch", ["resnet18", "resnet18s", "resnet50"])
@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module."])
def test_files_load_however_they_are_wrapped(tmp_path, arch, sobel, wrap):
    net = with_statistics(models.build(arch, sobel, seed=2))
    state = dict(net.state_dict())
    if wrap == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    checkpoint.save(tmp_path / "x.pth", state if wrap == "bare" else {"state_dict": state})
    loaded = weights.load(tmp_path / "x.pth", ["layer2", "avgpool"])
    assert (loaded.arch, loaded.sobel is not None, loaded.training) == (arch, sobel, False)
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def test_the_width_of_a_file_is_seen_from_its_shapes():
    net = models.build("resnet50w2", seed=0)
    assert weights.guess_arch(net.state_dict()) == "resnet50w2"


@pytest.mark.parametrize("name", ["layer3.0.conv2.weight", "bn1.running_var"])
def test_a_missing_or_misshapen_parameter_is_an_error_that_names_it(tmp_path, name):
    state = dict(models.build("resnet18", seed=0).state_dict())
    checkpoint.save(tmp_path / "shape.pth", state | {name: torch.zeros(7)})
    with refuses(rf"shape.pth: {name} is \(7,\) in the file"):
        weights.load(tmp_path / "shape.pth")
    del state[name]
    checkpoint.save(tmp_path / "lacks.pth", state)
    with refuses(f"lacks.pth: does not fit resnet18: it lacks {name}"):
        weights.load(tmp_path / "lacks.pth")
    with refuses("resnet50 has no layer conv3; it has .*layer4"):
        weights.load("random:resnet50", ["conv3"])
