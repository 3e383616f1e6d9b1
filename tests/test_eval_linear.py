"""The linear probe: its protocol against a plain one, frozen networks, what it refuses and writes."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

import checkpoint
import data
import eval_linear
import util
from models import weights
from tests.linear_runs import (  # noqa: F401
    COLOURS,
    SIZE,
    alexnet,
    evaluate,
    folder,
    model,
    run,
)

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------- the protocol


def plain_probe(folder: Path, model: Path, conv: int, epochs: int, batch: int, lr: float, wd: float):
    """conv's classifier by the protocol written out: weights, bias, mean train loss of the last epoch."""
    net = weights.load(model)
    images = data.list_images(folder / "train")
    pixels = [data.decode_file(images.path(i)) for i in range(len(images))]
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    side = round(SIZE * 256 / 224)
    crop = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.RandomCrop(SIZE), v2.RandomHorizontalFlip()])
    torch.manual_seed(util.derive_seed(31, "probe", f"conv{conv}"))
    linear = torch.nn.Linear({1: 9600, 3: 3456}[conv], 3)
    weight, bias = linear.weight, linear.bias
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    done = 0
    for epoch in range(epochs):
        seed = util.derive_seed(31, "probe order", epoch)
        order = np.random.default_rng(seed).permutation(len(images))
        loss_sum = 0.0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            views = []
            for position, i in enumerate(chosen, start):
                torch.manual_seed(util.derive_seed(31, "crop", epoch, position))
                views.append((crop(pixels[i]) / 255 - mean[:, None, None]) / std[:, None, None])
            with torch.no_grad():
                map_ = net.activations(torch.stack(views), [f"conv{conv}"])[f"conv{conv}"]
            x = F.adaptive_avg_pool2d(map_, {1: 10, 3: 3}[conv]).flatten(1)
            loss = F.cross_entropy(x @ weight.T + bias, torch.from_numpy(images.classes[chosen]))
            loss_sum += loss.item() * len(chosen)
            gradients = torch.autograd.grad(loss, (weight, bias))
            rate = lr / math.sqrt(1 + lr * wd * done)
            with torch.no_grad():
                for parameter, gradient, v in zip((weight, bias), gradients, momentum):
                    v.mul_(0.9).add_(gradient + wd * parameter)
                    parameter -= rate * v
            done += 1
    return weight, bias, loss_sum / len(images)


