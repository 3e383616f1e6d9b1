"""The linear probe by protocol: what a preset sets is what runs, VOC07, folds, resumed bit for bit."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import eval_linear
import util
from data.crops import train_crop
from evaluation.protocols import LINEAR
from tests.helpers import equal, refuses
from tests.linear_runs import COLOURS, assert_same_classifier, evaluate, folder, model, run  # noqa: F401
from tests.voc_folder import make_voc
from training.run import Run

# Of the tiny network, whose maps are conv1 and conv2.
SWAV = ("--protocol", "swav", "--global_pooling", "false", "--use_bn", "true", "--lr", 0.05)
SMALL = ("--batch", 7, "--layers", "conv1", "conv2", "fc7")


@pytest.fixture(scope="module")
def vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"), number=14)


def voc_run(vocdir: Path, exp: Path, *flags) -> list[dict]:
    """As on VOC07, of the tiny network, for which grid stands in for VGG-16's windows."""
    words = ["--vocdir", vocdir, "--protocol", "deepercluster", "--model", "random:tiny", "--exp", exp]
    words += ["--pooling", "grid", "--conv", 2, "--image-size", 32, "--epochs", 2, "--batch", 8]
    words += ["--device", "cpu", "--workers", 0, "--split", "train", *flags]
    return eval_linear.main(eval_linear.get_parser().parse_args([*map(str, words)]))


def protocol_of(exp: Path) -> dict:
    return json.loads((exp / "results.json").read_text())["linear"]["protocol"]


class Watch:
    """What a training pass was given."""

    def __init__(self, monkeypatch) -> None:
        self.rates, self.passes, inner = [], [], Run.train_pass

        def train_pass(run, net, optimizers, view, order, loss, *, schedule):
            self.passes.append(
                (net, view, [group["weight_decay"] for o in optimizers for group in o.param_groups])
            )
            self.rates.append([one(run.iteration) for one in schedule])
            return inner(run, net, optimizers, view, order, loss, schedule=schedule)

        monkeypatch.setattr(Run, "train_pass", train_pass)


# ------------------------------------------------------------------------------- what is set is what runs


def test_swavs_protocol_runs_all_layers_with_its_settings(run, monkeypatch, tmp_path, capsys):
    watch = Watch(monkeypatch)
    run("--protocol", "swav", "--model", "random:resnet18s", "--image-size", 32, "--batch", 12)
    net, view, decays = watch.passes[0]
    assert net.layers == ["conv1", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    assert net.trunk.values == [64, 64, 128, 256, 512, 512]
    assert decays == [1e-6] * 6 and view.transform.keywords["size"] == 32
    assert view.transform.keywords["boxes"].scale == (0.08, 1.0)
    assert watch.rates == [[0.3] * 6, [pytest.approx(0.15)] * 6]  # cos(pi / 2) in the second of two epochs
    protocol = protocol_of(tmp_path / "exp")
    assert protocol["protocol"] == "swav, but batch 12 instead of 256"
    assert (protocol["start"], protocol["pooling"], protocol["train crop"]) == ("normal", "global", "area")
    assert protocol["lr"] == "0.3 / 2 * (1 + cos(pi * epoch / 2))"
    assert "protocol swav, but epochs 2 instead of 100, batch 12 instead of 256\n" in capsys.readouterr().out


def test_deeperclusters_protocol_gives_each_convolution_its_rate(run, monkeypatch, tmp_path):
    watch = Watch(monkeypatch)
    run("--protocol", "deepercluster", "--pooling", "grid", "--conv", 1, 2, "--batch", 12)
    _, view, decays = watch.passes[0]
    assert decays == [1e-5] * 2 and view.transform.func is train_crop(64).func
    expected = [lr / math.sqrt(1 + lr * 1e-5 * 2) for lr in (0.005, 0.01)]
    assert watch.rates == [[0.005, 0.01], pytest.approx(expected)]
    protocol = protocol_of(tmp_path / "exp")
    assert protocol["lr"].endswith(", lr0 conv1 0.005, conv2 0.01")
    assert (
        protocol["protocol"] == "deepercluster, but batch 12 instead of 256, pooling grid instead of windows"
    )


def test_rates_of_several_layers_are_those_of_each_alone(run, tmp_path):
    flags = ("--protocol", "deepercluster", "--pooling", "grid", "--batch", 7)
    run(*flags, "--conv", 1, 2, "--exp", tmp_path / "both")
    for conv in (1, 2):
        run(*flags, "--conv", conv, "--exp", tmp_path / str(conv))
        but = ("layers", "lr")
        assert_same_classifier(tmp_path / "both", tmp_path / str(conv), f"conv{conv}", but)


def test_swavs_classifiers_start_normal_and_its_batch_norm_is_trained(run, tmp_path, capsys):
    run(*SWAV, *SMALL, "--epochs", 1)
    last, other = (
        checkpoint.read(tmp_path / f"exp/{x}_last.pth.tar")["state_dict"] for x in ("conv2", "conv1")
    )
    assert set(other) == {"weight", "bias"}
    assert last["1.running_mean"].shape == (12,) and last["1.num_batches_tracked"] == 4
    assert not torch.equal(last["1.weight"], torch.ones(12))
    assert last["3.weight"].shape == (3, 12 * 10 * 10)  # conv2 is 15 x 15: 6 x 6 at every place
    assert protocol_of(tmp_path / "exp")["pooling"] == "overlapping, then batch norm"
    run("--protocol", "swav", "--use_bn", "true", "--conv", 2, "--epochs", 1, "--exp", tmp_path / "other")
    assert "--use_bn: without effect" in capsys.readouterr().out
    assert set(checkpoint.read(tmp_path / "other/conv2_last.pth.tar")["state_dict"]) == {"weight", "bias"}
    linear = eval_linear.Probes.__init__.__globals__["make_linear"](5000, 4, 3, "normal")
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05) and not linear.bias.any()


