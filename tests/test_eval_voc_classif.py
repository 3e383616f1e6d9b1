"""eval_voc_classif.py: what trains, order and crops, scores, and the whole way."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import data
import eval_voc_classif as script
import models
from data.views import Batch
from evaluation import voc
from features import Pass
from models.flat import conv_block, flat
from models.network import Pool
from models.weights import build_from
from tests.helpers import ROOT, refuses
from tests.voc_folder import CLASSES, make_voc
from tests.voc_runs import CPU, SIZE, arguments, model, save_network, small_vocdir, state, vocdir  # noqa: F401
from training.optim import sgd
from training.run import Run
from training.steps import Steps
from util import Log, UserError

# ---------------------------------------------------------------------------------------- before the work


def test_defaults_are_the_papers():
    args = script.get_parser().parse_args(["--vocdir", "VOC2007", "--model", "x.pth.tar"])
    assert (args.nit, args.stepsize, args.lr, args.wd) == (80000, 5000, 0.003, 1e-6)
    assert (args.momentum, args.batch, args.seed, args.image_size) == (0.9, 16, 31, None)
    assert (args.split, args.fc6_8, args.train_batchnorm, args.eval_random_crops) == ("train", 1, 0, 1)
    assert script.MAX_GRAD_NORM == 10


@pytest.mark.parametrize("name", ["000003.jpg", "001002.jpg"])
def test_damaged_image_is_named_before_training(tmp_path, model, name):
    root = make_voc(tmp_path, number=4)
    path = root / "JPEGImages" / name
    path.write_bytes(path.read_bytes()[:-200])
    with refuses(rf"1 of 4 images .*{name}: "):
        script.main(arguments(root, model, tmp_path / "exp"))
    assert not (tmp_path / "exp" / script.CHECKPOINT).exists()


@pytest.mark.parametrize(
    "flags",
    [("--nit", "0"), ("--batch", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--wd", "-6"), ("--momentum", "1"),
     ("--checkpoint-every", "0"), ("--workers", "-1"), ("--image-size", "8"), ("--stepsize", "0")],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(flags, tmp_path):
    with refuses(f"{flags[0]}: {flags[1]}: must "):
        arguments(tmp_path, tmp_path, tmp_path, *flags)


def test_missing_model_and_folder_are_refused(vocdir, tmp_path):
    with refuses("--vocdir, --model"):
        script.get_parser().parse_args([])
    with refuses("nowhere.pth.tar: no such checkpoint file"):
        script.main(arguments(vocdir, tmp_path / "nowhere.pth.tar", tmp_path / "exp"))
    assert not (tmp_path / "exp").exists()


def test_user_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "eval_voc_classif.py", "--device", "cpu", "--model", "x.pth.tar"]
    result = subprocess.run([*command, "--vocdir", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("eval_voc_classif.py: ") and result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------- training

ALL_PARTS = {"conv", "norm", "classifier", "head"}


def moved_parts(net: models.Network, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts of the network differ from an earlier state_dict."""
    in_convolutions = {id(module) for module in net.parts()[0].modules()}
    moved = set()
    for path, module in net.named_modules():
        for name, value in module.state_dict(keep_vars=True).items():
            if "." in name or torch.equal(value, before[f"{path}.{name}"]):
                continue
            if not isinstance(value, nn.Parameter):
                moved.add("statistics")
            elif module is net.top_layer:
                moved.add("head")
            elif id(module) not in in_convolutions:
                moved.add("sobel" if path.startswith("sobel") else "classifier")
            else:
                moved.add("norm" if isinstance(module, nn.BatchNorm2d) else "conv")
    return moved


@pytest.mark.parametrize(("arch", "sobel"), [("tiny", False), ("tiny", True), ("resnet18s", False)])
@pytest.mark.parametrize(
    ("fc6_8", "train_batchnorm", "expected"),
    [
        (1, 0, {"classifier", "head"}),
        (1, 1, {"classifier", "head", "norm"}),
        (0, 0, ALL_PARTS),
        (0, 1, ALL_PARTS),
    ],
)
def test_only_what_should_train_moves(small_vocdir, tmp_path, fc6_8, train_batchnorm, expected, arch, sobel):
    path = save_network(tmp_path / "model.pth.tar", arch, sobel)
    before = build_from(checkpoint.read(path), path)
    voc.renew(before, 4, seed=31)
    flags = ("--fc6_8", str(fc6_8), "--train_batchnorm", str(train_batchnorm), "--lr", "0.1", "--wd", "0.01")
    script.main(arguments(small_vocdir, path, tmp_path, *flags, "--nit", "2"))
    net = build_from(checkpoint.read(tmp_path / script.CHECKPOINT), "trained")
    expected = expected - {"classifier"} if arch == "resnet18s" else expected  # it has none
    assert moved_parts(net, before.state_dict()) == expected  # statistics and Sobel in no case


