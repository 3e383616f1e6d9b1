"""The linear probe: its protocol against a plain one, resuming, side by side, what it refuses and writes."""

import json
import math
import os
import signal
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
from models import weights
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
HELD = ("--val-fraction", 0.25, "--batch_size", 7)  # 18 images left: three steps an epoch
LAYERS = ("--conv", 2, 1, 2, "--layers", "fc7")
COLOURS = {"blue": (60, 90, 170), "green": (70, 150, 60), "red": (190, 80, 70)}


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """`tiny`, for all but the protocol."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "tiny", tiny)
        yield


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


def write_model(path: Path, arch: str) -> Path:
    """A checkpoint of a network with Sobel whose batch-norm statistics are not the initial ones."""
    net = models.build(arch, sobel=True, num_clusters=7, seed=5)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.2, 0.5, generator=generator)
    checkpoint.save(path, {"arch": arch, "state_dict": net.state_dict()})
    return path


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "alexnet.pth.tar", "alexnet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.pth.tar", "tiny")


@pytest.fixture(scope="module")
def evaluate(folder, model):
    """evaluate(exp, *flags) runs eval_linear with small settings; flags win over them."""

    def call(exp: Path, *flags: str | Path) -> list[dict]:
        settings = ["--data", folder, "--model", model, "--exp", exp, "--image-size", SIZE, "--device", "cpu"]
        settings += ["--workers", 0, "--batch_size", 10, "--epochs", 2]
        return eval_linear.main(eval_linear.get_parser().parse_args([*map(str, settings), *map(str, flags)]))

    return call


@pytest.fixture
def run(evaluate, tmp_path):
    """run(*flags): as `evaluate`, into tmp_path / "exp"."""
    return lambda *flags: evaluate(tmp_path / "exp", *flags)


@pytest.fixture(scope="module")
def whole(evaluate, tmp_path_factory) -> tuple[Path, list[dict]]:
    """An uninterrupted run of three layers: its folder and its results."""
    exp = tmp_path_factory.mktemp("whole")
    return exp, evaluate(exp, *HELD, *LAYERS)


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


def assert_same_classifier(one: Path, other: Path, layer: str, but: tuple[str, ...] = ()) -> None:
    """The files of a layer in two folders, but for some lines of the protocol."""
    for which in ("last", "best"):
        states = [checkpoint.read(exp / f"{layer}_{which}.pth.tar") for exp in (one, other)]
        for state in states:
            state["protocol"] = {k: v for k, v in state["protocol"].items() if k not in but}
        assert_same(*states)
    log = f"{layer}_log.jsonl"
    assert (one / log).read_text() == (other / log).read_text()


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


def test_random_network_is_the_one_that_training_starts_from():
    net = weights.load("random:alexnet:sobel", seed=4)
    start = models.build("alexnet", sobel=True, seed=util.derive_seed(4, "weights"))
    assert_same(dict(net.state_dict()), dict(start.state_dict()))
    assert weights.load("random:alexnet", seed=4).sobel is None


def test_layers_of_a_resnet_are_probed_by_name(run, tmp_path):
    results = run("--model", "random:resnet18s", "--conv", 1, "--layers", "avgpool", "layer4", "--epochs", 1)
    assert [(r["layer"], r["values"]) for r in results] == [
        ("conv1", 9216),
        ("layer4", 8192),
        ("avgpool", 512),
    ]
    assert checkpoint.read(tmp_path / "exp/avgpool_last.pth.tar")["state_dict"]["weight"].shape == (3, 512)


# ------------------------------------------------------------------------------- side by side, resumed


def test_probes_side_by_side_are_the_ones_trained_alone(run, whole, tmp_path):
    together, results = whole
    assert [result["layer"] for result in results] == ["conv1", "conv2", "fc7"]
    for result in results:
        layer = result["layer"]
        exp = tmp_path / layer
        assert run(*HELD, "--layers", layer, "--exp", exp) == [result]
        assert_same_classifier(together, exp, layer, but=("layers",))


def test_result_does_not_depend_on_the_number_of_workers(run, tmp_path):
    run("--conv", 2, "--exp", tmp_path / "none", "--epochs", 1)
    run("--conv", 2, "--exp", tmp_path / "two", "--epochs", 1, "--workers", 2)
    assert_same_classifier(tmp_path / "none", tmp_path / "two", "conv2")


def assert_same_run(one: Path, other: Path) -> None:
    for layer in ("conv1", "conv2", "fc7"):
        assert_same_classifier(one, other, layer)


def test_resumed_run_equals_uninterrupted_run(run, whole, tmp_path):
    exp, results = whole
    run(*HELD, *LAYERS, "--epochs", 1)
    assert run(*HELD, *LAYERS, "--resume") == results
    assert_same_run(exp, tmp_path / "exp")
    assert run(*HELD, *LAYERS, "--resume", tmp_path / "exp/linear.pth.tar") == results  # nothing to do
    assert_same_run(exp, tmp_path / "exp")


def test_run_that_goes_on_in_another_folder_has_all_its_files_there(run, whole, tmp_path):
    exp, results = whole
    run(*HELD, *LAYERS, "--epochs", 1)
    first = tmp_path / "exp/linear.pth.tar"
    assert run(*HELD, *LAYERS, "--resume", first, "--exp", tmp_path / "new") == results
    assert_same_run(exp, tmp_path / "new")


@pytest.mark.parametrize(
    "killed_at", ["conv1_last.pth.tar", "conv2_last.pth.tar", "fc7_last.pth.tar", "linear.pth.tar"]
)
def test_run_killed_between_two_files_resumes_to_the_same_end(run, whole, tmp_path, monkeypatch, killed_at):
    exp, results = whole
    save = checkpoint.save

    def save_until(path, state):
        if state["epoch"] == 2 and Path(path).name == killed_at:
            raise KeyboardInterrupt
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", save_until)
    with pytest.raises(KeyboardInterrupt):
        run(*HELD, *LAYERS)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run(*HELD, *LAYERS, "--resume") == results
    assert_same_run(exp, tmp_path / "exp")


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_run_that_a_signal_ends_in_mid_epoch_goes_on_exactly(run, whole, tmp_path, monkeypatch, at):
    """Asked for in a step, it ends the run after the next one: in the middle of an epoch and at its end."""
    exp, results = whole
    loss, steps = eval_linear.loss, []

    def with_signal(*args):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(eval_linear, "loss", with_signal)
    with pytest.raises(util.Preempted, match="SIGTERM"):
        run(*HELD, *LAYERS)
    monkeypatch.setattr(eval_linear, "loss", loss)
    saved = checkpoint.read(tmp_path / "exp/linear.pth.tar")
    assert (saved["iteration"], saved["position"]) == (at + 1, at % 3 + 1)
    assert run(*HELD, *LAYERS, "--resume", "auto") == results
    assert_same_run(exp, tmp_path / "exp")


def test_resuming_with_other_settings_layers_images_or_network_is_refused(run, tmp_path):
    run("--conv", 2, "--epochs", 1)
    saved = (tmp_path / "exp/linear.pth.tar").read_bytes()
    with pytest.raises(util.UserError, match=r"was run with lr 0.01, not 0.1; .* start a new run$"):
        run("--conv", 2, "--resume", "--lr", 0.1)
    with pytest.raises(util.UserError, match=r"was run with layers \['conv2'\], not \['conv1', 'conv2'\]"):
        run("--conv", 1, 2, "--resume")
    with pytest.raises(util.UserError, match=r"network does not fit .*another network than that of --model"):
        run("--conv", 2, "--resume", "--model", "random:tiny:sobel")
    with pytest.raises(util.UserError, match=r"holds another run .*; continue it with --resume"):
        run("--conv", 2)
    assert (tmp_path / "exp/linear.pth.tar").read_bytes() == saved


def test_resuming_on_other_images_is_refused(run, folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in COLOURS:
            (tmp_path / "data" / split / name).symlink_to(folder / split / name)
    run("--data", tmp_path / "data", "--conv", 2, "--epochs", 1)
    run("--conv", 2, "--epochs", 1, "--resume")  # moved elsewhere
    (tmp_path / "data/val/red").unlink()
    with pytest.raises(util.UserError, match=r"the run had 12 images, .*val has 8"):
        run("--data", tmp_path / "data", "--conv", 2, "--resume")


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder, tmp_path):
    """torchrun; 24 images in batches of 7 leave 3 for the last, 12 of val are dealt out."""
    flags = f"--data {folder} --model random:resnet18s --layers conv1 avgpool --image-size 32 --device cpu "
    flags += "--workers 0 --epochs 2 --batch_size 7"
    launcher = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "eval_linear.py"),
    ]
    found = []
    for name, start in (("one", [str(ROOT / "eval_linear.py")]), ("two", ["-m", *launcher])):
        command = [sys.executable, *start, *flags.split(), "--exp", str(tmp_path / name)]
        result = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / name / "results.json").read_text())["linear"]["results"])
        states = [
            checkpoint.read(tmp_path / name / f"{layer}_last.pth.tar") for layer in ("conv1", "avgpool")
        ]
        found[-1].append([state["state_dict"]["weight"] for state in states])
    *results, states = zip(*found)
    for one, two in results:
        for split in ("train", "val"):
            assert one["last"][split] == pytest.approx(two["last"][split], rel=1e-3)
    for one, two in zip(*states):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


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

    def evaluate(probes, view, how, label, log):
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
    assert "linear protocol: data " in printed
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
    assert (args.momentum, args.weight_decay, args.image_size, args.seed) == (0.9, -4, 224, 31)
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
