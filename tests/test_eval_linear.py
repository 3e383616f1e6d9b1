"""The linear probe: its protocol against a plain one, resuming, side by side, what it refuses and writes."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

import checkpoint
import data
import eval_linear
import models
import util

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
HELD = ("--val-fraction", 0.25)
OPENED: list[models.DeepClusterNet] = []
COLOURS = {"blue": (60, 90, 170), "green": (70, 150, 60), "red": (190, 80, 70)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of noisy colour, 8 images each in train/ and 4 in val/."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 45, (76, 84, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint of an AlexNet with Sobel whose batch-norm statistics are not the initial ones."""
    net = models.build("alexnet", sobel=True, num_clusters=7, seed=5)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.2, 0.5, generator=generator)
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth.tar"
    checkpoint.save(path, {"arch": "alexnet", "state_dict": net.state_dict()})
    return path


@pytest.fixture(scope="module")
def evaluate(folder, model):
    """evaluate(exp, *flags) runs eval_linear with small settings; flags win over them."""

    def call(exp: Path, *flags: str | Path) -> list[dict]:
        settings = ["--data", folder, "--model", model, "--exp", exp, "--image-size", SIZE, "--device", "cpu"]
        settings += ["--workers", 0, "--batch_size", 10, "--epochs", 2]
        return eval_linear.main(eval_linear.get_parser().parse_args([*map(str, settings), *map(str, flags)]))

    return call


@pytest.fixture
def run(evaluate, model, tmp_path, monkeypatch):
    """run(*flags): as `evaluate`, into tmp_path / "exp"; the checkpoint is read once, as it is large."""
    read = eval_linear.evaluation.open_network

    def opened(path: str, layers: list[str]) -> models.DeepClusterNet:
        if path != str(model):
            return read(path, layers)
        if not OPENED:
            OPENED.append(read(path, layers))
        return copy.deepcopy(OPENED[0])

    monkeypatch.setattr(eval_linear.evaluation, "open_network", opened)
    return lambda *flags: evaluate(tmp_path / "exp", *flags)


@pytest.fixture(scope="module")
def whole(evaluate, tmp_path_factory) -> tuple[Path, list[dict]]:
    """An uninterrupted run of conv 1 and 3: its folder and its results."""
    exp = tmp_path_factory.mktemp("whole")
    return exp, evaluate(exp, *HELD, "--conv", 3, 1, 3)