def test_passes_have_the_papers_schedule_and_clipping(vocdir, tmp_path, model, monkeypatch):
    passes = []
    train_pass = Run.train_pass

    def recorded(run, *args, **options):
        passes.append((args[3], options))
        train_pass(run, *args, **options)

    monkeypatch.setattr(Run, "train_pass", recorded)
    script.main(arguments(vocdir, model, tmp_path, "--nit", "9"))
    # 24 images in batches of 7: four iterations an epoch, the last of 3 images; the third ends at the ninth.
    orders = [draws for draws, _ in passes]
    assert [len(order) for order in orders] == [24, 24, 7]
    assert all(sorted(order) == list(range(24)) for order in orders[:2])
    assert not np.array_equal(orders[0], orders[1])
    for _, options in passes:
        assert options["clip"] == 10
        rates = [options["schedule"](iteration) for iteration in (0, 4999, 5000, 9999, 10000)]
        assert rates == pytest.approx([0.003, 0.003, 0.0015, 0.0015, 0.00075])


def make_steps(net: models.Network, labels: torch.Tensor, lr: float) -> Steps:
    voc.freeze(net, fc6_8=True, train_batchnorm=False)
    wrapped = voc.GlobalStatistics(net).train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [sgd(net.parameters(), lr, 0.0, 0.0)]
    loss = partial(script.loss, labels)
    return Steps(wrapped, optimizers, loss, CPU, "fp32", scaler, clip=script.MAX_GRAD_NORM)


BATCH = Batch(torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8), torch.tensor([2, 0]), [])


def test_loss_of_a_step_is_the_mean_over_images_and_its_gradient_is_clipped_at_ten():
    net = models.build("tiny", num_clusters=4, seed=1)
    nn.init.constant_(net.parts()[1].get_submodule("2.1").weight, 1e3)  # large features: a large gradient
    before = [p.detach().clone() for p in net.parameters()]
    labels = torch.tensor([[1, -1, 0, 1], [0, 0, 0, 0], [-1, 1, 1, 0]], dtype=torch.int8)
    steps = make_steps(net, labels, lr=1.0)
    torch.manual_seed(0)
    value, _ = steps.step(BATCH, 2, 0, False)
    step = math.sqrt(sum(((p - old) ** 2).sum().item() for p, old in zip(net.parameters(), before)))
    assert step == pytest.approx(10.0, rel=1e-3)

    for p, old in zip(net.parameters(), before):
        p.data.copy_(old)
    torch.manual_seed(0)
    logits = voc.GlobalStatistics(net).train()(data.to_input(BATCH.views, CPU))
    assert value == pytest.approx(voc.voc_loss(logits, labels[[2, 0]]).item() / 2, rel=1e-5)


def test_loss_that_is_not_finite_stops_and_changes_nothing():
    net = models.build("tiny", num_clusters=4, seed=1)
    net.top_layer.bias.data[1] = math.nan
    before = {name: value.clone() for name, value in net.state_dict().items()}
    steps = make_steps(net, torch.ones(3, 4, dtype=torch.int8), lr=0.1)
    with pytest.raises(UserError, match=r"nan at iteration 1234;"):
        steps.step(BATCH, 2, 1234, False)
    before.pop("top_layer.bias")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.fixture
def batches(monkeypatch) -> list[tuple[int, Batch]]:
    """(iteration, batch) of every step that is made."""
    made = []
    step = Steps.step

    def recorded(steps, batch, total, iteration, stop):
        made.append((iteration, batch))
        return step(steps, batch, total, iteration, stop)

    monkeypatch.setattr(Steps, "step", recorded)
    return made


def test_training_sees_the_crops_of_vocs_protocol_whatever_the_workers(vocdir, tmp_path, model, batches):
    script.main(arguments(vocdir, model, tmp_path / "none", "--nit", "6"))
    assert [iteration for iteration, _ in batches] == list(range(6))
    assert [len(batch.index) for _, batch in batches] == [7, 7, 7, 3, 7, 7]
    trained, _ = voc.open_voc(vocdir, "train")
    for first, epoch in ((0, 0), (4, 1)):
        index = torch.cat([batch.index for _, batch in batches[first : first + 2]])
        view = data.RandomView(trained.images, data.voc_train_crop(SIZE)).at(31, epoch)
        seen = torch.cat([batch.views for _, batch in batches[first : first + 2]])
        assert torch.equal(seen, torch.stack([view[(i, index[i].item())][0] for i in range(14)]))

    script.main(arguments(vocdir, model, tmp_path / "two", "--nit", "6", "--workers", "2"))
    for (_, batch), (_, same) in zip(batches[:6], batches[6:]):
        assert torch.equal(batch.views, same.views) and torch.equal(batch.index, same.index)


