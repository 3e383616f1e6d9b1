"""The linear probe: side by side as alone, killed, stopped by signals, resumed, in several processes."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import eval_linear
import util
from tests.linear_runs import (  # noqa: F401
    COLOURS,
    assert_same_classifier,
    evaluate,
    folder,
    model,
    run,
)

ROOT = Path(__file__).resolve().parent.parent
HELD = ("--val-fraction", 0.25, "--batch_size", 7)  # 18 images left: three steps an epoch
LAYERS = ("--conv", 2, 1, 2, "--layers", "fc7")


@pytest.fixture(scope="module")
def whole(evaluate, tmp_path_factory) -> tuple[Path, list[dict]]:
    """An uninterrupted run of three layers: its folder and its results."""
    exp = tmp_path_factory.mktemp("whole")
    return exp, evaluate(exp, *HELD, *LAYERS)


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
