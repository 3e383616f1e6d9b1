"""main.py in several processes, as users start them, against one process; ranks killed; signals sent."""

import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from algorithms.agreement import compare
from tests import runs
from tests.runs import assert_same_run, wait_for
from training import logs
from util import Preempted

pytestmark = pytest.mark.slow
FLAGS = "--k 6 --batch 14 --epochs 2 --sync-bn".split()


def start(processes, images, exp, *flags, restarts=0, sync_bn=True):
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes} --max-restarts {restarts}"
    own = FLAGS if sync_bn else FLAGS[:-1]
    return runs.start(images, exp, *own, *flags, launcher=launcher.split() if processes else ())


def run(*args, **options):
    """Run to the end; the output."""
    process = start(*args, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def ranks_of(launcher):
    """Process ids of the ranks that a torchrun process has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def kill_one_rank(launcher):
    """SIGKILL for the last rank, as the kernel does when memory is short."""
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)


@pytest.fixture(scope="module")
def images(photos, tmp_path_factory):
    """59 of the photographs: not to be divided by any number of processes."""
    folder = tmp_path_factory.mktemp("images") / "images"
    shutil.copytree(photos, folder)
    next(folder.glob("*/*.jpg")).unlink()
    return folder


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The same run in one process, without a group."""
    exp = tmp_path_factory.mktemp("alone") / "exp"
    run(0, images, exp)
    return exp


@pytest.fixture(scope="module")
def pair(images, tmp_path_factory):
    """The run in two processes, k-means by faiss."""
    exp = tmp_path_factory.mktemp("pair") / "exp"
    run(2, images, exp, "--checkpoints", 1)
    return exp


def assert_about_the_same(one, other):
    """First epoch: clustering and loss, within rounding; the clusters themselves nearly all."""
    a, b = (logs.read_lines(exp / "log.jsonl")[0] for exp in (one, other))
    assert b["clustering_loss"] == pytest.approx(a["clustering_loss"], rel=1e-3)
    assert b["loss"] == pytest.approx(a["loss"], abs=1e-3)
    assert a["iteration"] == b["iteration"]
    lists = [read_log(exp)[0] for exp in (one, other)]
    first = [np.repeat(np.arange(len(ids)), [len(i) for i in ids]) for ids in lists]
    order = [np.concatenate(ids).astype(int) for ids in lists]
    labels = [f[np.argsort(o)] for f, o in zip(first, order)]
    assert sorted(order[1]) == list(range(59))  # every image once
    assert compare(*labels)["nmi"] >= 0.95


def read_log(exp):
    with open(exp / "clusters", "rb") as file:
        return pickle.load(file)


def test_two_processes_give_the_run_of_one(alone, pair):
    assert_about_the_same(alone, pair)
    one, two = (checkpoint.read(exp / "clustering.pth.tar") for exp in (alone, pair))
    weights = zip(one["state_dict"].items(), two["state_dict"].values())
    for (name, a), b in weights:  # after an epoch of training
        assert torch.allclose(a.double(), b.double(), atol=2e-3), name


@pytest.mark.parametrize("processes, kmeans", [(4, "faiss"), (3, "distributed")])
def test_other_numbers_of_processes_too(alone, images, tmp_path, processes, kmeans):
    run(processes, images, tmp_path / "exp", "--kmeans", kmeans, "--epochs", 1)
    assert_about_the_same(alone, tmp_path / "exp")


def test_a_killed_rank_ends_the_job_with_the_reason_and_it_resumes_exactly(images, tmp_path, pair):
    exp = tmp_path / "exp"
    launcher = start(2, images, exp, "--checkpoints", 1)
    wait_for(exp / "checkpoints" / "checkpoint_2.pth.tar", launcher)
    kill_one_rank(launcher)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and "SIGKILL" in output
    run(2, images, exp, "--checkpoints", 1, "--resume", "auto")
    assert_same_run(exp, pair)


def test_torchrun_restarts_a_killed_job_where_it_was(images, tmp_path, pair):
    exp = tmp_path / "exp"
    launcher = start(2, images, exp, "--checkpoints", 1, "--resume", "auto", restarts=1)
    wait_for(exp / "checkpoints" / "checkpoint_5.pth.tar", launcher)
    kill_one_rank(launcher)
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output
    assert "resuming" in output
    assert_same_run(exp, pair)


def test_ranks_end_when_their_launcher_is_killed_outright(images, tmp_path):
    launcher = start(2, images, tmp_path / "exp", "--checkpoints", 1, "--epochs", 1000)
    wait_for(tmp_path / "exp" / "checkpoints" / "checkpoint_3.pth.tar", launcher)
    ranks = ranks_of(launcher)
    launcher.kill()
    until = time.monotonic() + 5
    while any(is_running(pid) for pid in ranks):
        assert time.monotonic() < until, "ranks run on"
        time.sleep(0.05)
    launcher.communicate()
    run(2, images, tmp_path / "exp", "--resume", "auto", "--epochs", 3)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_another_number_of_processes_goes_on(
    alone, images, tmp_path, number
):  # fmt: skip
    exp = tmp_path / "exp"
    process = start(0, images, exp, "--checkpoints", 1, "--epochs", 400)
    wait_for(exp / "checkpoints" / "checkpoint_1.pth.tar", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == Preempted.exit_code, output
    assert "--resume auto" in output and "Traceback" not in output
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    epochs = saved["epoch"] + 2
    run(2, images, exp, "--checkpoints", 100, "--resume", "auto", "--epochs", epochs)
    assert_about_the_same(alone, exp)
    assert len(logs.read_lines(exp / "log.jsonl")) == epochs


@pytest.mark.parametrize("sync_bn", [True, False])
def test_a_resnet_in_two_processes_resumes_exactly(images, tmp_path, sync_bn):
    few = tmp_path / "few"
    few.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.jpg"))[::2]):
        shutil.copy(path, few / f"{i:02d}.jpg")
    flags = ("--arch", "resnet18s", "--batch", 15, "--checkpoints", 1)  # 30 images: two steps of 7 + 8

    def train(exp, *more):
        process = start(2, few, exp, *flags, *more, sync_bn=sync_bn)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    train(tmp_path / "whole")
    train(tmp_path / "part", "--epochs", 1)
    train(tmp_path / "part", "--resume", tmp_path / "part" / "checkpoints" / "checkpoint_1.pth.tar")
    assert_same_run(tmp_path / "part", tmp_path / "whole")
