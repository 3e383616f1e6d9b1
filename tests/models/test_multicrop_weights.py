"""Files of SwAV and DeepCluster-v2 in all their forms, torchvision's, and what their forward pass does."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.nn import functional as F

import checkpoint
import hubconf
import models
from models import weights
from tests.helpers import refuses
from tests.models.test_resnet import state_of, with_statistics
from training.multicrop import freeze_prototypes, optimizer_and_schedule

ONE, SEVERAL = 7, [5, 4, 3]


def swav_net(prototypes=ONE, hidden=8, arch="resnet18"):
    net = models.build(arch, seed=1)
    net.set_embedding(hidden, 6, prototypes, seed=2)
    return with_statistics(net)


def picture(side=48, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


WRAPS = {
    "bare": lambda state: state,
    "bare, module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "state_dict, module.": lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("prototypes, hidden", [(ONE, 8), (SEVERAL, 8), (None, 8), (ONE, 0), ([9], 8)])
@torch.no_grad()
def test_every_form_loads_with_head_and_prototypes_as_they_are(wrap, prototypes, hidden, tmp_path):
    net, path, x = swav_net(prototypes, hidden), tmp_path / "swav.pth.tar", picture()
    checkpoint.save(path, WRAPS[wrap](dict(net.state_dict())))
    loaded = weights.load(path)
    assert loaded.arch == "resnet18" and loaded.top_layer is None
    assert (loaded.prototypes is None) == (prototypes is None)
    names = [*net.maps, "avgpool", "embedding"]
    expected = net.activations(x, names)
    for name, value in loaded.activations(x, names).items():
        assert torch.equal(value, expected[name]), name
    assert torch.allclose(expected["embedding"].norm(dim=1), torch.ones(2))
    for ours, theirs in zip(loaded([x])[1], net([x])[1], strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_trunk_alone_loads_and_a_key_that_it_lacks_is_named(tmp_path):
    net, path = swav_net(), tmp_path / "trunk.pth.tar"
    trunk = {f"module.{n}": v for n, v in net.state_dict().items() if "head" not in n and "proto" not in n}
    checkpoint.save(path, trunk)
    loaded = weights.load(path)
    assert loaded.projection_head is None and loaded.prototypes is None
    assert torch.equal(loaded(picture()), net.activations(picture(), ["avgpool"])["avgpool"])
    checkpoint.save(path, trunk | {"module.prototypes.weight": torch.zeros(5, 6)})  # useless without a head
    assert weights.load(path).prototypes is None
    del trunk["module.layer3.1.conv2.weight"]
    checkpoint.save(path, trunk)
    with refuses(r"lacks layer3\.1\.conv2\.weight"):
        weights.load(path)


@torch.no_grad()
def test_torchvisions_file_loads_with_its_classifier(tmp_path):
    torch.manual_seed(0)
    theirs = with_statistics(torchvision.models.resnet50(num_classes=9))
    checkpoint.save(tmp_path / "tv.pth", dict(theirs.state_dict()))
    net = hubconf.resnet50(tmp_path / "tv.pth")
    assert net.top_layer.out_features == 9 and torch.equal(net(picture()), theirs(picture()))


@torch.no_grad()
def test_hub_opens_a_released_file_of_resnet50(tmp_path):
    torch.manual_seed(0)
    theirs = with_statistics(torchvision.models.resnet50())
    state = state_of(theirs) | {
        "projection_head.0.weight": torch.randn(16, 2048) / 45, "projection_head.0.bias": torch.zeros(16),
        "projection_head.1.weight": torch.ones(16), "projection_head.1.bias": torch.zeros(16),
        "projection_head.1.running_mean": torch.zeros(16), "projection_head.1.running_var": torch.ones(16),
        "projection_head.1.num_batches_tracked": torch.tensor(3),
        "projection_head.3.weight": torch.randn(6, 16) / 4, "projection_head.3.bias": torch.zeros(6),
        "prototypes.weight": torch.randn(11, 6),
    }  # fmt: skip
    checkpoint.save(tmp_path / "swav.pth.tar", {f"module.{n}": v for n, v in state.items()})
    net = hubconf.resnet50(tmp_path / "swav.pth.tar")
    assert net.prototypes.weight.shape == (11, 6) and not net.training
    theirs.fc = torch.nn.Identity()
    x = picture()
    assert torch.equal(net.activations(x, ["avgpool"])["avgpool"], theirs(x))
    names = {n.removesuffix(".num_batches_tracked") for n in state}
    assert {n.removesuffix(".num_batches_tracked") for n in net.state_dict()} == names  # theirs exactly


# ------------------------------------------------------------------------------------ the forward pass


def test_one_call_of_the_trunk_for_each_run_of_equal_sizes():
    net, calls = swav_net(arch="toy"), []
    net.one.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    crops = [picture(side) for side in (32, 32, 24, 24, 24, 32)]
    z, (scores,) = net(crops)
    assert calls == [(4, 3, 32, 32), (6, 3, 24, 24), (2, 3, 32, 32)]
    assert z.shape == (12, 6) and scores.shape == (12, ONE)


@torch.no_grad()
def test_rows_are_crop_major_and_those_of_each_crop_alone():
    net, crops = swav_net(), [picture(side, 3) for side in (48, 48, 32)]
    z, (scores,) = net(crops)
    for v, crop in enumerate(crops):
        alone, (said,) = net([crop])
        assert torch.allclose(z[3 * v : 3 * v + 3], alone, atol=1e-5)
        assert torch.allclose(scores[3 * v : 3 * v + 3], said, atol=1e-5)


def test_statistics_move_once_for_each_size_and_the_heads_once_for_all():
    net = swav_net().train()
    before = [module.num_batches_tracked.item() for module in (net.bn1, net.projection_head[1])]
    crops = [picture(48, 3), picture(48, 3), picture(32, 3)]
    net(crops)
    after = [module.num_batches_tracked.item() for module in (net.bn1, net.projection_head[1])]
    assert [b - a for a, b in zip(before, after)] == [2, 1]
    head, seen = net.projection_head, []
    head[1].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    net(crops)
    assert seen == [9]


def test_prototypes_are_normalised_and_frozen_ones_do_not_move():
    net = swav_net(arch="toy").train()
    settings = dict(base_lr=0.5, final_lr=0.5, wd=1e-3, epochs=1, warmup_epochs=0, start_warmup=0, larc=True)
    optimizer, _ = optimizer_and_schedule(SimpleNamespace(args=SimpleNamespace(**settings)), net, 4)
    assert not torch.allclose(net.prototypes.weight.norm(dim=1), torch.ones(ONE), atol=1e-3)
    weights_of = []
    for step in range(4):
        net.prototypes.normalise()
        assert torch.allclose(net.prototypes.weight.norm(dim=1), torch.ones(ONE), atol=1e-6)
        weights_of.append(net.prototypes.weight.detach().clone())
        _, (scores,) = net([picture(32)])
        optimizer.zero_grad()
        F.cross_entropy(scores / 0.1, torch.tensor([0, 1])).backward()
        freeze_prototypes(net.prototypes, 3, step)
        assert (net.prototypes.weight.grad is None) == (step < 3)
        assert net.prototypes.weight not in optimizer.optimizer.state  # no momentum from before
        optimizer.step()
    assert torch.allclose(weights_of[0], weights_of[3], atol=1e-6)
    assert not torch.allclose(net.prototypes.weight, weights_of[3], atol=1e-6)
