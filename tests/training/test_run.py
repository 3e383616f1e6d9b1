"""A run that is interrupted goes on exactly, whatever interrupted it and wherever it goes on."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import clustering
import models
import training.run
from tests import golden
from tests.helpers import ROOT, refuses
from tests.runs import assert_same_run, log_of, start, train, wait_for
from training.run import Run
from util import Preempted, UserError, derive_seed


@pytest.mark.parametrize("begin", ["checkpoints/checkpoint_0", "checkpoints/checkpoint_2", "checkpoint"])
def test_resumed_run_equals_uninterrupted_run(photos, whole, tmp_path, begin):
    first = train(photos, tmp_path / "exp", "--checkpoints", 3, "--epochs", 2)
    train(photos, first, "--checkpoints", 3, "--resume", first / f"{begin}.pth.tar")
    assert_same_run(first, whole)


def test_a_run_killed_at_a_random_moment_goes_on_exactly(photos, tmp_path):
    exp = tmp_path / "exp"
    process = start(photos, exp, "--checkpoints", 3, "--epochs", 1000)
    wait_for(exp / "checkpoint.pth.tar", process)
    time.sleep(random.random() * 0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(exp / "clusters", "rb") as file:
        assert pickle.load(file)  # readable at any moment
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    epochs = saved["epoch"] + 2
    train(photos, exp, "--checkpoints", 3, "--epochs", epochs, "--resume", exp / "checkpoint.pth.tar")
    complete = train(photos, tmp_path / "complete", "--checkpoints", 3, "--epochs", epochs)
    assert_same_run(exp, complete)


def test_resuming_into_another_folder_takes_the_logs_along(photos, whole, tmp_path):
    middle = whole / "checkpoints" / "checkpoint_2.pth.tar"
    other = train(photos, tmp_path / "other", "--checkpoints", 3, "--resume", middle)
    assert_same_run(other, whole)


def test_resuming_a_finished_run_says_so(photos, whole, tmp_path, capsys):
    exp = shutil.copytree(whole, tmp_path / "exp")
    train(photos, exp, "--resume", exp / "checkpoint.pth.tar")
    assert "has its 3 epochs" in capsys.readouterr().out
    assert_same_run(exp, whole)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", 9], r"nmb_cluster 8, not 9"),
        (["--arch", "alexnet"], r"arch tiny, not alexnet"),
        (["--seed", 1], r"seed 31, not 1"),
        (["--batch", 8], r"batch 16, not 8"),
    ],
)
def test_resuming_another_run_names_the_difference(photos, whole, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(photos, tmp_path, *flags, "--resume", whole / "checkpoint.pth.tar")


def test_a_setting_that_may_change_is_told(photos, whole, tmp_path, capsys):
    train(photos, tmp_path / "exp", "--lr", 0.01, "--resume", whole / "checkpoint.pth.tar", "--epochs", 4)
    assert "note: lr was 0.02 and is 0.01 from here on" in capsys.readouterr().out
    saved = checkpoint.read(tmp_path / "exp" / "checkpoint.pth.tar")
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.01


def test_resuming_on_other_images_or_from_nothing_is_an_error(photos, whole, tmp_path):
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    next(fewer.rglob("*.jpg")).unlink()
    with refuses(r"60 images.* has 59"):
        train(fewer, tmp_path / "a", "--resume", whole / "checkpoint.pth.tar")
    shutil.copy(next(fewer.rglob("*.jpg")), next(fewer.iterdir()) / "new.jpg")
    with refuses(r"other images.*names.*differ"):
        train(fewer, tmp_path / "a", "--resume", whole / "checkpoint.pth.tar")
    with refuses(r"no such checkpoint"):
        train(photos, tmp_path / "b", "--resume", tmp_path / "nothing.pth.tar")
    checkpoint.save(tmp_path / "released.tar", {"state_dict": models.build("tiny", True, 8).state_dict()})
    with refuses(r"--init"):
        train(photos, tmp_path / "c", "--resume", tmp_path / "released.tar")
    other = shutil.copytree(whole, tmp_path / "d")
    with refuses(r"another run"):
        train(photos, other)
    with refuses(r"another run"):  # nor are its files overwritten by those of a third
        train(photos, other, "--resume", whole / "checkpoint.pth.tar")


def test_dropout_is_on_in_training_and_follows_the_iteration(photos, tmp_path, monkeypatch):
    seeds = []
    original = Run._before_step

    def spy(self):
        seeds.append((self.epoch, self.position, original(self)))
        assert self.parts.kept["net"].training
        return seeds[-1][2]

    monkeypatch.setattr(Run, "_before_step", spy)
    train(photos, tmp_path / "exp", "--epochs", 2)
    assert len({seed for *_, seed in seeds}) == len(seeds) == 8
    assert seeds[0][2] == derive_seed(31, "step", 1)


# ------------------------------------------------------------------------------- checkpoints of old versions

V1 = ROOT / "tests" / "files" / "v1"


@pytest.fixture(scope="module")
def v1_images(tmp_path_factory):
    return golden.write_crops(tmp_path_factory.mktemp("v1") / "images", ROOT / "demo" / "pictures")


@pytest.mark.parametrize("name, flags", [("kmeans", []), ("pic", ["--clustering", "PIC"])])
@pytest.mark.parametrize("begin", ["checkpoint", "checkpoints/checkpoint_2"])
def test_a_run_of_the_first_version_goes_on(v1_images, tmp_path, monkeypatch, name, flags, begin):
    """From its end and from the middle of its second epoch, as the uninterrupted run; it whitened to 36."""
    monkeypatch.setattr(clustering, "most_dimensions", lambda images: images)
    exp = shutil.copytree(V1 / name, tmp_path / name)
    old = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    start_at = checkpoint.read(exp / f"{begin}.pth.tar")
    train(v1_images, exp, *flags, "--checkpoints", 3, "--resume", exp / f"{begin}.pth.tar")
    lines = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[: start_at["epoch"]] == old[: start_at["epoch"]]  # with its seconds
    recorded = json.loads((V1 / "golden.json").read_text())
    if golden.machine() == recorded["machine"]:
        assert golden.digests(exp) == recorded["cases"][name]
        complete = train(v1_images, tmp_path / "complete", *flags, "--checkpoints", 3)
        assert_same_run(exp, complete)


@pytest.mark.parametrize("begin", ["checkpoint", "checkpoints/checkpoint_2"])
def test_its_next_clustering_is_one_of_few_dimensions(v1_images, tmp_path, begin):
    exp = shutil.copytree(V1 / "kmeans", tmp_path / "exp")
    train(v1_images, exp, "--checkpoints", 3, "--resume", exp / f"{begin}.pth.tar")
    lines = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    assert [line["pca_dims"] for line in lines] == [36, 36, 4]
    assert "PCA keeps 4 dimensions of 256: 60 images are too few for more" in (exp / "train.log").read_text()
    assert checkpoint.read(exp / "clustering.pth.tar")["assignment"]["centroids"].shape == (8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kmeans", "pic", "resumed"])
def test_the_golden_run_is_what_it_was(v1_images, tmp_path, name):
    recorded = json.loads(golden.RECORDED.read_text())
    if golden.machine() != recorded["machine"]:
        pytest.skip("recorded on another machine")
    golden.run_case(name, ROOT, v1_images, tmp_path / "exp")
    assert golden.digests(tmp_path / "exp") == recorded["cases"][name]


# ------------------------------------------------------------------------------- moments and machines


def test_killed_before_the_first_checkpoint_it_begins_afresh(photos, whole, tmp_path, monkeypatch, capsys):
    """What such a run left behind protects nothing, and nothing of it remains."""

    def die(self, path):
        raise KeyboardInterrupt

    exp = tmp_path / "exp"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", die)
        train(photos, exp, "--seed", 5)
    assert (exp / "clusters").is_file() and not list(exp.rglob("*.tmp-*"))
    (exp / "log.jsonl").write_text('{"epoch": 0, "loss": 9}\n')
    again = shutil.copytree(exp, tmp_path / "again")
    train(photos, exp, "--checkpoints", 3)
    assert_same_run(exp, whole)
    train(photos, again, "--checkpoints", 3, "--resume", "auto")
    assert "this is a new run" in capsys.readouterr().out
    assert_same_run(again, whole)


def test_a_single_last_image_joins_the_batch_before_it(photos, tmp_path, capsys):
    """49 images, batches of 16, maps of 1 x 1 pixel: batch norm cannot average a single value."""
    few = shutil.copytree(photos, tmp_path / "few")
    for path in sorted(few.rglob("*.jpg"))[:11]:
        path.unlink()
    flags = ("--arch", "resnet18", "--image-size", 32, "--epochs", 2, "--checkpoints", 2)
    exp = train(few, tmp_path / "exp", *flags)
    said = capsys.readouterr().out
    assert said.count("of one image, which joins") == 1
    assert [r["iteration"] for r in log_of(exp)] == [3, 6]
    assert "training 49/49" in said
    part = train(few, tmp_path / "part", *flags, "--epochs", 1)
    train(few, part, *flags, "--resume", part / "checkpoints" / "checkpoint_1.pth.tar")
    assert_same_run(part, exp)


def test_a_batch_of_one_image_over_one_pixel_is_told_in_one_line(photos, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))[:10]):
        shutil.copy(path, few / f"{i}.jpg")
    process = start(few, tmp_path / "exp", "--arch", "resnet18", "--batch", 1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in said
    assert "use a larger --batch" in said.splitlines()[-1]


def test_a_signal_in_the_last_step_of_an_epoch_keeps_that_epoch(photos, whole, tmp_path, monkeypatch):
    """It comes after the ranks have been asked whether to stop."""
    exp = tmp_path / "exp"
    original = training.run.Steps.step

    def spy(self, batch, total, iteration, stop):
        found = original(self, batch, total, iteration, stop)
        if iteration == 7:
            signal.raise_signal(signal.SIGTERM)
        return found

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(training.run.Steps, "step", spy)
        train(photos, exp)
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    assert (saved["epoch"], saved["position"], saved["iteration"]) == (1, 4, 8)
    train(photos, exp, "--resume", "auto")
    assert_same_run(exp, whole)


def test_a_dead_worker_is_one_line_and_a_checkpoint(photos, tmp_path, monkeypatch, whole):
    """As the system's memory guard does it, in the middle of an epoch."""
    exp = tmp_path / "exp"
    original = training.run.deal

    def killing(loader, sampler, share):
        for step, found in enumerate(original(loader, sampler, share)):
            if step == 2:
                raise RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly")
            yield found

    with (
        monkeypatch.context() as patch,
        refuses(r"worker was killed, most likely .* for want of memory.*auto"),
    ):
        patch.setattr(training.run, "deal", killing)
        train(photos, exp)
    assert checkpoint.read(exp / "checkpoint.pth.tar")["position"] == 2
    train(photos, exp, "--resume", "auto")
    assert_same_run(exp, whole)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_a_checkpoint(photos, tmp_path):
    """The real thing: SIGKILL for a worker."""
    exp = tmp_path / "exp"
    process = start(photos, exp, "--workers", 1, "--reassign", 200, "--checkpoints", 20)
    wait_for(exp / "checkpoints" / "checkpoint_1.pth.tar", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "worker was killed" in said and "Traceback" not in said
    assert checkpoint.read(exp / "checkpoint.pth.tar")["position"] > 20


def test_workers_that_do_not_fit_into_shared_memory_are_refused(photos, tmp_path, monkeypatch):
    small = type("Room", (), {"f_bavail": 1, "f_frsize": 4096})
    monkeypatch.setattr(training.run.machine.os, "statvfs", lambda path: small)
    with refuses(r"--workers 2: takes 0 MB .*--workers 0, or give it more"):
        train(photos, tmp_path / "exp", "--workers", 2)
    assert not (tmp_path / "exp").exists()
    train(photos, tmp_path / "exp", "--workers", 0, "--epochs", 1)


def test_compile_without_a_compiler_is_refused_at_the_start(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    with refuses(r"--compile: cannot compile here .*leave it out"):
        train(photos, tmp_path / "exp", "--compile")
    assert not (tmp_path / "exp").exists()
