import csv
import json
import math
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import logbook
import numpy as np
import pytest
import sampling
import torch
from PIL import Image

import checkpoint
import clustering
import data
import demo
import features
import main
import models
from tests import tiny
from util import AverageMeter, Preempted, UserError, derive_seed

ROOT = Path(main.__file__).parent
TIMES = ("seconds", "images_per_second", "peak_memory_gib")  # of a log line: differ from run to run


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "tiny", tiny.tiny)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 crops of 6 photographs, in class folders."""
    root = tmp_path_factory.mktemp("photos")
    demo.main(demo.get_parser().parse_args([str(root / "demo")]))
    names = sorted(p.name for p in (root / "demo" / "train").iterdir())[:6]
    for name in names:
        (root / "small" / name).mkdir(parents=True)
        for image in sorted((root / "demo" / "train" / name).iterdir())[:10]:
            shutil.copy(image, root / "small" / name / f"{name}_{image.name}")
    return root / "small"


def arguments(images, exp, *flags):
    common = (
        "--arch tiny --sobel --image-size 32 --k 8 --batch 16 --workers 0 --device cpu --lr 0.02 --epochs 3 "
        "--no-report"
    )
    return main.get_parser().parse_args([str(images), "--exp", str(exp), *common.split(), *map(str, flags)])


def train(images, exp, *flags):
    main.main(arguments(images, exp, *flags))
    return exp


def log_of(exp):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in logbook.read_lines(exp / "log.jsonl")]


def equal(a, b):
    """Whether two nests of tensors, dicts, lists and numbers are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(a, b):
    """Weights, optimisers, assignment, logs: everything but the times and the folder."""
    one, two = (checkpoint.read(exp / "checkpoint.pth.tar") for exp in (a, b))
    for name in one.keys() - {"args", "record"}:
        assert equal(one[name], two[name]), name
    assert (a / "clusters").read_bytes() == (b / "clusters").read_bytes()
    assert (a / "assignments.csv").read_bytes() == (b / "assignments.csv").read_bytes()
    assert log_of(a) == log_of(b)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A whole run of 3 epochs of 4 iterations, with a checkpoint every 3 iterations."""
    models.ARCHITECTURES["tiny"] = tiny.tiny
    exp = train(photos, tmp_path_factory.mktemp("run") / "exp", "--checkpoints", 3)
    del models.ARCHITECTURES["tiny"]
    return exp


# ------------------------------------------------------------------------------- the files of a run


def test_clusters_is_one_pickle_with_a_partition_of_the_images_an_epoch(finished):
    with open(finished / "clusters", "rb") as file:
        epochs = pickle.load(file)
    assert [len(lists) for lists in epochs] == [8, 8, 8]
    for lists in epochs:
        assert sorted(i for images in lists for i in images) == list(range(60))


def test_assignments_csv_is_the_last_clustering(finished, photos):
    with open(finished / "clusters", "rb") as file:
        last = pickle.load(file)[-1]
    with open(finished / "assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = data.list_images(photos)
    assert [row["path"] for row in rows] == list(images.paths)
    assert all(i in last[int(row["cluster"])] for i, row in enumerate(rows))
    saved = checkpoint.read(finished / "checkpoint.pth.tar")["assignment"]
    assert np.allclose([float(row["distance"]) for row in rows], saved["distances"], rtol=1e-4, atol=1e-6)


def test_log_has_a_line_an_epoch_with_what_people_ask_for(finished):
    records = logbook.read_lines(finished / "log.jsonl")
    assert [r["epoch"] for r in records] == [0, 1, 2]
    for r in records:
        assert 0 <= r["nmi_classes"] <= 1 and "ami_classes" in r
        assert r["loss_over_log_k"] == pytest.approx(r["loss"] / math.log(8))
        assert {"features", "pca", "clustering", "train", "total"} == set(r["seconds"])
        assert r["clusters"]["nonempty"] <= 8 and r["clusters"]["entropy"] <= math.log(8) + 1e-9
        assert r["peak_memory_gib"] > 0 and r["images_per_second"]["train"] > 0
    assert "nmi_previous" not in records[0] and 0 <= records[1]["nmi_previous"] <= 1
    assert "epoch 2 training 60/60" in (finished / "train.log").read_text()


def test_checkpoints_are_counted_in_iterations_over_the_whole_training(finished):
    names = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert names == [f"checkpoint_{n}.pth.tar" for n in range(4)]
    for n in range(4):
        saved = checkpoint.read(finished / "checkpoints" / f"checkpoint_{n}.pth.tar")
        assert saved["iteration"] == 3 * n and saved["epoch"] == 3 * n // 4
    last = checkpoint.read(finished / "checkpoint.pth.tar")
    assert (
        last["epoch"] == 3 and last["arch"] == "tiny" and last["state_dict"]["top_layer.bias"].shape == (8,)
    )


def test_checkpoint_0_is_the_network_that_training_started_from(finished):
    net = checkpoint.load_model(finished / "checkpoints" / "checkpoint_0.pth.tar")
    fresh = models.build("tiny", True, seed=derive_seed(31, "weights"))
    assert torch.equal(net.features[0].weight, fresh.features[0].weight)
    assert torch.equal(net.features[1].running_mean, fresh.features[1].running_mean)


def test_new_images_can_be_assigned_from_a_checkpoint(finished, photos):
    """PCA and centroids of checkpoint_0 give the training images the clusters that the log has for them."""
    import clustering
    import features

    saved = checkpoint.read(finished / "checkpoints" / "checkpoint_0.pth.tar")
    net = checkpoint.build_from(saved, "checkpoint_0")
    images = data.list_images(photos)
    loader = data.make_loader(data.CentralView(images, 32), 16, 0)
    rows, _ = features.extract_features(net, loader, "fc7.pre", 60, torch.device("cpu"))
    whitening = clustering.PCAWhitening.from_state_dict(saved["whitening"])
    x = clustering.normalise_rows(whitening.apply(rows))
    labels, _ = clustering.assign(x, saved["assignment"]["centroids"].numpy())
    assert np.array_equal(labels, saved["assignment"]["labels"])


# ------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("start", ["checkpoints/checkpoint_0", "checkpoints/checkpoint_2", "checkpoint"])
def test_resumed_run_equals_uninterrupted_run(photos, finished, tmp_path, start):
    first = train(photos, tmp_path / "exp", "--checkpoints", 3, "--epochs", 2)
    train(photos, first, "--checkpoints", 3, "--resume", first / f"{start}.pth.tar")
    assert_same_run(first, finished)


def test_a_run_killed_at_a_random_moment_goes_on_exactly(photos, finished, tmp_path):
    exp = tmp_path / "exp"
    flags = [str(photos), "--exp", str(exp), "--arch", "tiny", "--sobel", "--image-size", "32", "--k", "8"]
    flags += ["--batch", "16", "--workers", "0", "--device", "cpu", "--lr", "0.02", "--checkpoints", "3"]
    command = [sys.executable, "-m", "tests.tiny", *flags, "--epochs", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (exp / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(exp / "clusters", "rb") as file:
        assert pickle.load(file)  # readable at any moment
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    epochs = saved["epoch"] + 2
    train(photos, exp, "--checkpoints", 3, "--epochs", epochs, "--resume", exp / "checkpoint.pth.tar")
    whole = train(photos, tmp_path / "whole", "--checkpoints", 3, "--epochs", epochs)
    assert_same_run(exp, whole)


def test_resuming_into_another_folder_takes_the_logs_along(photos, finished, tmp_path):
    middle = finished / "checkpoints" / "checkpoint_2.pth.tar"
    other = train(photos, tmp_path / "other", "--checkpoints", 3, "--resume", middle)
    assert_same_run(other, finished)


def test_resuming_a_finished_run_says_so(photos, finished, tmp_path, capsys):
    exp = shutil.copytree(finished, tmp_path / "exp")
    train(photos, exp, "--resume", exp / "checkpoint.pth.tar")
    assert "has its 3 epochs" in capsys.readouterr().out
    assert_same_run(exp, finished)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", 9], r"nmb_cluster 8, not 9"),
        (["--arch", "alexnet"], r"arch tiny, not alexnet"),
        (["--seed", 1], r"seed 31, not 1"),
        (["--batch", 8], r"batch 16, not 8"),
    ],
)
def test_resuming_another_run_names_the_difference(photos, finished, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(photos, tmp_path, *flags, "--resume", finished / "checkpoint.pth.tar")


def test_resuming_on_other_images_or_from_nothing_is_an_error(photos, finished, tmp_path):
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    next(fewer.rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match=r"60 images.* has 59"):
        train(fewer, tmp_path / "a", "--resume", finished / "checkpoint.pth.tar")
    next(fewer.rglob("*.jpg")).rename(fewer / "new.jpg")
    with pytest.raises(UserError, match=r"no such checkpoint"):
        train(photos, tmp_path / "b", "--resume", tmp_path / "nothing.pth.tar")
    checkpoint.save(tmp_path / "released.tar", {"state_dict": models.build("tiny", True, 8).state_dict()})
    with pytest.raises(UserError, match=r"--init"):
        train(photos, tmp_path / "c", "--resume", tmp_path / "released.tar")
    other = shutil.copytree(finished, tmp_path / "d")
    with pytest.raises(UserError, match=r"another run"):
        train(photos, other)
    with pytest.raises(UserError, match=r"another run"):  # nor are its files overwritten by those of a third
        train(photos, other, "--resume", finished / "checkpoint.pth.tar")


# ------------------------------------------------------------------------------- what training does


def test_class_names_do_not_change_training_by_a_bit(photos, finished, tmp_path):
    """The same images in the same order under shuffled class names, through a list of paths."""
    names = sorted(p.name for p in photos.iterdir())
    shuffled = dict(zip(names, names[1:] + names[:1]))
    runs = []
    for renamed in (False, True):
        root = tmp_path / str(renamed)
        lines = []
        for path in data.list_images(photos).paths:
            source, name = Path(path).parent.name, Path(path).name
            # Every image of a class moves to another folder; half of the classes are merged as well.
            folder = shuffled[source] if renamed else source
            folder = names[0] if renamed and folder in names[:3] else folder
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / path, root / folder / name)
            lines.append(f"{folder}/{name}")
        (root / "list.txt").write_text("\n".join(lines))
        runs.append(train(root / "list.txt", tmp_path / f"exp{renamed}", "--epochs", 2))
    one, two = (checkpoint.read(exp / "checkpoint.pth.tar") for exp in runs)
    for name in ("state_dict", "optimizer", "optimizer_head", "assignment", "whitening"):
        assert equal(one[name], two[name]), name
    assert (runs[0] / "clusters").read_bytes() == (runs[1] / "clusters").read_bytes()
    assert log_of(runs[0])[0]["nmi_classes"] != log_of(runs[1])[0]["nmi_classes"]


def test_workers_do_not_change_training_by_a_bit(photos, finished, tmp_path):
    assert_same_run(train(photos, tmp_path / "exp", "--checkpoints", 3, "--workers", 2), finished)


def test_one_step_is_cross_entropy_and_sgd_as_written_in_the_paper():
    """Loss, gradient, momentum and decay of two steps against arithmetic in float64 on the same net."""
    net = models.build("tiny", sobel=True, num_clusters=5, seed=1)
    for module in net.classifier:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    double = models.build("tiny", sobel=True, num_clusters=5, seed=1).double()
    double.classifier = torch.nn.Sequential(
        *[torch.nn.Identity() if isinstance(m, torch.nn.Dropout) else m for m in double.classifier]
    )
    args = main.get_parser().parse_args(["dir", "--lr", "0.05", "--wd", "-2"])
    optimizers = [main.sgd(body_of(net), args, 0.9), main.sgd(net.top_layer, args, 0.0)]
    labels = torch.tensor([3, 0, 4, 1, 2, 2])
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    loader = [(images, torch.arange(6)), (images.flip(0), torch.arange(6).flip(0))]
    meter = AverageMeter()
    main.train_epoch(net, optimizers, loader, labels, torch.device("cpu"), "fp32", lambda: 0, meter)

    double.train()
    momentum, losses = {}, []
    for batch, index in loader:
        double.zero_grad()
        logits = double(data.normalise(batch).double())
        loss = -(logits - logits.logsumexp(1, keepdim=True))[range(6), labels[index]].mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in double.named_parameters():
                if not p.requires_grad:
                    continue
                step = p.grad + 1e-2 * p
                if not name.startswith("top_layer"):
                    step = momentum[name] = 0.9 * momentum.get(name, 0) + step
                p -= 0.05 * step
    assert meter.avg == pytest.approx(sum(losses) / 2, rel=1e-5)
    for (name, p), q in zip(net.named_parameters(), double.parameters()):
        assert torch.allclose(p.double(), q, atol=2e-5), name
    assert torch.equal(net.sobel[1].weight, models.trunk.make_sobel()[1].weight)


def body_of(net):
    body = torch.nn.Module()
    body.features, body.classifier, body.sobel = net.features, net.classifier, net.sobel
    return body


def test_the_head_is_new_each_epoch_and_its_optimiser_has_no_momentum(finished):
    heads = [checkpoint.read(finished / "checkpoints" / f"checkpoint_{n}.pth.tar") for n in (0, 3)]
    assert heads[0]["optimizer_head"]["state"] == {} or not any(
        state.get("momentum_buffer") is not None for state in heads[0]["optimizer_head"]["state"].values()
    )
    group = checkpoint.read(finished / "checkpoint.pth.tar")["optimizer_head"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.0, 1e-5)
    group = checkpoint.read(finished / "checkpoint.pth.tar")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.9, 1e-5)
    fresh = heads[0]["state_dict"]["top_layer.weight"]
    assert fresh.std().item() == pytest.approx(0.01, rel=0.15)
    assert not heads[0]["state_dict"]["top_layer.bias"].any()


def test_dropout_is_on_in_training_and_follows_the_iteration(photos, tmp_path, monkeypatch):
    seeds = []
    original = main.Run.before_step

    def spy(self):
        seeds.append((self.epoch, self.position, original(self)))
        assert self.net.training
        return seeds[-1][2]

    monkeypatch.setattr(main.Run, "before_step", spy)
    train(photos, tmp_path / "exp", "--epochs", 2)
    assert len({seed for *_, seed in seeds}) == len(seeds) == 8
    assert seeds[0][2] == derive_seed(31, "step", 1)


@pytest.mark.parametrize("reassign, images", [(0.5, 30), (2, 120), (0.26, 15)])
def test_reassign_sets_the_length_of_an_epoch(photos, tmp_path, reassign, images):
    exp = train(photos, tmp_path / "exp", "--reassign", reassign, "--epochs", 1)
    assert f"epoch 0 training {images}/{images}" in (exp / "train.log").read_text()
    assert log_of(exp)[0]["iteration"] == math.ceil(images / 16)


def test_training_draws_uniformly_over_clusters_with_each_images_own_label(photos, tmp_path, monkeypatch):
    seen = []

    def spy(net, optimizers, loader, labels, *rest):
        for _, index in loader:
            seen.extend(labels[index].tolist())

    monkeypatch.setattr(main, "train_epoch", spy)
    exp = train(photos, tmp_path / "exp", "--epochs", 1, "--checkpoints", 10**6)
    sizes = log_of(exp)[0]["clusters"]
    assert sizes["max"] > sizes["min"] + 1  # so that drawing in proportion would show
    counts = np.bincount(seen, minlength=8)
    assert counts.sum() == 60 and counts[counts > 0].max() - counts[counts > 0].min() <= 1


def test_pic_trains_with_as_many_outputs_as_it_finds_clusters(photos, tmp_path):
    exp = train(photos, tmp_path / "exp", "--clustering", "PIC", "--epochs", 2)
    with open(exp / "clusters", "rb") as file:
        epochs = pickle.load(file)
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    assert (
        len(saved["state_dict"]["top_layer.bias"]) == len(epochs[-1]) == log_of(exp)[-1]["clusters"]["number"]
    )
    assert 1 < len(epochs[-1]) < 60


def test_released_sampling_runs_and_differs(photos, finished, tmp_path):
    exp = train(photos, tmp_path / "exp", "--sampling", "released", "--epochs", 1)
    assert (exp / "clusters").read_bytes()[:-1] == (finished / "clusters").read_bytes()[
        : len((exp / "clusters").read_bytes()) - 1
    ]
    assert log_of(exp)[0]["loss"] != log_of(finished)[0]["loss"]
    assert sampling.SAMPLERS.keys() == {"uniform", "released"}


def test_init_takes_weights_from_a_released_file(photos, tmp_path):
    net = models.build("tiny", True, 5, seed=77)
    state = {"arch": "tiny", "state_dict": net.state_dict()}
    checkpoint.save(tmp_path / "released.tar", state)
    exp = train(photos, tmp_path / "exp", "--init", tmp_path / "released.tar", "--start_epoch", 2)
    start = checkpoint.load_model(exp / "checkpoints" / "checkpoint_0.pth.tar")
    assert torch.equal(start.classifier[1].weight, net.classifier[1].weight)
    assert [r["epoch"] for r in log_of(exp)] == [2]


def test_tensorboard_holds_the_log(photos, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = train(photos, tmp_path / "exp", "--tensorboard", "--epochs", 2)
    events = EventAccumulator(str(exp / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in log_of(exp)], rel=1e-5
    )


# ------------------------------------------------------------------------------- what goes wrong


def spoil(photos, folder):
    """A copy of the photos with a truncated file, a text file called .jpg and an empty one."""
    root = shutil.copytree(photos, folder)
    files = sorted(root.rglob("*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:-200])
    files[20].write_text("not an image")
    files[40].write_bytes(b"")
    return root, [files[i] for i in (3, 20, 40)]


def test_bad_images_stop_the_run_before_training_with_their_names(photos, tmp_path):
    root, bad = spoil(photos, tmp_path / "photos")
    with pytest.raises(UserError, match="2 of 60 images") as error:
        train(root, tmp_path / "exp")
    assert str(bad[1]) in str(error.value) and str(bad[2]) in str(error.value)
    bad[1].unlink(), bad[2].unlink()
    with pytest.raises(UserError, match="1 of 58 images") as error:  # the headers are good
        train(root, tmp_path / "exp2")
    assert str(bad[0]) in str(error.value) and "truncated" in str(error.value)
    assert not (tmp_path / "exp2" / "checkpoints" / "checkpoint_0.pth.tar").exists()


def test_skipping_bad_images_trains_on_the_others_and_resumes(photos, tmp_path, capsys):
    root, bad = spoil(photos, tmp_path / "photos")
    flags = ("--skip-bad-images", "--checkpoints", 3)
    whole = train(root, tmp_path / "whole", *flags)
    out = capsys.readouterr().out
    assert "left out 2 of 60" in out and "left out 1 of 58" in out
    for path in bad:
        path.unlink()
    assert_rows_equal(whole, train(root, tmp_path / "without", "--checkpoints", 3))
    root, _ = spoil(photos, tmp_path / "again" / "photos")
    part = train(root, tmp_path / "part", *flags, "--epochs", 1)
    train(root, part, *flags, "--resume", part / "checkpoint.pth.tar")
    assert_same_run(part, whole)


def assert_rows_equal(a, b):
    assert (a / "clusters").read_bytes() == (b / "clusters").read_bytes()
    assert (a / "assignments.csv").read_bytes() == (b / "assignments.csv").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", 61], r"61: more clusters than images, .* has 60"),
        (["--k", 1], r"at least 2 clusters"),
        (["--arch", "resnet"], r"resnet: unknown; choose one of alexnet, vgg16"),
        (["--lr", -1], r"--lr -1.0: must be a positive"),
        (["--lr", "nan"], r"--lr nan"),
        (["--batch", 0], r"--batch 0"),
        (["--epochs", 0], r"--epochs 0"),
        (["--reassign", 0], r"--reassign 0"),
        (["--momentum", 1], r"--momentum 1"),
        (["--workers", -1], r"--workers -1"),
        (["--image-size", 4], r"--image-size 4"),
        (["--init", "nothing.tar"], r"nothing.tar: no such checkpoint"),
        (["--device", "tpu"], r"--device tpu"),
        (["--precision", "tf32"], r"--precision tf32"),
        (["--start_epoch", 3], r"--start_epoch 3"),
    ],
)
def test_bad_settings_are_refused_in_one_line(photos, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(photos, tmp_path / "exp", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match=r"sees no CUDA"):
        train(photos, tmp_path / "exp", "--device", "cuda")


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    for folder, word in ((tmp_path / "missing", "does not exist"), (tmp_path, "no image")):
        command = [sys.executable, "main.py", str(folder), "--exp", str(tmp_path / "exp")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_an_exp_that_cannot_be_written_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder"):
        train(photos, tmp_path / "file" / "exp")


def test_workers_above_the_cores_are_warned_about(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main.os, "cpu_count", lambda: 1)
    train(photos, tmp_path / "exp", "--workers", 2, "--epochs", 1)
    assert "warning: --workers 2, but this machine has 1 core" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(photos, tmp_path):
    with pytest.raises(UserError, match=r"the loss is nan at iteration \d+"):
        train(photos, tmp_path / "exp", "--lr", 1e9)
    assert (tmp_path / "exp" / "checkpoints" / "checkpoint_0.pth.tar").exists()


def test_collapse_and_a_stuck_loss_are_warned_about(photos, tmp_path, capsys):
    grey = tmp_path / "grey"
    grey.mkdir()
    for i in range(40):  # 36 equal pictures
        Image.new("RGB", (40, 40), (i, 9, 9) if i < 4 else (200, 200, 200)).save(grey / f"{i:02d}.png")
    exp = train(grey, tmp_path / "exp", "--lr", 1e-9)
    out = capsys.readouterr().out
    assert "warning: collapse, the largest cluster holds" in out
    assert "PCA keeps" in out and "stuck at log k" in out
    assert all(math.isfinite(r["clustering_loss"]) for r in log_of(exp))


# ------------------------------------------------------------------------------- one real run, by command


def test_alexnet_trains_end_to_end_from_the_command_line(photos, tmp_path):
    """AlexNet with Sobel on photographs of several kinds in a flat folder, then resumed for another epoch."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:40]):
        image = Image.open(path)
        image.convert(("RGB", "L", "P", "RGBA", "CMYK")[i % 5]).save(
            flat / f"{i}{'.tif' if i % 5 == 4 else '.png'}"
        )
    command = [
        sys.executable,
        "main.py",
        str(flat),
        "--sobel",
        "--k",
        "5",
        "--image-size",
        "64",
        "--batch",
        "20",
    ]
    command += [
        "--exp",
        str(tmp_path / "exp"),
        "--workers",
        "1",
        "--lr",
        "0.01",
        "--device",
        "cpu",
        "--verbose",
    ]
    done = subprocess.run([*command, "--epochs", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 images" in done.stdout and "no class folders" in done.stdout
    resume = ["--epochs", "2", "--resume", str(tmp_path / "exp" / "checkpoint.pth.tar")]
    done = subprocess.run([*command, *resume], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "exp" / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1] and "nmi_previous" in records[1]
    assert "nmi_classes" not in records[0]
    net = checkpoint.load_model(tmp_path / "exp" / "checkpoint.pth.tar")
    assert net.arch == "alexnet" and net.sobel is not None and net.top_layer.out_features == 5


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


def test_no_report_leaves_the_pages_away(finished):
    assert not list(finished.glob("*.html")) and not list(finished.glob("*.png"))


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


def test_config_tells_settings_and_images(finished, photos):
    config = json.loads((finished / "config.json").read_text())
    assert config["args"]["dir"] == str(photos.resolve()) and config["args"]["nmb_cluster"] == 8
    assert config["images"]["number"] == 60 and len(config["images"]["classes"]) == 6


def test_the_network_of_the_moment_of_clustering_is_kept(finished, photos):
    """Its features, whitened, assigned to its centroids, are the stored assignment; the weights went on."""
    saved = checkpoint.read(finished / checkpoint.CLUSTERING)
    net = checkpoint.build_from(saved, finished)
    whitening = clustering.PCAWhitening.from_state_dict(saved["whitening"])
    assignment = clustering.Assignment.from_state_dict(saved["assignment"])
    images = data.list_images(photos)
    loader = data.make_loader(data.CentralView(images, 32), 16, 0)
    rows, _ = features.extract_features(net, loader, models.FEATURE, 60, torch.device("cpu"))
    x = clustering.normalise_rows(whitening.apply(rows))
    labels, distances = clustering.assign(x, assignment.centroids)
    assert saved["epoch"] == 2 and saved["paths"] == list(images.paths)
    assert (labels == assignment.labels).all() and np.allclose(distances, assignment.distances, atol=1e-5)
    after = checkpoint.load_model(finished / "checkpoint.pth.tar").state_dict()
    assert not torch.equal(after["features.0.weight"], saved["state_dict"]["features.0.weight"])
    assert not any(name.startswith("top_layer") for name in saved["state_dict"])


def test_a_run_on_shards_is_the_run_on_the_folder(photos, tmp_path, finished):
    pytest.importorskip("webdataset")
    from tools import make_shards

    pattern = str(tmp_path / "small-%06d.tar")
    make_shards.main(make_shards.get_parser().parse_args([str(photos), pattern, "--size-mb", "0.05"]))
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) > 1
    args = arguments(photos, tmp_path / "exp")
    args.dir, args.shards = None, f"{tmp_path}/small-{{000000..{len(shards) - 1:06d}}}.tar"
    main.main(args)
    assert_same_run(tmp_path / "exp", finished)


def test_dir_and_shards_are_alternatives(photos, tmp_path):
    args = arguments(photos, tmp_path / "exp", "--shards", "x.tar")
    with pytest.raises(UserError, match="one of them"):
        main.main(args)


def test_crops_are_decoded_once_and_the_run_is_the_same(photos, tmp_path, finished, monkeypatch):
    decoded = []
    original = data.CentralView.__getitem__

    def spy(self, i):
        before = self.images.decode
        self.images.decode = lambda i: decoded.append(i) or before(i)
        try:
            return original(self, i)
        finally:
            del self.images.decode

    monkeypatch.setattr(data.CentralView, "__getitem__", spy)
    exp = train(photos, tmp_path / "exp")
    assert sorted(decoded) == list(range(60))  # three passes
    assert not (exp / "crops").exists()
    assert_same_run(exp, finished)

    decoded.clear()
    train(photos, tmp_path / "kept", "--epochs", 1, "--crop-cache", tmp_path / "cache")
    train(photos, tmp_path / "again", "--epochs", 1, "--crop-cache", tmp_path / "cache")
    assert len(decoded) == 60
    train(photos, tmp_path / "off", "--epochs", 1, "--crop-cache", "off")
    assert len(decoded) == 120


def test_resume_auto_takes_the_newest_checkpoint_or_begins(photos, tmp_path, finished, monkeypatch, capsys):
    exp = train(photos, tmp_path / "exp", "--resume", "auto", "--epochs", 1, "--checkpoints", 3)
    assert "resuming" not in capsys.readouterr().out
    (exp / "checkpoint.pth.tar").unlink()
    train(photos, exp, "--resume", "auto", "--checkpoints", 3)
    assert "checkpoint_1.pth.tar in epoch 0 after 3" in capsys.readouterr().out
    assert_same_run(exp, finished)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_precisions_of_gpus_are_refused_on_a_cpu(photos, tmp_path, precision):
    with pytest.raises(UserError, match=f"--precision {precision}"):
        train(photos, tmp_path / "exp", "--precision", precision)


def test_a_signal_in_training_writes_a_checkpoint_first(photos, tmp_path, finished, monkeypatch):
    original = main.Run.before_step

    def spy(self):
        if self.iteration == 5:
            signal.raise_signal(signal.SIGUSR1)
        return original(self)

    monkeypatch.setattr(main.Run, "before_step", spy)
    exp = tmp_path / "exp"
    with pytest.raises(Preempted):
        train(photos, exp)
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    assert (saved["epoch"], saved["iteration"], saved["position"]) == (1, 6, 2)
    monkeypatch.undo()
    models.ARCHITECTURES["tiny"] = tiny.tiny
    train(photos, exp, "--resume", "auto")
    assert_same_run(exp, finished)


def test_a_signal_elsewhere_ends_the_run_at_once(photos, tmp_path, finished, monkeypatch):
    original = main.Run.fresh_head

    def spy(self):
        if self.epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(main.Run, "fresh_head", spy)
    with pytest.raises(Preempted, match="SIGTERM"):
        train(photos, tmp_path / "exp")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    models.ARCHITECTURES["tiny"] = tiny.tiny
    train(photos, tmp_path / "exp", "--resume", "auto")
    assert_same_run(tmp_path / "exp", finished)


def test_a_compiled_step_trains_the_same_within_rounding(photos, tmp_path, monkeypatch):
    """The compiler is asked for the whole network's forward; here its front end alone, which needs no C++."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    one = train(photos, tmp_path / "one", "--epochs", 1)
    two = train(photos, tmp_path / "two", "--epochs", 1, "--compile")
    assert log_of(two)[0]["loss"] == pytest.approx(log_of(one)[0]["loss"], abs=1e-4)
