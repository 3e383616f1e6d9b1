"""What every network promises, whichever it is: the one interface that evaluations and pictures ask."""

import pytest
import torch
from torch import nn

import models
from models.network import Network, Pool, make_sobel
from tests.helpers import refuses

SMALL = ("tiny", "toy", "resnet18", "resnet18s")
LARGE = tuple(pytest.param(arch, marks=pytest.mark.slow) for arch in ("alexnet", "vgg16", "resnet50"))
ARCHITECTURES = [*SMALL, *LARGE]
every_network = pytest.mark.parametrize("arch", ARCHITECTURES)


def trained(arch: str, sobel: bool = True, head: int | None = 5) -> Network:
    """A network in eval mode whose batch norms are not trivial."""
    net = models.build(arch, sobel, head, seed=3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
                module.bias.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
        net.train()(images(6))
    return net.eval()


def images(n: int = 2, side: int = 48) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def test_the_list_here_is_all_that_can_be_built_but_the_wide_ones():
    names = {arch if isinstance(arch, str) else arch.values[0] for arch in ARCHITECTURES}
    wide = {"resnet50w2", "resnet50w4", "resnet50w5", "vgg16wide", "vgg16folded"}
    assert set(models.ARCHITECTURES) - names == wide


@every_network
@pytest.mark.parametrize("sobel", [False, True])
def test_one_forward_gives_every_named_activation_in_order(arch, sobel):
    net = trained(arch, sobel)
    names = net.activation_names
    assert len(set(names)) == len(names)
    assert names[-1] == "logits" and ("sobel" in names) == sobel and net.arch == arch
    assert [name for name in names if name in net.maps] == net.maps
    assert {net.feature, net.output} <= set(names)
    with torch.no_grad():
        together = net.activations(images(), reversed(names))
        assert list(together) == names
        for name in names:  # each alone is the same
            assert torch.equal(net.activations(images(), [name])[name], together[name])
        assert torch.equal(net(images()), together["logits"])
    for name in net.maps:
        assert together[name].ndim == 4
    sides = [together[name].shape[-1] for name in net.maps]
    assert sides == sorted(sides, reverse=True)
    for name in (net.feature, net.output):
        assert together[name].shape == (2, net.feature_dim)
    assert together["logits"].shape == (2, 5)
    if sobel:
        assert torch.equal(together["sobel"], net.sobel(images()))


@every_network
def test_the_forward_pass_stops_at_the_last_name(arch):
    net, called = trained(arch), []
    for _, layer in net.walk():
        layer.register_forward_hook(lambda *_: called.append(1))
    layers = [name for name, _ in net.walk()]
    for name in (net.maps[0], net.maps[-1], net.feature):
        called.clear()
        net.activations(images(), [name])
        assert len(called) == layers.index(name) + 1
    assert len(called) < len(layers)


@every_network
def test_a_name_it_lacks_is_an_error_that_names_it(arch):
    net = models.build(arch, seed=0).eval()
    for name in ("conv99", "logits"):
        with pytest.raises(KeyError, match=f"{arch} has no activation '{name}'"):
            net.activations(images(), [net.maps[0], name])


@every_network
def test_without_a_head_the_output_comes_out(arch):
    net = trained(arch, head=None)
    with torch.no_grad():
        assert torch.equal(net(images()), net.activations(images(), [net.output])[net.output])
    assert "logits" not in net.activation_names


@every_network
def test_parts_share_out_the_parameters_of_the_body(arch):
    net = models.build(arch, True, 5, seed=0)
    convolutions, rest = net.parts()
    parts = [*convolutions.parameters(), *rest.parameters()]
    body = list(net.body_parameters())
    assert [id(p) for p in parts] == [id(p) for p in body] and len({id(p) for p in body}) == len(body)
    outside = [*net.top_layer.parameters(), *net.sobel.parameters()]
    assert {id(p) for p in net.parameters()} == {id(p) for p in [*body, *outside]}
    assert not {id(p) for p in body} & {id(p) for p in outside}
    assert any(isinstance(module, nn.Conv2d) for module in convolutions.modules())
    assert not any(isinstance(module, nn.Conv2d) for module in rest.modules())


@every_network
def test_all_of_the_body_and_the_head_train_and_sobel_does_not(arch):
    net = models.build(arch, True, 5, seed=0)
    net(images(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.body_parameters())
    assert net.top_layer.weight.grad is not None
    assert all(p.grad is None for p in net.sobel.parameters())


@every_network
def test_the_seed_alone_fixes_the_weights_and_the_head(arch):
    torch.manual_seed(1)
    one = models.build(arch, True, 5, seed=3)
    torch.manual_seed(2)
    two = models.build(arch, True, 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    two.set_head(5, seed=4)
    assert not torch.equal(one.top_layer.weight, two.top_layer.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.body_parameters(), two.body_parameters()))
    one.set_head(7, seed=4)
    assert one.top_layer.weight.shape == (7, one.feature_dim) and not one.top_layer.bias.any()
    other = models.build(arch, True, 5, seed=6)
    assert not all(torch.equal(a, b) for a, b in zip(one.body_parameters(), other.body_parameters()))


@every_network
@pytest.mark.parametrize("side", [32, 33, 61, 97, 224])
def test_any_input_size_works(arch, side):
    net = models.build(arch, True, 3, seed=0).eval()
    with torch.no_grad():
        found = net.activations(images(2, side), [*net.maps, net.feature, "logits"])
    assert found["logits"].shape == (2, 3) and found[net.feature].shape == (2, net.feature_dim)
    assert all(torch.isfinite(value).all() for value in found.values())


@every_network
@pytest.mark.parametrize("sobel", [False, True])
def test_folded_is_the_same_network_without_the_batch_norms_behind_convolutions(arch, sobel):
    net = trained(arch, sobel)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded, x = net.folded(), images(3)
    assert folded.activation_names == net.activation_names and folded.maps == net.maps
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        ours, plain = (one.activations(x, net.activation_names) for one in (folded, net))
    for name, value in plain.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) > 0


def test_sobel_is_the_gradient_of_the_grey_image():
    x = torch.zeros(1, 3, 6, 6)
    x[..., 3:] = torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1)  # a vertical edge: grey jumps by 6
    out = make_sobel()(x)
    assert torch.allclose(out[0, 0, 2, 2:4], torch.tensor([-24.0, -24.0]), atol=1e-5)  # 6 * (1 + 2 + 1)
    assert torch.allclose(out[0, 1, 2, 1:4], torch.zeros(3), atol=1e-5)  # nothing changes downwards
    assert not any(p.requires_grad for p in make_sobel().parameters())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_pooling_shrinks_to_a_map_smaller_than_its_window(side):
    x = images(1, side)
    found = Pool(3, 2)(x)
    if side >= 3:
        assert torch.equal(found, nn.functional.max_pool2d(x, 3, 2))
    else:
        assert torch.equal(found, x.amax((-2, -1), keepdim=True))


def test_an_architecture_that_is_none_is_refused_with_those_there_are():
    with refuses(r"--arch resnet: unknown.*alexnet, vgg16, vgg16wide, resnet18"):
        models.build("resnet", False)


@pytest.mark.parametrize(("arch", "at"), [("tiny", "conv2"), ("toy", "a"), ("resnet18s", "layer3")])
def test_a_network_is_split_at_an_activation(arch, at):
    net = models.build(arch, sobel=True, num_clusters=3, seed=1).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = net.activations(x, [at, net.output])
    front, behind = net.split(at)
    assert torch.equal(front(x), found[at]) and torch.equal(behind(found[at]), found[net.output])
    own = {id(p) for p in net.parameters()} - {id(p) for p in net.top_layer.parameters()}
    assert {id(p) for part in (front, behind) for p in part.parameters()} == own
