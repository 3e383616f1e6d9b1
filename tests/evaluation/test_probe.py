"""Probes: pooling layer by layer, how they start, frozen networks, what is counted, which epoch is best."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import models
import util
from evaluation import probe
from evaluation.probe import Fingerprint, Frozen, History, Probes, Tally, make_pooling
from models import weights
from tests.tiny import tiny

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    "conv, shape, values, window",
    [
        (1, (96, 55, 55), 9600, (6, 3)),
        (2, (256, 27, 27), 9216, (4, 0)),
        (3, (384, 13, 13), 9600, (3, 1)),
        (4, (384, 13, 13), 9600, (3, 1)),
        (5, (256, 13, 13), 9216, (2, 0)),
    ],
)
def test_alexnets_pooling_is_the_authors_at_224_pixels(conv, shape, values, window):
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(conv))
    pooled = make_pooling("alexnet", f"conv{conv}", shape)(x)
    assert pooled[0].numel() == values
    size, padding = window
    torch.testing.assert_close(pooled, F.avg_pool2d(x, size, size, padding))
    padded = F.pad(x, [padding] * 4)
    torch.testing.assert_close(
        pooled[:, :, 1, 2], padded[:, :, size : 2 * size, 2 * size : 3 * size].mean((2, 3))
    )


def test_alexnets_maps_at_224_pixels_have_the_authors_sizes():
    trunk = Frozen(models.build("alexnet", seed=0), [f"conv{i}" for i in range(1, 6)], 224, CPU)
    assert trunk.values == [9600, 9216, 9600, 9600, 9216]
    assert all(isinstance(pool, nn.AvgPool2d) for pool in trunk.pools)


@pytest.mark.parametrize(
    "channels, side, pooled",
    [(64, 224, 12), (128, 112, 8), (256, 56, 6), (512, 28, 4), (512, 14, 4), (512, 2, 2)],
)
def test_vggs_pooling_is_the_largest_under_10000_values(channels, side, pooled):
    x = torch.rand(1, channels, side, side)
    out = make_pooling("vgg16", "conv1", x.shape[1:])(x)
    assert out.shape == (1, channels, pooled, pooled)
    assert channels * pooled**2 < 10_000 and (channels * (pooled + 1) ** 2 >= 10_000 or pooled == side)


def test_map_of_more_than_10000_channels_keeps_one_value_of_each():
    """layer4 of a ResNet-50 five times as wide."""
    x = torch.rand(1, 10_240, 7, 7)
    torch.testing.assert_close(
        make_pooling("resnet50w5", "layer4", x.shape[1:])(x)[..., 0, 0], x.mean((2, 3))
    )


def test_resnets_layers_are_pooled_and_vectors_stay_as_they_are():
    net = models.build("resnet50", seed=0)
    trunk = Frozen(net, [*net.maps, "avgpool"], 224, CPU)
    sides = [12, 6, 4, 3, 2]
    channels = [64, 256, 512, 1024, 2048]
    assert trunk.values == [c * s * s for c, s in zip(channels, sides)] + [2048]
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    *maps, vector = trunk(x)
    with torch.no_grad():
        found = net.eval().activations(x, ["layer4", "avgpool"])
    torch.testing.assert_close(vector, found["avgpool"])
    torch.testing.assert_close(maps[-1], F.adaptive_avg_pool2d(found["layer4"], 2).flatten(1))


@pytest.mark.parametrize("size", [16, 33, 64, 96, 128, 180, 227, 256, 448])
def test_any_input_size_gives_each_layer_under_10000_values_that_see_nearly_all_of_the_map(size):
    net = models.build("alexnet", sobel=True, seed=0).eval()
    names = [f"conv{conv}" for conv in range(1, 6)]
    with torch.no_grad():
        maps = net.activations(torch.zeros(1, 3, size, size), names)
    for name in names:
        x = torch.zeros_like(maps[name])[:, :1].requires_grad_()
        out = make_pooling("alexnet", name, maps[name].shape[1:])(x)
        assert 1 <= out.numel() * maps[name].shape[1] < 10_000
        out.sum().backward()
        assert (x.grad > 0).float().mean() > 0.75


# ---------------------------------------------------------------------------------------- which layers


def test_layers_come_once_in_the_order_of_the_network():
    net = models.build("resnet18", seed=0)
    assert probe.choose_layers(net, [1], ["avgpool", "layer2", "conv1"]) == ["conv1", "layer2", "avgpool"]
    assert probe.choose_layers(tiny(seed=0), [2, 1, 2], []) == ["conv1", "conv2"]
    assert probe.choose_layers(tiny(seed=0), [], ["fc7", "fc7.pre"]) == ["fc7.pre", "fc7"]


@pytest.mark.parametrize(
    "arch, conv, message",
    [
        ("alexnet", 6, "--conv 6: alexnet has no such layer; it has convolutions 1 to 5"),
        ("alexnet", 0, "--conv 0: alexnet has no such layer; it has convolutions 1 to 5"),
        ("vgg16", 14, "--conv 14: vgg16 has no such layer; it has convolutions 1 to 13"),
        (
            "resnet18",
            2,
            "--conv 2: resnet18 has no such layer; it has conv1; --layers takes conv1, layer1, layer2, "
            "layer3, layer4, avgpool",
        ),
    ],
)
def test_convolution_that_is_not_there_is_told(arch, conv, message):
    with pytest.raises(util.UserError) as caught:
        probe.choose_layers(models.build(arch, seed=0), [1, conv], [])
    assert str(caught.value) == message


def test_random_network_is_the_one_that_training_starts_from():
    net = weights.load("random:alexnet:sobel", seed=4)
    start = models.build("alexnet", sobel=True, seed=util.derive_seed(4, "weights"))
    found, expected = net.state_dict(), start.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert weights.load("random:alexnet", seed=4).sobel is None


# ---------------------------------------------------------------------------------------- classifiers, frozen


def test_classifier_starts_as_torchs_linear_by_seed_and_layer_alone():
    layers = ["conv1", "conv2", "fc7"]
    made = Probes(Frozen(tiny(seed=0), layers, 32, CPU), 7, seed=4)
    torch.manual_seed(util.derive_seed(4, "probe", "conv2"))
    expected = nn.Linear(made.trunk.values[1], 7)
    assert torch.equal(made.classifiers[1].weight, expected.weight)
    assert torch.equal(made.classifiers[1].bias, expected.bias)
    alone = Probes(Frozen(tiny(seed=0), ["conv2"], 32, CPU), 7, seed=4)
    assert torch.equal(alone.classifiers[0].weight, expected.weight)
    other = Probes(Frozen(tiny(seed=0), ["conv2"], 32, CPU), 7, seed=5)
    assert not torch.equal(other.classifiers[0].weight, expected.weight)


def test_making_a_classifier_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    probe.make_linear(4, 2, seed=1)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("arch", ["tiny", "resnet18s"])
def test_trunk_stays_in_eval_mode_and_only_classifiers_train(arch):
    net = tiny(sobel=True, seed=0) if arch == "tiny" else models.build(arch, seed=0)
    fingerprint = Fingerprint(net)
    made = Probes(Frozen(net, [net.maps[0], net.output], 32, CPU), 3, seed=0)
    made.train()
    assert not any(module.training for module in made.trunk.modules())
    made(torch.rand(8, 3, 32, 32))[0].sum().backward()
    fingerprint.check(net)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        f"classifiers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert all(p.grad is None for p in net.parameters())


def test_fingerprint_sees_a_statistic_that_moved_and_is_kept():
    net = tiny(seed=0)
    fingerprint = Fingerprint(net)
    fingerprint.load_state_dict(Fingerprint(tiny(seed=0)).state_dict())
    with pytest.raises(ValueError, match="another network"):
        fingerprint.load_state_dict(Fingerprint(tiny(seed=1)).state_dict())
    net.train()(torch.rand(4, 3, 32, 32))
    with pytest.raises(RuntimeError, match="frozen network moved"):
        fingerprint.check(net)


def test_chunks_give_the_rows_of_one_pass(monkeypatch):
    trunk = Frozen(tiny(seed=0), ["conv1", "fc7"], 32, CPU)
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = trunk(x)
    monkeypatch.setattr(probe, "CHUNK", 2)
    for one, other in zip(whole, trunk(x)):
        torch.testing.assert_close(one, other)
    assert [rows.shape for rows in trunk(x[:0])] == [(0, values) for values in trunk.values]


def test_classifiers_are_fp32_under_autocast():
    made = Probes(Frozen(tiny(seed=0), ["conv1"], 32, CPU), 3, seed=0)
    x = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, rows = made(x)[0], made.trunk(x)[0]
    assert logits.dtype == rows.dtype == torch.float32
    assert torch.equal(logits, made.classifiers[0](rows))


# ---------------------------------------------------------------------------------------- what is counted


def test_precision_at_5_counts_the_five_highest_or_all_of_fewer_classes():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    assert probe.count(torch.tensor(1.5), scores, torch.tensor([0, 4, 5])).tolist() == [1.5, 1, 2, 3]
    assert probe.count(torch.tensor(0.0), scores[:, :3], torch.tensor([0, 1, 2])).tolist() == [0, 1, 3, 3]
    assert probe.count(torch.tensor(0.0), scores[:0], torch.tensor([], dtype=torch.int64)).tolist() == [0] * 4


def test_mean_of_softmaxes_is_not_the_softmax_of_means():
    """One crop that is sure of class 1 outweighs in the logits, but not in the probabilities."""
    logits = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 50.0]])
    ((loss, first, five, images),) = probe.judge([logits], torch.tensor([0])).tolist()
    assert (first, five, images) == (1.0, 1.0, 1.0)
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))  # of crop 4


def test_judge_of_single_crops_is_cross_entropy_and_hits():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    target = torch.tensor([0, 1])
    ((loss, first, *_),) = probe.judge([logits], target).tolist()
    assert loss == pytest.approx(F.cross_entropy(logits, target, reduction="sum").item())
    assert first == 1


def test_tally_is_means_and_percents_and_goes_on_from_its_state():
    tally = Tally(2)
    tally.add(torch.tensor([[4.0, 1, 2, 4], [8.0, 0, 4, 4]], dtype=torch.float64))
    other = Tally(2)
    other.load_state_dict(tally.state_dict())
    for one in (tally, other):
        one.add(torch.tensor([[1.0, 1, 1, 1], [1.0, 0, 0, 1]], dtype=torch.float64))
        assert one.records() == [
            {"loss": 1.0, "prec@1": 40.0, "prec@5": 60.0},
            {"loss": 1.8, "prec@1": 0.0, "prec@5": 80.0},
        ]
    tally.clear()
    assert tally.sums.sum() == 0 and other.sums.sum() > 0


# ---------------------------------------------------------------------------------------- which epoch


def history_of(held_out: list[float], val: list[float]) -> History:
    history = History(["conv1"], "held_out")
    for epoch, (held, other) in enumerate(zip(held_out, val)):
        splits = {name: [{"loss": 1.0, "prec@1": v, "prec@5": 100.0}] for name, v in
                  (("train", 0.0), ("val", other), ("held_out", held))}  # fmt: skip
        history.add(epoch, 3 * (epoch + 1), splits)
    return history


def test_best_epoch_is_the_earliest_of_the_highest_on_the_split_that_chooses():
    history = history_of([50.0, 70.0, 70.0], [90.0, 20.0, 80.0])
    assert (history.best("conv1")["epoch"], history.best("conv1")["val"]["prec@1"]) == (1, 20.0)
    assert (history.last("conv1")["epoch"], history.last("conv1")["steps"]) == (2, 9)
    (result,) = history.results([9600])
    assert (result["layer"], result["values"], result["best chosen on"]) == ("conv1", 9600, "held_out")
    assert "val loss 1.0000 prec@1 80.00 prec@5 100.00" in history.line("conv1")
    again = History(["conv1"], "held_out")
    again.load_state_dict(history.state_dict())
    assert again.records == history.records


def test_files_of_a_classifier_are_its_log_its_best_and_its_last_epoch(tmp_path):
    made = Probes(Frozen(tiny(seed=0), ["conv1"], 32, CPU), 3, seed=0)
    held, val = [50.0, 70.0, 70.0], [90.0, 20.0, 80.0]
    for epochs in (1, 2, 3):
        with torch.no_grad():
            made.classifiers[0].bias.fill_(epochs)
        probe.write_classifiers(tmp_path, made, history_of(held[:epochs], val[:epochs]), {"crops": "one"})
    best, last = (checkpoint.read(tmp_path / f"conv1_{which}.pth.tar") for which in ("best", "last"))
    assert (best["epoch"], last["epoch"], last["best_epoch"]) == (2, 3, 1)
    assert best["state_dict"]["bias"].tolist() == [2.0] * 3
    assert last["state_dict"]["bias"].tolist() == [3.0] * 3
    assert (last["layer"], last["protocol"], last["steps"]) == ("conv1", {"crops": "one"}, 9)
    lines = (tmp_path / "conv1_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == last["log"]