@pytest.mark.parametrize("conv", [1, 3])
def test_classifier_equals_the_protocol_written_out(run, folder, alexnet, tmp_path, conv):
    """lr and weight decay so large that the schedule, decay and momentum all show in the weights."""
    run("--model", alexnet, "--conv", conv, "--lr", 0.05, "--wd", 0, "--epochs", 3)
    saved = checkpoint.read(tmp_path / f"exp/conv{conv}_last.pth.tar")
    weight, bias, loss = plain_probe(folder, alexnet, conv, epochs=3, batch=10, lr=0.05, wd=1.0)
    torch.testing.assert_close(saved["state_dict"]["weight"], weight.detach(), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(saved["state_dict"]["bias"], bias.detach(), rtol=1e-3, atol=2e-5)
    assert saved["log"][-1]["train"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert saved["steps"] == 9 and saved["epoch"] == 3


@pytest.mark.parametrize("tencrops", [True, False])
def test_ten_crops_average_the_softmax_and_the_loss_is_the_central_crops(
    run, folder, model, tmp_path, tencrops
):
    (result,) = run("--conv", 2, "--epochs", 1, *(["--tencrops"] if tencrops else []))
    saved = checkpoint.read(tmp_path / "exp/conv2_last.pth.tar")["state_dict"]
    net = weights.load(model)
    images = data.list_images(folder / "val")
    side = round(SIZE * 256 / 224)
    hits, losses = [], []
    for i, label in enumerate(images.classes):
        image = v2.functional.resize(data.decode_file(images.path(i)), [side])
        crops = torch.stack(v2.functional.ten_crop(image, [SIZE, SIZE]))
        with torch.no_grad():
            maps = net.activations(data.normalise(crops), ["conv2"])["conv2"]
            logits = maps.flatten(1) @ saved["weight"].T + saved["bias"]  # 12 x 15 x 15: not pooled
        scores = logits.softmax(1).mean(0) if tencrops else logits[4]
        hits.append(int(scores.argmax() == label))
        centre = v2.functional.center_crop(image, [SIZE, SIZE])
        assert torch.equal(crops[4], centre)
        losses.append(F.cross_entropy(logits[4:5], torch.tensor([label])).item())
    assert result["last"]["val"]["prec@1"] == pytest.approx(100 * np.mean(hits))
    assert result["last"]["val"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_probe_learns_colours_from_a_random_network(run):
    (result,) = run("--model", "random:tiny", "--conv", 1, "--epochs", 8)
    assert result["last"]["val"]["prec@1"] >= 90


def test_layers_of_a_resnet_are_probed_by_name(run, tmp_path):
    results = run("--model", "random:resnet18s", "--conv", 1, "--layers", "avgpool", "layer4", "--epochs", 1)
    assert [(r["layer"], r["values"]) for r in results] == [
        ("conv1", 9216),
        ("layer4", 8192),
        ("avgpool", 512),
    ]
    assert checkpoint.read(tmp_path / "exp/avgpool_last.pth.tar")["state_dict"]["weight"].shape == (3, 512)


# ------------------------------------------------------------------------------- frozen


def test_network_is_frozen_in_eval_mode(run, monkeypatch):
    nets = []
    call = eval_linear.Frozen.forward

    def watched(self, x):
        assert not any(module.training for module in self.net.modules())
        assert not any(parameter.requires_grad for parameter in self.net.parameters())
        nets.append(self.net)
        return call(self, x)

    monkeypatch.setattr(eval_linear.Frozen, "forward", watched)
    run("--conv", 2, "--epochs", 1)
    assert nets


def test_run_stops_when_a_statistic_of_the_frozen_network_has_moved(run, monkeypatch):
    call = eval_linear.Frozen.forward

    def in_train_mode(self, x):
        self.net.train()
        return call(self, x)

    monkeypatch.setattr(eval_linear.Frozen, "forward", in_train_mode)
    with pytest.raises(RuntimeError, match="frozen network moved"):
        run("--conv", 2, "--epochs", 1)


# ------------------------------------------------------------------------------- which epoch


def scripted(monkeypatch, **splits: list[float]) -> list[int]:
    """Let each evaluation of a split give the next of these prec@1; returns how many images each had."""
    values, sizes = {name: iter(precisions) for name, precisions in splits.items()}, []

    def evaluate(probes, view, how, label, log, meter):
        sizes.append(len(view))
        return [{"loss": 1.0, "prec@1": next(values[label.split()[-1]]), "prec@5": 100.0}], []

    monkeypatch.setattr(eval_linear, "evaluate", evaluate)
    return sizes


def test_best_epoch_is_chosen_on_the_held_out_part_and_reported_on_val(run, monkeypatch, tmp_path, capsys):
    sizes = scripted(monkeypatch, held_out=[50.0, 70.0, 70.0], val=[90.0, 20.0, 80.0])
    (result,) = run("--conv", 1, "--epochs", 3, "--val-fraction", 0.25)
    assert sizes[:2] == [12, 6]  # val, held out: a quarter of 24
    assert checkpoint.read(tmp_path / "exp/conv1_last.pth.tar")["steps"] == 6  # 18 images left, batches of 10
    assert (result["best"]["epoch"], result["best"]["val"]["prec@1"]) == (1, 20.0)
    assert (result["last"]["epoch"], result["last"]["val"]["prec@1"]) == (2, 80.0)
    assert checkpoint.read(tmp_path / "exp/conv1_best.pth.tar")["epoch"] == 2  # goes on with epoch 2
    assert "best epoch chosen on held-out 0.25 of train" in capsys.readouterr().out


def test_without_held_out_part_the_best_epoch_is_val_s_and_the_print_says_so(run, monkeypatch, capsys):
    scripted(monkeypatch, val=[30.0, 90.0, 80.0])
    (result,) = run("--conv", 1, "--epochs", 3)
    assert result["best"]["epoch"] == 1
    printed = capsys.readouterr().out
    assert "best epoch chosen on val, the split reported: as the authors did" in printed
    row = next(line for line in printed.splitlines() if line.startswith("conv1 "))
    assert row.split() == ["conv1", "8192", "80.00", "/", "100.00", "(2)", "90.00", "/", "100.00", "(1)"]


# ------------------------------------------------------------------------------- files and prints


def test_results_go_into_results_json_with_their_protocol(run, tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/results.json").write_text('{"knn": {"results": 1}}')
    results = run("--conv", 1, 2, "--epochs", 1)
    written = json.loads((tmp_path / "exp/results.json").read_text())
    assert written["knn"] == {"results": 1}
    assert written["linear"]["results"] == results
    protocol = written["linear"]["protocol"]
    assert {name: protocol[name] for name in ("crops", "layers", "weight decay", "epochs", "batch")} == {
        "crops": "central crop",
        "layers": "conv1+conv2",
        "weight decay": 1e-4,
        "epochs": 1,
        "batch": 10,
    }
    assert protocol["network"].endswith("tiny.pth.tar (tiny with Sobel)")
    assert (protocol["train images"], protocol["val images"], protocol["classes"]) == (24, 12, 3)
    lines = [json.loads(line) for line in (tmp_path / "exp/conv2_log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0]
    assert all(set(lines[0][split]) == {"loss", "prec@1", "prec@5"} for split in ("train", "val"))
    assert lines[0]["val"]["prec@5"] == 100  # three classes
    (line,) = (json.loads(line) for line in (tmp_path / "exp/linear.jsonl").read_text().splitlines())
    assert line["layers"]["conv2"] == lines[0]
    assert line["loss"] == pytest.approx(
        sum(line["layers"][name]["train"]["loss"] for name in ("conv1", "conv2"))
    )
    printed = capsys.readouterr().out
    assert "linear protocol: protocol deepcluster, but batch 10 instead of 256, data " in printed
    assert "protocol deepcluster, but epochs 1 instead of 90, batch 10 instead of 256\n" in printed
    assert "values: conv1 8192  conv2 2700" in printed


def test_results_file_that_is_none_is_told_before_any_work(run, tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/results.json").write_text("[]")
    with pytest.raises(util.UserError, match=r"results\.json: not valid JSON"):
        run("--conv", 1)
    assert not (tmp_path / "exp/linear.pth.tar").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--conv", "3"], "--conv 3: tiny has no such layer; it has convolutions 1 to 2"),
        (["--conv", "2", "0"], "--conv 0: tiny has no such layer"),
        (["--layers", "layer4"], "tiny has no layer layer4; it has sobel, conv1.pre, conv1, "),
        (["--conv", "1", "--model", "random:resnet"], "random networks are random:ARCH or random:ARCH:sobel"),
        (["--conv", "1", "--model", "nowhere.pth.tar"], r"nowhere\.pth\.tar: no such checkpoint file"),
        (["--conv", "1", "--model", ""], "--model is missing"),
        (["--conv", "1", "--data", ""], "--data is missing"),
        (["--conv", "1", "--data", "nowhere"], "train/ is missing in nowhere"),
        ([], "--conv is missing"),
        (["--conv", "1", "--lr", "1e30"], r"the loss on conv1 is (nan|inf) at iteration \d of epoch 0"),
        (["--layers", "fc7", "conv2", "--lr", "1e30"], r"the loss on conv2 is (nan|inf) at iteration"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, flags, message):
    with pytest.raises(util.UserError, match=message) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "--epochs: 0: must be at least 1"),
        (["--batch_size", "0"], "0: must be at least 1"),
        (["--lr", "nan"], "--lr: nan: must be a positive number"),
        (["--momentum", "1"], "--momentum: 1: must lie in [0, 1)"),
        (["--wd", "3"], "--weight_decay/--wd: 3: must lie in [-100, 0]"),
        (["--val-fraction", "1"], "--val-fraction: 1: must lie in [0, 1)"),
    ],
)
def test_number_that_cannot_work_is_one_line_and_exit_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        eval_linear.get_parser().parse_args(flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.count("\n") == 1


def test_image_that_cannot_be_decoded_is_named_or_left_out(run, tmp_path, folder, capsys):
    for split in ("train", "val"):
        for name in COLOURS:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            pixels = (folder / split / name / "0.png").read_bytes()
            (tmp_path / "data" / split / name / "0.png").write_bytes(pixels)
    broken = tmp_path / "data/val/red/0.png"
    flags = ("--conv", 1, "--data", tmp_path / "data")
    for content, reason in (
        (pixels[: len(pixels) // 2], ".*"),
        (b"", "the file is empty"),
    ):  # header good, none
        broken.write_bytes(content)
        exp = tmp_path / f"exp{len(content)}"
        with pytest.raises(util.UserError, match=rf"val/red/0\.png: {reason}.*; mend or remove"):
            run(*flags, "--exp", exp)
        (result,) = run(*flags, "--exp", exp, "--skip-bad-images")
        assert result["last"]["val"]["prec@1"] in (0, 50, 100)  # of two
        assert "left out 1 of 3 images" in capsys.readouterr().out
        protocol = json.loads((exp / "results.json").read_text())["linear"]["protocol"]
        assert protocol["val images"] == 2


def test_class_that_is_only_in_train_is_fine(run, folder, tmp_path):
    for split, names in (("train", COLOURS), ("val", ("blue", "red"))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "data" / split / name).symlink_to(folder / split / name)
    (result,) = run("--data", tmp_path / "data", "--conv", 1, "--epochs", 8, "--model", "random:tiny")
    assert result["last"]["val"]["prec@1"] >= 90  # red is class 2 there too
    with pytest.raises(util.UserError, match="class folder green is only in val/"):
        (tmp_path / "data/train/green").rename(tmp_path / "data/val/green")
        run("--data", tmp_path / "data", "--conv", 1, "--exp", tmp_path / "other")


def test_flags_and_defaults_are_those_of_the_usage_text():
    args = eval_linear.get_parser().parse_args(["--conv", "3", "--wd", "-7"])
    assert (args.conv, args.weight_decay, args.tencrops, args.verbose) == ([3], -7, False, False)
    args = eval_linear.get_parser().parse_args([])
    assert (args.workers, args.epochs, args.batch, args.lr) == (4, 90, 256, 0.01)
    assert (args.momentum, args.weight_decay, args.image_size, args.seed) == (0.9, -4, None, 31)
    assert (args.exp, args.resume, args.val_fraction) == ("exp", None, 0)
    assert eval_linear.get_parser().parse_args(["--batch_size", "7"]).batch == 7


def test_help_is_answered_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['eval_linear.py', '--help']\n"
        "try: runpy.run_path('eval_linear.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "--conv N [N ...]" in result.stdout


# ------------------------------------------------------------------------------- the shell script


def shell(cwd: Path, *flags: str, **variables: str | Path) -> subprocess.CompletedProcess:
    names = ("DATA", "MODEL", "CONV", "LAYERS", "EXP", "LR", "WD", "WORKERS", "PYTHON")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [ROOT / "eval_linear.sh", *flags],
        cwd=cwd,
        env=inherited | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script_gives_the_authors_settings(tmp_path):
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/usr/bin/env bash\necho "$*" >{tmp_path}/call\n')
    recorder.chmod(0o755)
    variables = {"DATA": "images", "MODEL": "a model", "CONV": "1 5", "EXP": "out", "WORKERS": "3"}
    result = shell(tmp_path, "--seed", "7", PYTHON=recorder, **variables)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "call").read_text().split(" ", 1)[1] == (
        "--data images --model a model --conv 1 5 --exp out --lr 0.01 --wd=-7 --tencrops --verbose "
        "--workers 3 --seed 7\n"
    )
    assert r"--model a\ model --conv 1 5" in result.stdout
    result = shell(tmp_path, PYTHON=recorder, **variables, LAYERS="layer4 avgpool")
    assert " --layers layer4 avgpool --exp out " in (tmp_path / "call").read_text()


def test_script_asks_for_data_and_model_before_anything_is_set_up(tmp_path):
    result = shell(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_linear.sh: set DATA ")
    result = shell(tmp_path, DATA="images")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_linear.sh: set MODEL ")


@pytest.mark.slow
def test_script_runs_end_to_end_and_a_mistake_exits_with_code_2(tmp_path, folder):
    variables = {
        "PYTHON": sys.executable,
        "DATA": folder,
        "MODEL": "random:resnet18s",
        "EXP": tmp_path / "exp",
        "WORKERS": 0,
    }
    small = ("--image-size", "32", "--epochs", "1", "--device", "cpu")
    result = shell(tmp_path, *small, LAYERS="conv1 avgpool", **variables)
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "exp/results.json").read_text())["linear"]["protocol"]["weight decay"] == 1e-7
    )
    result = shell(tmp_path, *small, CONV="9", **(variables | {"MODEL": "random:alexnet"}))
    assert result.returncode == 2
    assert (
        result.stderr == "eval_linear.py: --conv 9: alexnet has no such layer; it has convolutions 1 to 5\n"
    )