def test_validation_uses_the_statistics_of_the_batch_norm(run, monkeypatch):
    modes = []
    inner = eval_linear.Probes.classify

    def classify(self, rows):
        modes.append([m.training for m in self.classifiers.modules() if isinstance(m, torch.nn.BatchNorm2d)])
        return inner(self, rows)

    monkeypatch.setattr(eval_linear.Probes, "classify", classify)
    run(*SWAV, "--conv", 2, "--batch", 12)
    assert modes == [[True], [True], [False]] * 2  # two steps and a batch of val, twice


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_protocols_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch, stop_at):
    """Stopped in mid-epoch, with a cosine and a batch norm."""
    whole = run(*SWAV, *SMALL, "--exp", tmp_path / "whole")
    inner = eval_linear.loss
    seen = []

    def stopped(run, *rest):
        seen.append(run.iteration)
        if len(seen) == stop_at:
            run.signals.asked = util.Preempted("asked")
        return inner(run, *rest)

    monkeypatch.setattr(eval_linear, "loss", stopped)
    with pytest.raises(util.Preempted):
        run(*SWAV, *SMALL)
    monkeypatch.setattr(eval_linear, "loss", inner)
    assert run(*SWAV, *SMALL, "--resume") == whole
    for layer in SMALL[3:]:
        assert_same_classifier(tmp_path / "whole", tmp_path / "exp", layer)
    one, other = (checkpoint.read(tmp_path / exp / "linear.pth.tar")["parts"] for exp in ("whole", "exp"))
    assert equal(one["classifiers"], other["classifiers"]) and equal(
        one["optimizer_conv2"], other["optimizer_conv2"]
    )
    with refuses("was run with weight_decay -6, not -4"):
        run(*SMALL, "--resume", "--lr", 0.05)


# ------------------------------------------------------------------------------- VOC07


def test_voc07_is_probed_by_map_on_the_central_crop(vocdir, tmp_path, capsys):
    (result,) = voc_run(vocdir, tmp_path)
    assert set(result["last"]["val"]) == {"loss", "mAP"} and set(result["last"]["train"]) == {"loss"}
    assert result["best"]["val"]["mAP"] == max(
        r["val"]["mAP"] for r in checkpoint.read(tmp_path / "conv2_last.pth.tar")["log"]
    )
    protocol = protocol_of(tmp_path)
    assert (
        protocol["protocol"]
        == "deepercluster on VOC07, but batch 8 instead of 128, pooling grid instead of windows"
    )
    assert protocol["data"] == f"{vocdir}, train" and protocol["classes"] == 4
    assert (protocol["train images"], protocol["val images"]) == (14, 14)
    assert "mAP in % on val (central crop)" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "conv2_last.pth.tar")["state_dict"]["bias"].shape == (4,)