def assert_same(a, b) -> None:
    """Equal bit for bit: nested containers of tensors and plain values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_classifier(one: Path, other: Path, conv: int) -> None:
    for which in ("last", "best"):
        name = f"conv{conv}_{which}.pth.tar"
        assert_same(checkpoint.read(one / name), checkpoint.read(other / name))
    log = f"conv{conv}_log.jsonl"
    assert (one / log).read_text() == (other / log).read_text()


# ------------------------------------------------------------------------------- the protocol


def plain_probe(folder: Path, model: Path, conv: int, epochs: int, batch: int, lr: float, wd: float):
    """conv's classifier by the protocol written out: weights, bias, mean train loss of the last epoch."""
    net = checkpoint.load_model(model)
    images = data.list_images(folder / "train")
    pixels = [data.decode(images.path(i)) for i in range(len(images))]
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    side = round(SIZE * 256 / 224)
    crop = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.RandomCrop(SIZE), v2.RandomHorizontalFlip()])
    weight = bias = momentum = None
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
            if weight is None:
                generator = torch.Generator().manual_seed(util.derive_seed(31, "probe", conv))
                weight = (torch.randn(3, x.shape[1], generator=generator) * 0.01).requires_grad_()
                bias = torch.zeros(3, requires_grad=True)
                momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
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
def test_classifier_equals_the_protocol_written_out(run, folder, model, tmp_path, conv):
    """lr and weight decay so large that the schedule, decay and momentum all show in the weights."""
    run("--conv", conv, "--lr", 0.05, "--wd", 0, "--epochs", 3)
    saved = checkpoint.read(tmp_path / f"exp/conv{conv}_last.pth.tar")
    weight, bias, loss = plain_probe(folder, model, conv, epochs=3, batch=10, lr=0.05, wd=1.0)
    torch.testing.assert_close(saved["state_dict"]["weight"], weight.detach(), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(saved["state_dict"]["bias"], bias.detach(), rtol=1e-3, atol=2e-5)
    assert saved["log"][-1]["train"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert saved["steps"] == 9 and saved["epoch"] == 3


def test_learning_rate_falls_as_bottou_says():
    assert eval_linear.learning_rate(0.01, 1e-4, 0) == 0.01
    assert eval_linear.learning_rate(0.5, 0.1, 60) == pytest.approx(0.5 / math.sqrt(4.0))
    # 90 epochs of ImageNet with the authors' script: next to nothing, as the protocol has it
    assert eval_linear.learning_rate(0.01, 1e-7, 450_000) == pytest.approx(0.01 / math.sqrt(1.00045))


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
    pooled = eval_linear.make_pooling("alexnet", conv, x.shape[1:])(x)
    assert pooled[0].numel() == values
    size, padding = window
    torch.testing.assert_close(pooled, F.avg_pool2d(x, size, size, padding))
    padded = F.pad(x, [padding] * 4)
    torch.testing.assert_close(
        pooled[:, :, 1, 2], padded[:, :, size : 2 * size, 2 * size : 3 * size].mean((2, 3))
    )


@pytest.mark.parametrize(
    "channels, side, pooled",
    [(64, 224, 12), (128, 112, 8), (256, 56, 6), (512, 28, 4), (512, 14, 4), (512, 2, 2)],
)
def test_vggs_pooling_is_the_largest_under_10000_values(channels, side, pooled):
    x = torch.rand(1, channels, side, side)
    out = eval_linear.make_pooling("vgg16", 1, x.shape[1:])(x)
    assert out.shape == (1, channels, pooled, pooled)
    assert channels * pooled**2 < 10_000 and (channels * (pooled + 1) ** 2 >= 10_000 or pooled == side)


@pytest.mark.parametrize("size", [16, 33, 64, 96, 128, 180, 227, 256, 448])
def test_any_input_size_gives_each_layer_under_10000_values_that_see_nearly_all_of_the_map(size):
    net = models.build("alexnet", sobel=True, seed=0).eval()
    names = [f"conv{conv}" for conv in range(1, 6)]
    with torch.no_grad():
        maps = net.activations(torch.zeros(1, 3, size, size), names)
    for conv, name in enumerate(names, 1):
        x = torch.zeros_like(maps[name])[:, :1].requires_grad_()
        pool = eval_linear.make_pooling("alexnet", conv, maps[name].shape[1:])
        out = pool(x)
        assert 1 <= out.numel() * maps[name].shape[1] < 10_000
        out.sum().backward()
        assert (x.grad > 0).float().mean() > 0.75


def test_ten_crops_average_the_softmax_and_the_loss_is_the_central_crops(run, folder, model, tmp_path):
    (result,) = run("--conv", 5, "--tencrops", "--epochs", 1)
    saved = checkpoint.read(tmp_path / "exp/conv5_last.pth.tar")["state_dict"]
    net = checkpoint.load_model(model)
    images = data.list_images(folder / "val")
    side = round(SIZE * 256 / 224)
    hits, losses = [], []
    for i, label in enumerate(images.classes):
        image = v2.functional.resize(data.decode(images.path(i)), [side])
        crops = torch.stack(v2.functional.ten_crop(image, [SIZE, SIZE]))
        with torch.no_grad():
            maps = net.activations(data.normalise(crops), ["conv5"])["conv5"]
            logits = maps.flatten(1) @ saved["weight"].T + saved["bias"]  # conv5 is 3 x 3 here: not pooled
        hits.append(int(logits.softmax(1).mean(0).argmax() == label))
        centre = v2.functional.center_crop(image, [SIZE, SIZE])
        assert torch.equal(crops[4], centre)
        losses.append(F.cross_entropy(logits[4:5], torch.tensor([label])).item())
    assert result["last"]["val"]["prec@1"] == pytest.approx(100 * np.mean(hits))
    assert result["last"]["val"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_mean_of_softmaxes_is_not_the_softmax_of_means():
    """One crop that is sure of class 1 outweighs in the logits, but not in the probabilities."""
    probe = eval_linear.Probe(1, 2, 2, settings_of(), torch.device("cpu"))
    with torch.no_grad():
        probe.linear.weight.copy_(torch.eye(2))
    rows = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 50.0]])
    loss, first, five = probe.judge(rows, torch.tensor([0])).tolist()
    assert (first, five) == (1.0, 1.0)
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))  # of crop 4


def settings_of(*flags: str):
    return eval_linear.get_parser().parse_args(list(flags))


