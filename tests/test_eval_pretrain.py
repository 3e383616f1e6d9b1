"""Supervised training from a network: what starts anew, the fold, what is written, resume, processes."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import json

import numpy as np
import pytest
import torch

import checkpoint
import eval_knn
import eval_linear
import eval_pretrain
import extract
import models
import util
from models import vgg16, weights
from tests.finetune_runs import COMMON, assert_same_run, call, labelled, signal_at  # noqa: F401
from visu import filters


def pretrain(data, exp, *flags):
    """Two epochs of three steps of the tiny network."""
    settings = "--model random:tiny --epochs 2 --batch 27 --lr 0.02 --decay_epochs 1"
    return call(eval_pretrain, "--data", data, "--exp", exp, settings, *flags)


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory):
    exp = tmp_path_factory.mktemp("pretrain") / "exp"
    return exp, pretrain(labelled, exp)


@pytest.fixture
def small_vgg(monkeypatch):
    """vgg16wide and vgg16folded with few channels and units; everything else is as it is."""
    monkeypatch.setattr(vgg16, "BLOCKS", ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8)))
    monkeypatch.setattr(vgg16, "UNITS", 24)


def test_flags_have_the_published_settings_as_defaults():
    args = eval_pretrain.get_parser().parse_args([])
    assert (args.epochs, args.decay_epochs, args.gamma, args.lr) == (100, [30, 60, 90], 0.1, 0.1)
    assert (args.wd, args.momentum, args.batch, args.sobel2RGB) == (1e-4, 0.9, 256, True)


@torch.no_grad()
def test_it_starts_from_the_network_but_for_what_stands_on_its_convolutions():
    net, told = eval_pretrain.start_of("random:alexnet:sobel", fold=True, seed=31)
    given = weights.load("random:alexnet:sobel", seed=31)
    assert told == "Sobel in front, fixed" and net.sobel is not None  # AlexNet's does not fold exactly
    for (name, value), before in zip(net.state_dict().items(), given.state_dict().values()):
        assert torch.equal(value, before) == (not name.startswith("classifier.")), name
    for layer in net.parts()[1].modules():
        if isinstance(layer, torch.nn.Linear):
            assert (layer.bias == 0.1).all() and abs(layer.weight.std().item() - 0.01) < 1e-4


@torch.no_grad()
def test_sobel_of_the_wide_geometry_is_folded_unless_it_is_not_wanted(small_vgg):
    given = weights.load("random:vgg16wide:sobel", seed=31)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    net, told = eval_pretrain.start_of("random:vgg16wide:sobel", fold=True, seed=31)
    assert (net.arch, net.sobel) == ("vgg16folded", None) and "folded" in told
    assert (net.features[0].weight != 0).any(dim=(0, 1)).all()  # all 25 taps
    expected, found = (n.eval().activations(x, n.maps) for n in (given, net))
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name  # borders too
    kept, told = eval_pretrain.start_of("random:vgg16wide:sobel", fold=False, seed=31)
    assert kept.arch == "vgg16wide" and kept.sobel is not None and told == "Sobel in front, fixed"


def test_what_a_folded_network_has_become_goes_into_every_other_script(small_vgg, labelled, tmp_path):
    exp = tmp_path / "exp"
    pretrain(labelled, exp, "--model random:vgg16wide:sobel --epochs 1 --batch 40")
    before = eval_pretrain.start_of("random:vgg16wide:sobel", True, 31)[0].features[0].weight
    for file in ("pretrain.pth.tar", "pretrain_best.pth.tar"):
        net = weights.load(exp / file)
        assert (net.arch, net.top_layer.out_features) == ("vgg16folded", 4)
        taps = net.features[0].weight
        assert taps.shape == (4, 3, 5, 5) and not torch.equal(taps, before)
        assert not torch.equal(taps[:, 0], taps[:, 1])  # colours go ways of their own
    model = ("--model", exp / "pretrain.pth.tar")
    args = ["--out", tmp_path / "rows", "--layer", "fc7"]
    parsed = extract.get_parser().parse_args(
        [*map(str, (labelled / "val", *model, *args)), "--workers", "0", "--device", "cpu"]
    )
    extract.main(parsed)
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (16, 24) and rows.std() > 0
    assert call(eval_knn, "--data", labelled, *model, "--k 3 --exp", tmp_path)[0]["layer"] == "conv13"
    flags = "--conv 1 13 --epochs 1 --batch_size 16 --exp"
    assert len(call(eval_linear, "--data", labelled, *model, flags, tmp_path / "linear")) == 2
    assert filters.main(
        filters.get_parser().parse_args([*map(str, model), "--exp", str(tmp_path)])
    ).exists()  # fmt: skip
    again = pretrain(labelled, tmp_path / "again", "--epochs 1 --batch 24", *model)
    assert 0 <= again["last"]["val"]["prec@1"] <= 100


def test_a_folded_network_is_exported(small_vgg, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    from formats import onnx

    net = vgg16.fold_sobel(models.build("vgg16wide", sobel=True, seed=0))
    checkpoint.save(tmp_path / "net.pth.tar", {"arch": net.arch, "state_dict": net.state_dict()})
    flags = ["--model", str(tmp_path / "net.pth.tar"), "--out", str(tmp_path / "net.onnx")]
    onnx.main(onnx.get_parser().parse_args([*flags, "--image-size", "32"]))
    assert (tmp_path / "net.onnx").stat().st_size > 1000


def test_results_are_of_the_last_epoch_the_best_and_ten_crops(whole):
    exp, found = whole
    written = json.loads((exp / "results.json").read_text())["pretrain"]
    assert written["results"] == found
    assert found["last"]["epoch"] == 1 and found["last"]["steps"] == 6
    assert found["best"]["val"]["prec@1"] >= found["last"]["val"]["prec@1"]
    assert set(found["last, ten crops"]) == {"loss", "prec@1", "prec@5"}
    assert found["last, ten crops"]["loss"] == pytest.approx(found["last"]["val"]["loss"], rel=1e-3)
    assert written["protocol"]["Sobel"] == "colour, no Sobel" and written["protocol"]["train images"] == 80
    said = (exp / "pretrain.log").read_text()
    assert "global batch 27; lr 0.02, head 0.02, times 0.1 at epochs 1" in said


@pytest.mark.parametrize("at", [1, 2, 4])
def test_run_that_a_signal_ends_goes_on_exactly(whole, labelled, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        signal_at(at, patch)
        with pytest.raises(util.Preempted, match="SIGTERM"):
            pretrain(labelled, tmp_path / "exp")
    assert pretrain(labelled, tmp_path / "exp", "--resume auto") == whole[1]
    assert_same_run(whole[0], tmp_path / "exp", "pretrain")


def test_photographs_are_told_apart_in_the_end(labelled, tmp_path):
    """Chance is 25 %."""
    flags = "--model random:toy --epochs 12 --lr 0.1 --decay_epochs 8"
    assert pretrain(labelled, tmp_path, flags)["best"]["val"]["prec@1"] >= 60