def test_voc07_run_that_is_resumed_is_the_same(vocdir, tmp_path):
    whole = voc_run(vocdir, tmp_path / "whole", "--epochs", 3)
    voc_run(vocdir, tmp_path / "parts", "--epochs", 1)
    assert voc_run(vocdir, tmp_path / "parts", "--epochs", 3, "--resume") == whole
    assert_same_classifier(tmp_path / "whole", tmp_path / "parts", "conv2")


def test_folds_run_one_by_one_and_their_mean_is_reported(vocdir, tmp_path):
    (row,) = voc_run(vocdir, tmp_path, "--kfold", 3, "--epochs", 1)
    each = [protocol_of(tmp_path / f"fold{fold}") for fold in range(3)]
    assert sorted(one["val images"] for one in each) == [4, 5, 5]
    assert all(one["val images"] + one["train images"] == 14 for one in each)
    assert (
        row["last"]["mAP"] == pytest.approx(np.mean(row["last"]["folds"])) and len(row["last"]["folds"]) == 3
    )
    assert each[1]["split reported"] == "fold 1 of 3 of train"
    assert protocol_of(tmp_path)["split reported"] == "each of 3 folds"
    again = voc_run(vocdir, tmp_path, "--kfold", 3, "--epochs", 1, "--resume", "auto")
    assert again == [row]
    (alone,) = voc_run(vocdir, tmp_path / "alone", "--kfold", 3, "--fold", 2, "--epochs", 1)
    assert alone["last"]["val"]["mAP"] == row["last"]["folds"][2]


def test_folds_of_class_folders(run, tmp_path):
    run("--conv", 1, "--kfold", 2, "--fold", 1, "--epochs", 1)
    protocol = protocol_of(tmp_path / "exp")
    assert (protocol["train images"], protocol["val images"]) == (12, 12)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocdir", "v"], "--data and --vocdir: give one of them"),
        (["--split", "train"], "--split: only with --vocdir"),
        (["--fold", 1], "--fold: only with --kfold"),
        (["--kfold", 3, "--fold", 3], "--fold 3: folds are 0 to 2"),
        (["--kfold", 3, "--val-fraction", 0.5], "--val-fraction and --kfold"),
        (["--kfold", 3, "--resume", "x.pth.tar"], "--resume: of all folds give auto"),
        (["--places"], "--places: only with --protocol deepercluster"),
        (["--places", "--protocol", "deepercluster", "--lr", 1], "--places: only with"),
        (
            ["--protocol", "deepercluster"],
            "--pooling windows: made for VGG-16's convolutions, not conv1 of tiny",
        ),
        (["--protocol", "deepercluster", "--layers", "fc7"], "has no learning rate for fc7; give --lr"),
        (["--kfold", 25, "--fold", 0], "--kfold 25: more than the 24 images"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run, flags, message):
    with refuses(message):
        run("--conv", 1, *flags)


# ------------------------------------------------------------------------------- few images


def test_one_image_a_class_and_one_class_in_val_work(run, folder, tmp_path):
    """A class of train/ alone, another with a single image in val/."""
    for split, names in (("train", COLOURS), ("val", ["green"])):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.open(folder / split / name / "0.png").save(tmp_path / "data" / split / name / "0.png")
    (tmp_path / "data/val/red").mkdir()
    Image.open(folder / "val/red/1.png").save(tmp_path / "data/val/red/1.png")
    for protocol in LINEAR:
        if " on " not in protocol:
            flags = ("--protocol", protocol, "--pooling", "grid", "--conv", 1, "--exp", tmp_path / protocol)
            (result,) = run("--data", tmp_path / "data", *flags)
            assert result["last"]["val"]["prec@1"] in (0, 50, 100)
            assert protocol_of(tmp_path / protocol)["classes"] == 3