def test_crops_are_squares_of_10_to_50_percent_of_the_area():
    """Pixels that tell their own place show which square was taken."""
    height, width, size = 90, 120, 8
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None, :].expand(height, width)
    place = torch.stack([rows, columns, rows])
    torch.manual_seed(0)
    views = torch.cat(
        [script.random_crops(data.voc_train_crop(size))(place) for _ in range(20)]
    ).float()  # (200, 3, 8, 8)
    tall = (views[:, 0, -1, 0] - views[:, 0, 0, 0]) * size / (size - 1)  # pixels between the outer rows
    wide = (views[:, 1, 0, -1] - views[:, 1, 0, 0]) * size / (size - 1)
    assert torch.all((tall - wide.abs()).abs() <= 4)
    share = tall * wide.abs() / (height * width)
    assert 0.08 < share.min() < 0.15 and 0.4 < share.max() < 0.55
    assert 60 < int((wide < 0).sum()) < 140  # mirrored


# ---------------------------------------------------------------------------------------- evaluation


def random_squares(size: int):
    return script.random_crops(data.voc_train_crop(size))


def predict(net: models.Network, tested: voc.VocSplit, crops, seed: int = 31, batch: int = 7, rows=range(24)):
    view = data.RandomView(tested.images, crops(SIZE)).at(seed, epoch=0)
    return script.predict(net, view, Pass(batch, 0, CPU), rows, "test", Log(quiet=True))


def test_fixed_crops_are_scored_one_by_one_and_summed(vocdir):
    _, tested = voc.open_voc(vocdir, "train")
    net = models.build("tiny", num_clusters=4, seed=1).eval()
    scores = predict(net, tested, data.ten_crops)
    for i in (0, 23):
        views = data.ten_crops(SIZE)(tested.images.decode(i))
        with torch.no_grad():
            expected = sum(net(data.normalise(view[None]))[0] for view in views)
        assert np.allclose(scores[i], expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(predict(net, tested, data.ten_crops, rows=range(5, 9)), scores[5:9], atol=1e-5)


def test_random_crops_depend_on_seed_and_image_alone(vocdir):
    _, tested = voc.open_voc(vocdir, "train")
    net = models.build("tiny", num_clusters=4, seed=1)
    scores = predict(net, tested, random_squares)
    torch.manual_seed(1)
    assert np.array_equal(predict(net, tested, random_squares), scores)
    assert np.allclose(predict(net, tested, random_squares, batch=5), scores, rtol=1e-4, atol=1e-5)
    assert np.allclose(predict(net, tested, random_squares, rows=range(9, 24)), scores[9:], atol=1e-5)
    assert not np.allclose(predict(net, tested, random_squares, seed=1), scores, rtol=1e-3)
    assert not np.allclose(predict(net, tested, data.ten_crops), scores, rtol=1e-3)


def test_class_without_positives_is_told(capsys):
    labels = np.array([[1, -1], [-1, 0], [1, -1]], dtype=np.int8)
    images = data.ImageList(Path("nowhere"), ["0.jpg", "1.jpg", "2.jpg"])
    split = voc.VocSplit("test", images, labels, ["class0", "class1"])
    results = voc.average_precisions(np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]]), split)
    script.print_table(results, split, Log())
    assert "left out of the means: class1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- end to end


def wide(sobel: bool = False, seed: int | None = None) -> models.Network:
    """Two small convolutions, and 4096 units on them, which learn at the paper's rate."""
    features = [
        *conv_block(2 if sobel else 3, 8, kernel=5, stride=2, padding=2),
        Pool(3, 2),
        *conv_block(8, 8, kernel=3, padding=1),
        Pool(3, 2),
    ]
    classifier = [nn.Dropout(0.5), nn.Linear(8 * 4, 4096), nn.ReLU()]
    return flat("wide", features, classifier, 2, sobel, seed)


def test_trained_classifier_beats_shuffled_labels_by_far(tmp_path, monkeypatch, capsys):
    """The whole way; pixels of the tested part of each photograph are in no training image."""
    monkeypatch.setitem(models.ARCHITECTURES, "wide", wide)
    model = save_network(tmp_path / "model.pth.tar", "wide")
    root, exp = make_voc(tmp_path, number=32), tmp_path / "exp"
    flags = ("--split", "trainval", "--nit", "120", "--batch", "16", "--lr", "0.01", "--stepsize", "60")
    results = script.main(arguments(root, model, exp, *flags, "--fc6_8", "0"))
    out = capsys.readouterr().out
    stored = json.loads((exp / "results.json").read_text())["eval_voc_classif"]
    assert stored["results"] == json.loads(json.dumps(results))
    protocol = stored["protocol"]
    assert protocol["split"] == "trainval -> test" and protocol["images"] == "64 -> 32"
    assert protocol["layers"].startswith("all layers") and protocol["iterations"] == 120
    assert "10 random" in protocol["crops"]
    for words in ("eval_voc_classif protocol: ", "11-point AP", "loss "):
        assert words in out

    saved = np.load(exp / script.SCORES)
    assert list(saved["classes"]) == sorted(CLASSES) and saved["images"][0] == "002000"
    tested = voc.open_voc(root, "trainval")[1]
    assert voc.average_precisions(saved["scores"], tested)["mAP"] == pytest.approx(results["mAP"])
    rng = np.random.default_rng(0)
    shuffled = [voc.average_precisions(rng.permutation(saved["scores"]), tested)["mAP"] for _ in range(20)]
    assert results["mAP"] > np.mean(shuffled) + 30
    assert results["mAP"] > max(shuffled) + 10


