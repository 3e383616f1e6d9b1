"""What main.py trains and leaves behind; how a run goes on is in tests/training/."""

import csv
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import clustering
import data
import features
import main
import models
import training.run
from data.sampling import SAMPLERS
from models.weights import build_from, load
from tests.helpers import ROOT, equal
from tests.runs import arguments, assert_same_run, log_of, train
from training import logs
from util import UserError, derive_seed

# ------------------------------------------------------------------------------- the files of a run


def epochs_of(exp):
    with open(exp / "clusters", "rb") as file:
        return pickle.load(file)


def test_clusters_is_one_pickle_with_a_partition_of_the_images_an_epoch(whole):
    epochs = epochs_of(whole)
    assert [len(lists) for lists in epochs] == [8, 8, 8]
    for lists in epochs:
        assert sorted(i for images in lists for i in images) == list(range(60))


def test_assignments_csv_is_the_last_clustering(whole, photos):
    last = epochs_of(whole)[-1]
    with open(whole / "assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(data.list_images(photos).paths)
    assert all(i in last[int(row["cluster"])] for i, row in enumerate(rows))
    saved = checkpoint.read(whole / "checkpoint.pth.tar")["parts"]["labels"]["assignments"][0]
    assert np.allclose([float(row["distance"]) for row in rows], saved["distances"], rtol=1e-4, atol=1e-6)


def test_log_has_a_line_an_epoch_with_what_people_ask_for(whole):
    records = logs.read_lines(whole / "log.jsonl")
    assert [r["epoch"] for r in records] == [0, 1, 2]
    for r in records:
        assert 0 <= r["nmi_classes"] <= 1 and "ami_classes" in r
        assert r["loss_over_log_k"] == pytest.approx(r["loss"] / math.log(8))
        assert {"features", "pca", "clustering", "train", "total"} == set(r["seconds"])
        assert r["clusters"]["nonempty"] <= 8 and r["clusters"]["entropy"] <= math.log(8) + 1e-9
        assert r["peak_memory_gib"] > 0 and r["images_per_second"]["train"] > 0
    assert "nmi_previous" not in records[0] and 0 <= records[1]["nmi_previous"] <= 1
    assert "epoch 2 training 60/60" in (whole / "train.log").read_text()


def test_checkpoints_are_counted_in_iterations_over_the_whole_training(whole):
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert names == [f"checkpoint_{n}.pth.tar" for n in range(4)]
    for n in range(4):
        saved = checkpoint.read(whole / "checkpoints" / f"checkpoint_{n}.pth.tar")
        assert saved["iteration"] == 3 * n and saved["epoch"] == 3 * n // 4
    last = checkpoint.read(whole / "checkpoint.pth.tar")
    assert last["epoch"] == 3 and last["arch"] == "tiny"
    assert last["state_dict"]["top_layer.bias"].shape == (8,)


def test_checkpoint_0_is_the_network_that_training_started_from(whole):
    net = load(whole / "checkpoints" / "checkpoint_0.pth.tar")
    fresh = models.build("tiny", True, seed=derive_seed(31, "weights"))
    assert torch.equal(net.features[0].weight, fresh.features[0].weight)
    assert torch.equal(net.features[1].running_mean, fresh.features[1].running_mean)


def test_config_tells_settings_and_images(whole, photos):
    config = json.loads((whole / "config.json").read_text())
    assert config["args"]["dir"] == str(photos.resolve()) and config["args"]["nmb_cluster"] == 8
    assert config["images"]["number"] == 60 and len(config["images"]["classes"]) == 6


def test_the_network_of_the_moment_of_clustering_is_kept(whole, photos):
    """Its features, whitened, assigned to its centroids, are the stored assignment; the weights went on."""
    path, saved = features.read_clustering(whole)
    net = build_from(saved, path)
    to_points = features.ToPoints.from_state_dict(saved["transform"])
    assignment = clustering.Assignment.from_state_dict(saved["assignment"])
    cpu = torch.device("cpu")
    view = data.PlainView(data.list_images(photos), data.central_crop(32))
    rows, broken = features.extract_features(net, saved["layer"], view, features.Pass(16, 0, cpu))
    labels, distances = clustering.assign(to_points(rows, cpu)[0], assignment.centroids)
    assert saved["epoch"] == 2 and saved["paths"] == list(view.images.paths) and broken == []
    assert saved["layer"] == "fc7.pre" and saved["metric"] == "l2"
    assert (labels == assignment.labels).all() and np.allclose(distances, assignment.distances, atol=1e-5)
    after = load(whole / "checkpoint.pth.tar").state_dict()
    assert not torch.equal(after["features.0.weight"], saved["state_dict"]["features.0.weight"])
    assert not any(name.startswith("top_layer") for name in saved["state_dict"])
    in_checkpoint = checkpoint.read(whole / "checkpoint.pth.tar")["parts"]["labels"]["assignments"][0]
    assert equal(in_checkpoint, saved["assignment"])


# ------------------------------------------------------------------------------- what training does


def test_class_names_do_not_change_training_by_a_bit(photos, tmp_path):
    """The same images in the same order under shuffled class names, through a list of paths."""
    names = sorted(p.name for p in photos.iterdir())
    shuffled = dict(zip(names, names[1:] + names[:1]))
    exps = []
    for renamed in (False, True):
        root = tmp_path / str(renamed)
        lines = []
        for path in data.list_images(photos).paths:
            source, name = Path(path).parent.name, Path(path).name
            # Every image of a class moves to another folder; half of the classes are merged as well.
            folder = shuffled[source] if renamed else source
            folder = names[0] if renamed and folder in names[:3] else folder
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / path, root / folder / f"{source}_{name}")
            lines.append(f"{folder}/{source}_{name}")
        (root / "list.txt").write_text("\n".join(lines))
        exps.append(train(root / "list.txt", tmp_path / f"exp{renamed}", "--epochs", 2))
    one, two = (checkpoint.read(exp / "checkpoint.pth.tar") for exp in exps)
    for name in ("state_dict", "optimizer"):
        assert equal(one[name], two[name]), name
    assert equal(one["parts"]["head"], two["parts"]["head"])
    assert equal(one["parts"]["labels"]["assignments"], two["parts"]["labels"]["assignments"])
    whitening = [checkpoint.read(exp / checkpoint.CLUSTERING)["transform"] for exp in exps]
    assert equal(*whitening)
    assert (exps[0] / "clusters").read_bytes() == (exps[1] / "clusters").read_bytes()
    assert log_of(exps[0])[0]["nmi_classes"] != log_of(exps[1])[0]["nmi_classes"]