def test_precision_at_5_counts_the_five_highest_or_all_of_fewer_classes():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    assert eval_linear.count(torch.tensor(1.5), scores, torch.tensor([0, 4, 5])).tolist() == [1.5, 1, 2]
    assert eval_linear.count(torch.tensor(0.0), scores[:, :3], torch.tensor([0, 1, 2])).tolist() == [0, 1, 3]


def test_probe_learns_colours_from_a_random_network(run):
    (result,) = run("--model", "random:alexnet", "--conv", 1, "--epochs", 8)
    assert result["last"]["val"]["prec@1"] >= 90


# ------------------------------------------------------------------------------- side by side, resumed


def test_probes_side_by_side_are_the_ones_trained_alone(run, whole, tmp_path):
    together, results = whole
    assert [result["layer"] for result in results] == ["conv1", "conv3"]
    for conv, result in zip((1, 3), results):
        assert run(*HELD, "--conv", conv, "--exp", tmp_path / "alone") == [result]
        assert_same_classifier(together, tmp_path / "alone", conv)


def test_result_does_not_depend_on_the_number_of_workers(run, tmp_path):
    run("--conv", 2, "--exp", tmp_path / "none", "--epochs", 1)
    run("--conv", 2, "--exp", tmp_path / "two", "--epochs", 1, "--workers", 2)
    assert_same_classifier(tmp_path / "none", tmp_path / "two", 2)


def test_resumed_run_equals_uninterrupted_run(run, whole, tmp_path):
    exp, results = whole
    run(*HELD, "--conv", 1, 3, "--epochs", 1)
    assert run(*HELD, "--conv", 1, 3, "--resume") == results
    for conv in (1, 3):
        assert_same_classifier(exp, tmp_path / "exp", conv)


@pytest.mark.parametrize("killed_at", ["conv1_last.pth.tar", "conv3_last.pth.tar"])
def test_run_killed_between_two_files_resumes_to_the_same_end(run, whole, tmp_path, monkeypatch, killed_at):
    exp, results = whole
    save = checkpoint.save

    def save_until(path, state):
        if state["epoch"] == 2 and Path(path).name == killed_at:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", save_until)
    with pytest.raises(KeyboardInterrupt):
        run(*HELD, "--conv", 1, 3)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run(*HELD, "--conv", 1, 3, "--resume") == results
    for conv in (1, 3):
        assert_same_classifier(exp, tmp_path / "exp", conv)


def test_layer_added_to_a_finished_run_is_the_one_trained_alone(run, whole, tmp_path):
    exp, results = whole
    run(*HELD, "--conv", 1)
    before = (tmp_path / "exp/conv1_last.pth.tar").read_bytes()
    assert run(*HELD, "--conv", 1, 3, "--resume") == results
    assert_same_classifier(exp, tmp_path / "exp", 3)
    assert (tmp_path / "exp/conv1_last.pth.tar").read_bytes() == before


def test_resuming_with_other_settings_or_network_is_refused(run, tmp_path):
    run("--conv", 2, "--epochs", 1)
    with pytest.raises(util.UserError, match=r"other lr \(0.01, now 0.1\)"):
        run("--conv", 2, "--resume", "--lr", 0.1)
    with pytest.raises(util.UserError, match="other network"):
        run("--conv", 2, "--resume", "--model", "random:alexnet")
    with pytest.raises(util.UserError, match="holds a classifier on conv2; continue it with --resume"):
        run("--conv", 2)
    with pytest.raises(util.UserError, match=r"no .*conv3_last\.pth\.tar to continue"):
        run("--conv", 3, "--resume")
    (tmp_path / "exp/conv4_last.pth.tar").write_bytes((tmp_path / "exp/conv2_last.pth.tar").read_bytes())
    with pytest.raises(util.UserError, match="not a classifier on conv4"):
        run("--conv", 4, "--resume")


# ------------------------------------------------------------------------------- frozen


def test_network_is_frozen_in_eval_mode(run, monkeypatch):
    nets = []
    call = eval_linear.Trunk.__call__

    def watched(self, images, convs):
        assert not any(module.training for module in self.net.modules())
        assert not any(parameter.requires_grad for parameter in self.net.parameters())
        nets.append(self.net)
        return call(self, images, convs)

    monkeypatch.setattr(eval_linear.Trunk, "__call__", watched)
    run("--conv", 5, "--epochs", 1)
    assert nets


