"""What main.py refuses and warns about: images, settings, folders, losses."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import training.run
from tests.helpers import ROOT, refuses
from tests.runs import assert_same_labels, assert_same_run, log_of, train
from util import UserError


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
    complete = train(root, tmp_path / "complete", *flags)
    out = capsys.readouterr().out
    assert "left out 2 of 60" in out and "left out 1 of 58" in out
    for path in bad:
        path.unlink()
    assert_same_labels(complete, train(root, tmp_path / "without", "--checkpoints", 3))
    root, _ = spoil(photos, tmp_path / "again" / "photos")
    part = train(root, tmp_path / "part", *flags, "--epochs", 1)
    train(root, part, *flags, "--resume", part / "checkpoint.pth.tar")
    assert_same_run(part, complete)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", 61], r"61: more clusters than images, .* has 60"),
        (["--k", 1], r"1: must be at least 2"),
        (["--arch", "resnet"], r"resnet: unknown; choose one of alexnet, vgg16"),
        (["--lr", -1], r"--lr: -1: must be a positive"),
        (["--lr", "nan"], r"--lr: nan"),
        (["--batch", 0], r"--batch: 0"),
        (["--epochs", 0], r"--epochs: 0"),
        (["--reassign", 0], r"--reassign: 0"),
        (["--momentum", 1], r"--momentum: 1"),
        (["--workers", -1], r"--workers: -1"),
        (["--image-size", 4], r"--image-size: 4"),
        (["--crop-cache", "auto"], r"--crop-cache: auto: .* name one"),
        (["--init", "nothing.tar"], r"nothing.tar: no such checkpoint"),
        (["--device", "tpu"], r"--device tpu"),
        (["--precision", "tf32"], r"--precision tf32"),
        (["--precision", "fp16"], r"--precision fp16"),
        (["--start_epoch", 3], r"--start_epoch 3"),
        (["--shards", "x.tar"], r"one of them"),
        (["--clustering", "PIC", "--kmeans", "distributed"], r"--kmeans distributed: not with"),
        (["--resume", "a.tar", "--init", "b.tar"], r"--resume and --init"),
        (["--resume", "--start_epoch", 1], r"--start_epoch with --resume"),
    ],
)
def test_bad_settings_are_refused_in_one_line(photos, tmp_path, flags, message):
    with refuses(message):
        train(photos, tmp_path / "exp", *flags)
    assert not list(tmp_path.rglob("*.pth.tar"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(photos, tmp_path):
    with refuses(r"sees no CUDA"):
        train(photos, tmp_path / "exp", "--device", "cuda")


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    for folder, word in ((tmp_path / "missing", "does not exist"), (tmp_path, "no image")):
        command = [sys.executable, "main.py", str(folder), "--exp", str(tmp_path / "exp")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_an_exp_that_cannot_be_written_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses(r"cannot make the folder"):
        train(photos, tmp_path / "file" / "exp")


def test_workers_above_the_cores_are_warned_about(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.run.machine.os, "cpu_count", lambda: 1)
    train(photos, tmp_path / "exp", "--workers", 2, "--epochs", 1)
    assert "warning: --workers 2, but this machine has 1 core" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(photos, tmp_path):
    with refuses(r"the loss is nan at iteration \d+"):
        train(photos, tmp_path / "exp", "--lr", 1e9)
    assert (tmp_path / "exp" / "checkpoints" / "checkpoint_0.pth.tar").exists()


def test_collapse_and_a_stuck_loss_are_warned_about(tmp_path, capsys):
    grey = tmp_path / "grey"
    grey.mkdir()
    for i in range(40):  # 36 equal pictures
        Image.new("RGB", (40, 40), (i, 9, 9) if i < 4 else (200, 200, 200)).save(grey / f"{i:02d}.png")
    exp = train(grey, tmp_path / "exp", "--lr", 1e-9)
    out = capsys.readouterr().out
    assert "warning: collapse, the largest cluster holds" in out
    assert "PCA keeps" in out and "stuck at log k" in out
    assert all(math.isfinite(r["clustering_loss"]) for r in log_of(exp))