def test_workers_do_not_change_training_by_a_bit(photos, whole, tmp_path):
    assert_same_run(train(photos, tmp_path / "exp", "--checkpoints", 3, "--workers", 2), whole)


def test_the_head_is_new_each_epoch_and_its_optimiser_has_no_momentum(whole):
    heads = [checkpoint.read(whole / "checkpoints" / f"checkpoint_{n}.pth.tar") for n in (0, 3)]
    assert not any(
        state.get("momentum_buffer") is not None for state in heads[0]["parts"]["head"]["state"].values()
    )
    last = checkpoint.read(whole / "checkpoint.pth.tar")
    group = last["parts"]["head"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.0, 1e-5)
    group = last["optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 1e-5)
    fresh = heads[0]["state_dict"]["top_layer.weight"]
    assert fresh.std().item() == pytest.approx(0.01, rel=0.15)
    assert not heads[0]["state_dict"]["top_layer.bias"].any()
    expected = models.build("tiny", True)
    expected.set_head(8, derive_seed(31, "head", 0))
    assert torch.equal(fresh, expected.top_layer.weight)


@pytest.mark.parametrize("reassign, images", [(0.5, 30), (2, 120), (0.26, 15)])
def test_reassign_sets_the_length_of_an_epoch(photos, tmp_path, reassign, images):
    exp = train(photos, tmp_path / "exp", "--reassign", reassign, "--epochs", 1)
    assert f"epoch 0 training {images}/{images}" in (exp / "train.log").read_text()
    assert log_of(exp)[0]["iteration"] == math.ceil(images / 16)


def test_training_draws_uniformly_over_clusters_with_each_images_own_label(photos, tmp_path, monkeypatch):
    seen, given = [], []
    original = main.loss

    def spy(labels, net, x, index):
        seen.extend(index.tolist())
        given.extend(labels.of(index).tolist())
        return original(labels, net, x, index)

    monkeypatch.setattr(main, "loss", spy)
    exp = train(photos, tmp_path / "exp", "--epochs", 1)
    sizes = log_of(exp)[0]["clusters"]
    assert sizes["max"] > sizes["min"] + 1  # so that drawing in proportion would show
    counts = np.bincount(given, minlength=8)
    assert counts.sum() == 60 and counts[counts > 0].max() - counts[counts > 0].min() <= 1
    lists = epochs_of(exp)[0]
    assert all(image in lists[label] for image, label in zip(seen, given))


def test_pic_trains_with_as_many_outputs_as_it_finds_clusters(photos, tmp_path):
    exp = train(photos, tmp_path / "exp", "--clustering", "PIC", "--epochs", 2)
    epochs = epochs_of(exp)
    outputs = len(checkpoint.read(exp / "checkpoint.pth.tar")["state_dict"]["top_layer.bias"])
    assert outputs == len(epochs[-1]) == log_of(exp)[-1]["clusters"]["number"]
    assert 1 < len(epochs[-1]) < 60


def test_released_sampling_runs_and_differs(photos, whole, tmp_path):
    exp = train(photos, tmp_path / "exp", "--sampling", "released", "--epochs", 1)
    assert epochs_of(exp) == epochs_of(whole)[:1]
    assert log_of(exp)[0]["loss"] != log_of(whole)[0]["loss"]
    assert SAMPLERS.keys() == {"uniform", "released"}


def test_init_takes_weights_from_a_released_file(photos, tmp_path):
    net = models.build("tiny", True, 5, seed=77)
    state = {"arch": "tiny", "state_dict": net.state_dict()}
    checkpoint.save(tmp_path / "released.tar", state)
    exp = train(photos, tmp_path / "exp", "--init", tmp_path / "released.tar", "--start_epoch", 2)
    start = load(exp / "checkpoints" / "checkpoint_0.pth.tar")
    assert torch.equal(start.classifier[1].weight, net.classifier[1].weight)
    assert [r["epoch"] for r in log_of(exp)] == [2]


def test_tensorboard_holds_the_log(photos, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = train(photos, tmp_path / "exp", "--tensorboard", "--epochs", 2)
    events = EventAccumulator(str(exp / "tensorboard"))
    events.Reload()
    losses = [r["loss"] for r in log_of(exp)]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses, rel=1e-5)


def test_a_run_on_shards_is_the_run_on_the_folder(photos, tmp_path, whole):
    pytest.importorskip("webdataset")
    from tools import make_shards

    pattern = str(tmp_path / "small-%06d.tar")
    make_shards.main(make_shards.get_parser().parse_args([str(photos), pattern, "--size-mb", "0.05"]))
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) > 1
    args = arguments(photos, tmp_path / "exp", "--checkpoints", 3)
    args.dir, args.shards = None, f"{tmp_path}/small-{{000000..{len(shards) - 1:06d}}}.tar"
    main.main(args)
    assert_same_run(tmp_path / "exp", whole)


