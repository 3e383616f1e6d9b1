"""SwAV, DeepCluster-v2 and DeeperCluster whole: runs, their files, exact resume, several processes."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import main_deepclusterv2
import main_deepercluster
import main_swav
from models.weights import load
from tests import golden
from tests.helpers import equal
from training.logs import read_lines
from util import UserError

ROOT = Path(main_swav.__file__).parent
TIMES = ("seconds", "images_per_second", "peak_memory_gib")
CROPS = (
    "--nmb_crops 2 2 --size_crops 32 24 --min_scale_crops .3 .1 --max_scale_crops 1 .4 --hidden_mlp 16 "
    "--feat_dim 8 --batch_size 16 --base_lr .2 --warmup_epochs 1 --start_warmup .1"
)
METHODS = {
    "swav": (main_swav, f"{CROPS} --nmb_prototypes 12 --queue_length 32 --epoch_queue_starts 1 "
             "--freeze_prototypes_niters 2"),
    "deepclusterv2": (main_deepclusterv2, f"{CROPS} --nmb_prototypes 7 6 5"),
    "deepercluster": (main_deepercluster, "--image-size 32 --super_classes 8 --k 6 --dim_pca 8 "
                      "--reassignment 2 --nepochs 3 --lr .02 --batch_size 16"),
}  # fmt: skip
COMMON = "--arch tiny --workers 0 --device cpu --no-report --checkpoints 2"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return golden.write_crops(tmp_path_factory.mktemp("crops") / "crops", ROOT / "demo" / "pictures")


def train(method, images, exp, *flags, epochs=3):
    script, own = METHODS[method]
    name = "--nepochs" if method == "deepercluster" else "--epochs"
    arguments = [str(images), "--exp", str(exp), *COMMON.split(), *own.split(), name, str(epochs)]
    script.main(script.get_parser().parse_args([*arguments, *map(str, flags)]))
    return exp


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """{method: a run of three epochs}."""
    return {name: train(name, images, tmp_path_factory.mktemp(name) / "exp") for name in METHODS}


def assert_same_run(a, b):
    one, two = (checkpoint.read(exp / "checkpoint.pth.tar") for exp in (a, b))
    for name in one.keys() - {"args", "record"}:
        assert equal(one[name], two[name]), name
    for name in ("clusters", "assignments.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    logs = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in map(json.loads, open(exp / "log.jsonl"))]
        for exp in (a, b)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_files(method, finished, images):
    exp = finished[method]
    with open(exp / "assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and {"path", "cluster", "distance"} <= rows[0].keys()
    with open(exp / "clusters", "rb") as file:
        epochs = pickle.load(file)
    assert sorted(i for images in epochs[-1] for i in images) == list(range(60))
    assert all(i in epochs[-1][int(row["cluster"])] for i, row in enumerate(rows))
    lines = read_lines(exp / "log.jsonl")
    assert [r["epoch"] for r in (lines if isinstance(lines, list) else lines[0])] == [0, 1, 2]
    assert json.loads((exp / "config.json").read_text())["images"]["number"] == 60
    assert load(exp / "checkpoint.pth.tar").arch == "tiny"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_gives_the_same_run(method, finished, images, tmp_path):
    assert_same_run(train(method, images, tmp_path / "exp"), finished[method])


# Of three steps an epoch: in its middle, at its first step, before and after the queue is used.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iteration", [2, 4, 6])
def test_resumed_run_equals_uninterrupted_run(method, iteration, finished, images, tmp_path):
    exp = shutil.copytree(finished[method], tmp_path / "exp")
    train(method, images, exp, "--resume", exp / "checkpoints" / f"checkpoint_{iteration // 2}.pth.tar")
    assert_same_run(exp, finished[method])


def test_several_heads_have_a_column_each(finished):
    with open(finished["deepclusterv2"] / "assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    heads = [[int(row[name]) for row in rows] for name in ("cluster", "cluster1", "cluster2")]
    assert [max(head) < k for head, k in zip(heads, (7, 6, 5))] == [True] * 3 and heads[0] != heads[1]


def test_prototypes_of_v2_are_the_centroids_through_the_epoch(finished):
    saved = checkpoint.read(finished["deepclusterv2"] / "checkpoint.pth.tar")
    for h, assignment in enumerate(saved["parts"]["labels"]["assignments"]):
        assert torch.equal(saved["state_dict"][f"prototypes.prototypes{h}.weight"], assignment["centroids"])
        assert torch.allclose(assignment["centroids"].norm(dim=1), torch.ones(7 - h), atol=1e-5)


def test_swav_uses_its_queue_once_it_is_full(finished):
    lines = [json.loads(line) for line in open(finished["swav"] / "log.jsonl")]
    assert [line["queue_in_use"] for line in lines] == [False, True, True]
    assert all(0 < line["largest_prototype"] <= 1 <= line["effective_prototypes"] <= 12 for line in lines)


def test_rotations_alone_are_not_clustered(images, tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("clustered")

    monkeypatch.setattr(main_deepercluster.clustering, "preprocess", never)
    monkeypatch.setattr(main_deepercluster.clustering, "kmeans_two_level", never)
    exp = train("deepercluster", images, tmp_path / "exp", "--super_classes", 4, "--k", 1)
    lines = [json.loads(line) for line in open(exp / "log.jsonl")]
    assert lines[0]["loss"] == pytest.approx(np.log(4), rel=0.02) and lines[0]["loss_sub"] == 0
    assert 0 <= lines[-1]["accuracy_rotation"] <= 1
    assert all(line["accuracy_rotation"] == line["accuracy_super"] for line in lines)


def test_periods_of_two_epochs(finished):
    """Clusterings before epochs 0 and 2; between them labels and heads go on."""
    with open(finished["deepercluster"] / "clusters", "rb") as file:
        assert len(pickle.load(file)) == 2
    lines = [json.loads(line) for line in open(finished["deepercluster"] / "log.jsonl")]
    assert lines[0]["clusters"] == lines[1]["clusters"]
    assert all(line["accuracy_joint"] <= min(line["accuracy_super"], line["accuracy_sub"]) for line in lines)


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("swav", ["--batch_size", 61], "a global batch of 61 is more than the 60 images"),
        ("swav", ["--queue_length", 8], "--queue_length 8: less than the global batch 16"),
        ("swav", ["--size_crops", 32], "the lists of crops need one entry a group each"),
        ("swav", ["--crops_for_assign", 0, 4], "--crops_for_assign 4: there are 4 crops"),
        ("deepclusterv2", ["--nmb_prototypes", 61], "more clusters than the 60 images"),
        ("deepercluster", ["--super_classes", 6], "--super_classes 6: with rotations a multiple of 4"),
        ("deepercluster", ["--k", 1], "--k 1: less than one sub-class"),
        ("deepercluster", ["--k", 62], "--k 62: more clusters than images"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(method, flags, message, images, tmp_path):
    with pytest.raises(UserError) as error:
        train(method, images, tmp_path / "exp", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def torchrun(processes, method, images, exp, *flags, batch=None):
    script, own = METHODS[method]
    code = (
        "import sys; from tests import tiny; tiny.register(); "
        f"import {script.__name__} as m; from util import run_main; "
        "run_main(m.main, m.get_parser().parse_args())"
    )
    file = exp.parent / f"{method}_{processes}.py"
    file.write_text(code)
    batch = batch or 16 // processes
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command = [*launcher, str(file), str(images), "--exp", str(exp), *COMMON.split(), *own.split()]
    command += ["--batch_size", str(batch), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method, processes", [*((name, 2) for name in METHODS), ("deepercluster", 4)])
def test_several_processes_give_the_run_of_one(method, processes, images, finished, tmp_path):
    name = "--nepochs" if method == "deepercluster" else "--epochs"
    exp = tmp_path / "exp"
    torchrun(processes, method, images, exp, name, 3)
    lines = [[json.loads(line) for line in open(e / "log.jsonl")] for e in (exp, finished[method])]
    for several, one in zip(*lines):
        assert several["loss"] == pytest.approx(one["loss"], abs=2e-3)
    weights = [checkpoint.read(e / "checkpoint.pth.tar")["state_dict"] for e in (exp, finished[method])]
    for key, value in weights[0].items():
        assert torch.allclose(value.double(), weights[1][key].double(), rtol=1e-2, atol=2e-2), key


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_processes_goes_on_with_one_and_with_three(method, images, tmp_path):
    """The same command line: they share the global batches of 16 that it began with."""
    name = "--nepochs" if method == "deepercluster" else "--epochs"
    two = tmp_path / "two"
    torchrun(2, method, images, two, name, 3)
    saved = checkpoint.read(two / "checkpoint.pth.tar")["state_dict"]
    for processes in (1, 3):
        exp = shutil.copytree(two, tmp_path / str(processes))
        resume = ["--resume", exp / "checkpoints" / "checkpoint_2.pth.tar"]  # in the second epoch
        if processes == 1:
            train(method, images, exp, "--batch_size", 8, *resume)
        else:
            torchrun(3, method, images, exp, name, 3, *resume, batch=8)
        assert "shares global batches of 16" in (exp / "train.log").read_text()
        lines = [read_lines(e / "log.jsonl") for e in (exp, two)]
        assert [line["iteration"] for line in lines[0]] == [line["iteration"] for line in lines[1]]
        for several, one in zip(*lines):
            assert several["loss"] == pytest.approx(one["loss"], abs=2e-3)
        for key, value in checkpoint.read(exp / "checkpoint.pth.tar")["state_dict"].items():
            assert torch.allclose(value.double(), saved[key].double(), rtol=1e-2, atol=2e-2), key


def test_another_batch_is_refused(finished, images, tmp_path):
    exp = shutil.copytree(finished["swav"], tmp_path / "exp")
    with pytest.raises(UserError, match="was run with global batches of 16, not of 8; give --batch_size 16"):
        train("swav", images, exp, "--batch_size", 8, "--resume", "auto", epochs=4)


def test_killed_before_the_checkpoint_of_an_epoch_was_kept_it_is_kept_later(finished, images, tmp_path):
    shutil.copytree(finished["deepercluster"], tmp_path / "exp")
    kept = tmp_path / "exp" / "checkpoints" / "ckp-2.pth.tar"
    before = checkpoint.read(kept)
    kept.unlink()
    train("deepercluster", images, tmp_path / "exp", "--resume", "auto")
    after = checkpoint.read(kept)
    assert all(equal(before[name], after[name]) for name in ("epoch", "iteration", "state_dict", "parts"))