@pytest.mark.slow
def test_two_processes_do_what_one_does(small_vocdir, tmp_path):
    command = ["eval_voc_classif.py", "--vocdir", small_vocdir, "--model", "random:resnet18s", "--fc6_8", "0"]
    command += ["--image-size", "32", "--workers", "0", "--device", "cpu", "--nit", "3", "--batch", "7"]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    for exp, launcher in launchers.items():
        result = subprocess.run(
            [sys.executable, *launcher, *map(str, command), "--exp", str(tmp_path / exp)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    scores = [np.load(tmp_path / exp / script.SCORES)["scores"] for exp in launchers]
    assert np.allclose(*scores, rtol=1e-4, atol=5e-3)  # sums of ten logits, up to 18


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("eval_voc_classif.sh", "--fc6_8 1 {} --nit 80000 --stepsize 5000 --lr 0.003 --batch 16"),
        ("eval_voc_classif_fc6_8.sh", "--fc6_8 1 {} --nit 150000 --stepsize 5000 --lr 0.003 --batch 16"),
        ("eval_voc_classif_all.sh", "--fc6_8 0 {} --nit 150000 --stepsize 20000 --lr 0.001 --batch 16"),
    ],
)
def test_shell_scripts_pass_the_papers_settings(vocdir, tmp_path, model, name, own):
    recorder = tmp_path / "recorder"
    recorder.write_text('#!/bin/sh\necho "$*" >"$0.calls"\n')
    recorder.chmod(0o755)
    settings = {"VOC": str(vocdir), "MODEL": str(model), "PYTHON": str(recorder), "WORKERS": "3"}
    own = own.format("--train_batchnorm 1 --eval_random_crops 1")
    base = {"PATH": os.environ["PATH"]}
    subprocess.run([ROOT / name, "--seed", "5"], env=base | settings, cwd=tmp_path, check=True)
    call = (tmp_path / "recorder.calls").read_text().strip()
    assert call == (
        f"{ROOT}/eval_voc_classif.py --vocdir {vocdir} --model {model} --split trainval {own} "
        "--exp exp --workers 3 --seed 5"
    )
    del settings["VOC"], settings["MODEL"]
    command = [ROOT / name, vocdir, model]
    subprocess.run(command, env=base | settings | {"LR": "1"}, cwd=tmp_path, check=True)
    assert "--lr 1 " in (tmp_path / "recorder.calls").read_text()
    result = subprocess.run([ROOT / name, vocdir], env=base | settings, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "MODEL=" in result.stderr
    help_text = subprocess.run([ROOT / name, "--help"], env=base, capture_output=True, text=True).stdout
    assert "TRAIN_BATCHNORM=1" in help_text and "set -euo" not in help_text


@pytest.mark.slow
def test_script_runs_an_alexnet_from_its_shell_script(vocdir, tmp_path):
    """As a user would: a Sobel AlexNet in the authors' form (DataParallel names), image size 64."""
    net = models.build("alexnet", sobel=True, num_clusters=3, seed=0)
    names = {name.replace("features.", "features.module."): value for name, value in net.state_dict().items()}
    torch.save({"epoch": 1, "arch": "alexnet", "state_dict": names}, tmp_path / "authors.pth.tar")
    settings = {
        "VOC": vocdir,
        "MODEL": tmp_path / "authors.pth.tar",
        "EXP": tmp_path,
        "PYTHON": sys.executable,
    }
    settings |= {"NIT": "3", "WORKERS": "2", "BATCH": "8"}
    result = subprocess.run(
        [ROOT / "eval_voc_classif_fc6_8.sh", "--image-size", "64", "--device", "cpu"],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "results.json").read_text())["eval_voc_classif"]
    assert stored["protocol"]["sobel"] is True and stored["protocol"]["arch"] == "alexnet"
    assert stored["protocol"]["layers"] == "fc6-8 trained, batch norm scale and shift trained too"
    assert set(stored["results"]["AP"]) == set(CLASSES)