def test_run_stops_when_a_statistic_of_the_frozen_network_has_moved(run, monkeypatch):
    def in_train_mode(self, images, convs):
        self.net.train()
        return call(self, images, convs)

    call = eval_linear.Trunk.__call__
    monkeypatch.setattr(eval_linear.Trunk, "__call__", in_train_mode)
    with pytest.raises(RuntimeError, match="frozen network moved"):
        run("--conv", 2, "--epochs", 1)


def test_random_network_is_the_one_that_training_starts_from():
    net = eval_linear.random_network("random:alexnet:sobel", seed=4)
    start = models.build("alexnet", sobel=True, seed=util.derive_seed(4, "weights"))
    assert_same(dict(net.state_dict()), dict(start.state_dict()))
    assert eval_linear.random_network("random:alexnet", seed=4).sobel is None


# ------------------------------------------------------------------------------- which epoch


def test_held_out_part_is_the_same_share_of_each_class_and_never_all_of_it():
    classes = np.repeat([0, 1, 2, 3], [40, 20, 1, 4])
    mask = eval_linear.held_out_mask(classes, 0.25, seed=31)
    assert np.bincount(classes[mask], minlength=4).tolist() == [10, 5, 0, 1]
    assert np.array_equal(mask, eval_linear.held_out_mask(classes, 0.25, seed=31))
    assert not np.array_equal(mask, eval_linear.held_out_mask(classes, 0.25, seed=32))
    assert np.bincount(classes[eval_linear.held_out_mask(classes, 0.99, 31)])[1] == 19
    assert not eval_linear.held_out_mask(classes, 0.0, seed=31).any()


def test_best_epoch_is_chosen_on_the_held_out_part_and_reported_on_val(run, monkeypatch, tmp_path, capsys):
    held = iter([50.0, 70.0, 70.0])
    val = iter([90.0, 20.0, 80.0])
    sizes = []

    def scripted(trunk, probes, images, args, label, log):
        sizes.append(len(images))
        return [{"loss": 1.0, "prec@1": next(held if "held_out" in label else val), "prec@5": 100.0}]

    monkeypatch.setattr(eval_linear, "evaluate", scripted)
    (result,) = run("--conv", 1, "--epochs", 3, "--val-fraction", 0.25)
    assert sizes[:2] == [12, 6]  # val, held out: a quarter of 24
    assert checkpoint.read(tmp_path / "exp/conv1_last.pth.tar")["steps"] == 6  # 18 images left, batches of 10
    assert (result["best"]["epoch"], result["best"]["val"]["prec@1"]) == (1, 20.0)
    assert (result["last"]["epoch"], result["last"]["val"]["prec@1"]) == (2, 80.0)
    assert checkpoint.read(tmp_path / "exp/conv1_best.pth.tar")["epoch"] == 2  # goes on with epoch 2
    assert "best epoch chosen on held-out 0.25 of train" in capsys.readouterr().out


def test_without_held_out_part_the_best_epoch_is_val_s_and_the_print_says_so(run, monkeypatch, capsys):
    val = iter([30.0, 90.0, 80.0])
    monkeypatch.setattr(
        eval_linear, "evaluate", lambda *_: [{"loss": 1.0, "prec@1": next(val), "prec@5": 100.0}]
    )
    (result,) = run("--conv", 1, "--epochs", 3)
    assert result["best"]["epoch"] == 1
    assert "best epoch chosen on val, the split reported: as the authors did" in capsys.readouterr().out


# ------------------------------------------------------------------------------- files and prints