def test_crops_are_decoded_once_with_a_cache_and_the_run_is_the_same(photos, tmp_path, whole, monkeypatch):
    decoded = []
    original = data.PlainView.__getitem__

    def spy(self, i):
        before = self.images.decode
        self.images.decode = lambda i: decoded.append(i) or before(i)
        try:
            return original(self, i)
        finally:
            del self.images.decode

    monkeypatch.setattr(data.PlainView, "__getitem__", spy)
    exp = train(photos, tmp_path / "exp", "--crop-cache", tmp_path / "cache", "--checkpoints", 3)
    assert sorted(decoded) == list(range(60))  # three passes
    assert_same_run(exp, whole)
    train(photos, tmp_path / "again", "--epochs", 1, "--crop-cache", tmp_path / "cache")
    assert len(decoded) == 60
    train(photos, tmp_path / "off", "--epochs", 1, "--crop-cache", "off")
    assert len(decoded) == 120 and not list(tmp_path.rglob("off/*.cache"))


def test_a_compiled_step_trains_the_same_within_rounding(photos, tmp_path, monkeypatch):
    """The compiler is asked for the whole network's forward; here its front end alone, which needs no C++."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    monkeypatch.setattr(training.run.machine, "check_compiler", lambda device: None)
    one = train(photos, tmp_path / "one", "--epochs", 1)
    two = train(photos, tmp_path / "two", "--epochs", 1, "--compile")
    assert log_of(two)[0]["loss"] == pytest.approx(log_of(one)[0]["loss"], abs=1e-4)


# ------------------------------------------------------------------------------- by command, other networks


@pytest.mark.slow
def test_alexnet_trains_end_to_end_from_the_command_line(photos, tmp_path):
    """AlexNet with Sobel on photographs of several kinds in a flat folder, then resumed for another epoch."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:40]):
        image = Image.open(path).convert(("RGB", "L", "P", "RGBA", "CMYK")[i % 5])
        image.save(flat / f"{i}{'.tif' if i % 5 == 4 else '.png'}")
    flags = "--sobel --k 5 --image-size 64 --batch 20 --workers 1 --lr 0.01 --device cpu --verbose"
    exp = tmp_path / "exp"
    command = [sys.executable, "main.py", str(flat), "--exp", str(exp), *flags.split()]
    done = subprocess.run([*command, "--epochs", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 images" in done.stdout and "no class folders" in done.stdout
    resume = ["--epochs", "2", "--resume", str(exp / "checkpoint.pth.tar")]
    done = subprocess.run([*command, *resume], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1] and "nmi_previous" in records[1]
    assert "nmi_classes" not in records[0]
    net = load(exp / "checkpoint.pth.tar")
    assert net.arch == "alexnet" and net.sobel is not None and net.top_layer.out_features == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, flags", [("resnet18s", []), ("resnet50", ["--sobel"]), ("toy", ["--sobel"]), ("toy", [])]
)
def test_other_networks_train_and_resume_exactly(photos, tmp_path, arch, flags):
    """ResNets and a backbone that this repository does not know, from the middle of an epoch."""
    few = tmp_path / "few"
    for path in sorted(photos.rglob("*.jpg"))[::2]:
        (few / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, few / path.parent.name)

    def run(exp, *more):
        common = f"--arch {arch} --image-size 32 --k 4 --batch 12 --workers 0 --device cpu --lr 0.01"
        words = [*common.split(), "--checkpoints", "2", "--no-report", *flags, *map(str, more)]
        main.main(main.get_parser().parse_args([str(few), "--exp", str(exp), *words]))
        return exp

    complete = run(tmp_path / "complete", "--epochs", 2)
    part = run(tmp_path / "part", "--epochs", 1)
    run(part, "--epochs", 2, "--resume", part / "checkpoints" / "checkpoint_1.pth.tar")
    assert_same_run(part, complete)
    assert all(0 < record["loss"] < 10 for record in log_of(complete))
    _, saved = features.read_clustering(complete)
    net = load(complete / "checkpoint.pth.tar")
    assert saved["layer"] == net.feature and net.arch == arch
    assert saved["transform"]["pca"]["mean"].shape == (net.feature_dim,)


# ------------------------------------------------------------------------------- what surrounds the loop


def test_report_and_gallery_at_the_end_of_a_run(photos, tmp_path, capsys):
    args = arguments(photos, tmp_path / "exp", "--epochs", 2)
    args.no_report = False
    main.main(args)
    exp = tmp_path / "exp"
    assert Image.open(exp / "report.png").width > 500
    assert "<html" in (exp / "report.html").read_text()
    page = (exp / "clusters.html").read_text()
    assert "data:image" in page or "base64" in page
    printed = capsys.readouterr().out
    assert f"{exp}/report.html" in printed and f"{exp}/clusters.html" in printed


def test_no_report_leaves_the_pages_away(whole):
    assert not list(whole.glob("*.html")) and not list(whole.glob("*.png"))


def test_a_report_that_fails_does_not_undo_the_training(photos, tmp_path, capsys, monkeypatch):
    import visu.report

    def fail(exp):
        raise UserError("no disk")

    monkeypatch.setattr(visu.report, "write_report", fail)
    args = arguments(photos, tmp_path / "exp", "--epochs", 1)
    args.no_report = False
    main.main(args)
    assert "no report: no disk" in capsys.readouterr().out
    assert (tmp_path / "exp" / "checkpoint.pth.tar").is_file()