def test_results_go_into_results_json_with_their_protocol(run, tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/results.json").write_text('{"knn": {"results": 1}}')
    results = run("--conv", 1, 2, "--epochs", 1)
    written = json.loads((tmp_path / "exp/results.json").read_text())
    assert written["knn"] == {"results": 1}
    assert written["linear"]["results"] == results
    protocol = written["linear"]["protocol"]
    assert (protocol["crops"], protocol["layers"], protocol["weight decay"]) == (
        "central crop",
        "conv1+conv2",
        1e-4,
    )
    lines = [json.loads(line) for line in (tmp_path / "exp/conv2_log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0]
    assert all(set(lines[0][split]) == {"loss", "prec@1", "prec@5"} for split in ("train", "val"))
    assert lines[0]["val"]["prec@5"] == 100  # three classes
    printed = capsys.readouterr().out
    assert "linear protocol: data " in printed
    row = next(line for line in printed.splitlines() if line.startswith("conv2 "))
    assert row.split()[-3:] == ["29.2", "32.3", "17.1"]
    assert "published, from memory, unverified" in printed and "not comparable" in printed


def test_published_figures_are_marked_and_only_beside_the_network_they_are_of():
    assert eval_linear.published_columns("vgg16", 1000) == {}
    for classes, first in ((1000, 12.9), (205, 18.6)):
        columns = eval_linear.published_columns("alexnet", classes)
        assert all(title.endswith("*") for title in columns)
        assert next(iter(columns.values()))[0] == first
        assert "unverified" in eval_linear.published_notes("alexnet", classes)[0]
        assert "not comparable" not in eval_linear.published_notes("alexnet", classes)[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--conv", "6"], "--conv 6: alexnet has no such layer; it has convolutions 1 to 5"),
        (["--conv", "3", "0"], "--conv 0: alexnet has no such layer"),
        (["--conv", "14", "--model", "random:vgg16"], "--conv 14: vgg16 has no such layer.* 1 to 13"),
        (["--conv", "1", "--model", "random:resnet"], "random networks are random:ARCH or random:ARCH:sobel"),
        (["--conv", "1", "--model", "nowhere.pth.tar"], "nowhere.pth.tar: no such checkpoint file"),
        (["--conv", "1", "--model", ""], "--model is missing"),
        (["--conv", "1", "--data", ""], "--data is missing"),
        (["--conv", "1", "--data", "nowhere"], "train/ is missing in nowhere"),
        ([], "--conv is missing"),
        (["--conv", "1", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--conv", "1", "--lr", "nan"], "--lr nan: must be a positive number"),
        (["--conv", "1", "--momentum", "1"], "--momentum 1.0: must be in"),
        (["--conv", "1", "--wd", "3"], "--weight_decay 3.0: must be a power of ten"),
        (["--conv", "1", "--val-fraction", "1"], "--val-fraction 1.0: must be in"),
        (["--conv", "1", "--lr", "1e30"], r"the loss on conv1 is (nan|inf) at iteration"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, flags, message):
    with pytest.raises(util.UserError, match=message) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)


def test_image_that_cannot_be_decoded_is_named(run, tmp_path, folder):
    for split in ("train", "val"):
        for name in COLOURS:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            pixels = (folder / split / name / "0.png").read_bytes()
            (tmp_path / "data" / split / name / "0.png").write_bytes(pixels)
    broken = tmp_path / "data/val/red/0.png"
    broken.write_bytes(pixels[: len(pixels) // 2])  # the header is good
    with pytest.raises(util.UserError, match=r"val/red/0\.png: .*; remove or mend it"):
        run("--conv", 1, "--data", tmp_path / "data")
    broken.write_bytes(b"")
    with pytest.raises(util.UserError, match=r"val/red/0\.png: the file is empty"):
        run("--conv", 1, "--data", tmp_path / "data")


def test_flags_and_defaults_are_those_of_the_usage_text():
    args = settings_of("--conv", "3", "--wd", "-7")
    assert (args.conv, args.weight_decay, args.tencrops, args.verbose) == ([3], -7, False, False)
    args = settings_of()
    assert (args.workers, args.epochs, args.batch_size, args.lr) == (4, 90, 256, 0.01)
    assert (args.momentum, args.weight_decay, args.image_size) == (0.9, -4, 224)


# ------------------------------------------------------------------------------- the shell script


def shell(cwd: Path, *flags: str, **variables: str | Path) -> subprocess.CompletedProcess:
    names = ("DATA", "MODEL", "CONV", "EXP", "LR", "WD", "WORKERS", "PYTHON")
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


def test_script_asks_for_data_and_model_before_anything_is_set_up(tmp_path):
    result = shell(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_linear.sh: set DATA ")
    result = shell(tmp_path, DATA="images")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_linear.sh: set MODEL ")


def test_script_runs_end_to_end_and_a_mistake_exits_with_code_2(tmp_path, folder, model):
    variables = {
        "PYTHON": sys.executable,
        "DATA": folder,
        "MODEL": model,
        "EXP": tmp_path / "exp",
        "WORKERS": 0,
    }
    small = ("--image-size", str(SIZE), "--epochs", "1", "--device", "cpu")
    result = shell(tmp_path, *small, CONV="2 4", **variables)
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "exp/results.json").read_text())["linear"]["protocol"]["weight decay"] == 1e-7
    )
    result = shell(tmp_path, *small, CONV="9", **variables)
    assert result.returncode == 2
    assert (
        result.stderr == "eval_linear.py: --conv 9: alexnet has no such layer; it has convolutions 1 to 5\n"
    )
