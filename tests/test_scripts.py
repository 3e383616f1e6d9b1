"""The shell scripts: what they call, with which settings, and how they fail. No environment is built."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in ROOT.glob("recipes/*.sh") if path.name != "common.sh")
EVALUATIONS = [path for path in RECIPES if path.name.startswith("eval_")]
SCRIPTS = [
    *sorted([*ROOT.glob("*.sh"), *ROOT.glob("visu/*.sh"), *ROOT.glob("recipes/*.sh")]),
    ROOT / ".ci" / "run",
    ROOT / "slurm" / "train.sbatch",
]
SOURCED = ("env.sh", "common.sh")
SETTINGS = (
    "DIR", "ARCH", "LR", "WD", "K", "WORKERS", "EXP", "DEMO_DIR", "PYTHON", "DATA", "MODEL", "VOC", "CONV",
    "LAYERS", "DATASETS", "EVAL", "STAGE", "S", "L", "GND", "TEMP", "SPLIT", "FC6_8", "NIT", "BATCH", "PRINT",
    "TRAIN_BATCHNORM", "EVAL_RANDOM_CROPS", "STEPSIZE", "GPUS", "LIST",
)  # fmt: skip


def bash(*command: str | Path, cwd: Path, **environment: str | Path) -> subprocess.CompletedProcess:
    """Run a script with none of its settings but these in the environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        ["bash", *map(str, command)],
        cwd=cwd,
        env=inherited | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def recorder(tmp_path) -> Path:
    """An interpreter that only writes down its arguments, a line a call, into `calls` beside it."""
    return script(tmp_path / "bin" / "recorder", f'echo "$*" >>"{tmp_path}/bin/calls"')


def calls(recorder: Path) -> list[str]:
    path = recorder.parent / "calls"
    return path.read_text().replace(f"{ROOT}/", "").splitlines() if path.exists() else []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash_and_strict(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.name not in SOURCED:
        assert os.access(path, os.X_OK)
        assert "set -euo pipefail" in path.read_text()


def test_main_passes_the_papers_settings(tmp_path, recorder):
    (tmp_path / "images").mkdir()
    result = bash(ROOT / "main.sh", "images", cwd=tmp_path, PYTHON=recorder)
    assert result.returncode == 0, result.stderr
    workers = min(12, len(os.sched_getaffinity(0)))
    assert calls(recorder) == [
        "main.py images --exp exp --arch alexnet --lr 0.05 --wd=-5 --k 10000 --sobel --verbose "
        f"--workers {workers}"
    ]


def test_main_prints_the_command_that_it_runs(tmp_path, recorder):
    (tmp_path / "my images").mkdir()
    result = bash(ROOT / "main.sh", "my images", cwd=tmp_path, PYTHON=recorder)
    assert rf"+ {recorder} {ROOT}/main.py my\ images --exp exp" in result.stdout


def test_main_takes_settings_from_variables_and_further_flags(tmp_path, recorder):
    settings = {"ARCH": "vgg16", "LR": "0.1", "WD": "-4", "K": "7", "WORKERS": "3", "EXP": "a b"}
    result = bash(ROOT / "main.sh", tmp_path, "--epochs", "5", cwd=tmp_path, PYTHON=recorder, **settings)
    assert result.returncode == 0, result.stderr
    (call,) = calls(recorder)
    for flag in ("--arch vgg16", "--lr 0.1", "--wd=-4", "--k 7", "--workers 3", "--exp a b"):
        assert f" {flag} " in call
    assert call.endswith(" --epochs 5")


def test_main_takes_the_folder_from_a_variable(tmp_path, recorder):
    bash(ROOT / "main.sh", "--epochs", "5", cwd=tmp_path, PYTHON=recorder, DIR=tmp_path)
    assert calls(recorder)[0].startswith(f"main.py {tmp_path} ")


@pytest.mark.parametrize("python", [sys.executable, None])
def test_missing_folder_ends_with_code_2_before_anything_is_set_up(tmp_path, python):
    environment = {"PYTHON": python} if python else {}
    result = bash(ROOT / "main.sh", "nowhere", cwd=tmp_path, **environment)
    assert result.returncode == 2
    assert result.stderr == "main.sh: nowhere: no such folder or list of images\n"
    assert result.stdout == ""


def test_failing_training_passes_its_exit_code_on(tmp_path):
    failing = script(tmp_path / "python", "exit 2")
    result = bash(ROOT / "main.sh", tmp_path, cwd=tmp_path, PYTHON=failing)
    assert result.returncode == 2


def test_missing_interpreter_ends_with_code_2(tmp_path):
    result = bash(ROOT / "main.sh", tmp_path, cwd=tmp_path, PYTHON="no-such-python")
    assert (result.returncode, result.stderr) == (2, "main.sh: PYTHON=no-such-python: no such interpreter\n")


def test_help_is_the_comment_at_the_top(tmp_path):
    result = bash(ROOT / "main.sh", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("Train a network without labels.") and "set -euo" not in result.stdout


def test_demo_cuts_trains_and_compares(tmp_path, recorder):
    result = bash(ROOT / "main.sh", cwd=tmp_path, PYTHON=recorder, DEMO_DIR="images", EXP="run")
    assert result.returncode == 0, result.stderr
    cut, train, evaluate = calls(recorder)
    assert cut == "demo.py images"
    assert train.startswith("main.py images/train --exp run ") and train.endswith(" --resume auto")
    assert evaluate.startswith(
        "eval_knn.py --data images --model run/checkpoint.pth.tar "
        "--baseline run/checkpoints/checkpoint_0.pth.tar --layers conv5 fc7.pre "
    )
    assert re.search(r"--image-size \d+", train) and "--image-size" not in evaluate  # the network tells
    assert "network in run/checkpoint.pth.tar" in result.stdout


def test_demo_passes_flags_on_and_continues_an_earlier_run(tmp_path, recorder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth.tar").touch()
    result = bash(ROOT / "main.sh", "--device", "cpu", cwd=tmp_path, PYTHON=recorder, EXP="run")
    assert result.returncode == 0, result.stderr
    train = calls(recorder)[1]
    assert train.endswith(" --resume auto --device cpu") and "going on from there" in result.stdout


@pytest.mark.parametrize("method", ["deepcluster", "deepclusterv2", "swav", "deepercluster"])
def test_demo_of_every_method_gives_flags_that_its_script_takes(method, tmp_path, recorder):
    result = bash(ROOT / "main.sh", cwd=tmp_path, PYTHON=recorder, METHOD=method)
    assert result.returncode == 0, result.stderr
    name, *flags = shlex.split(calls(recorder)[1])
    parser = importlib.import_module(name.removesuffix(".py")).get_parser()
    args = parser.parse_args(flags)
    assert args.seed == 31 and args.resume == "auto"
    assert args.exp == ("exp_demo" if method == "deepcluster" else f"exp_demo_{method}")


def test_an_unknown_method_is_refused(tmp_path):
    result = bash(ROOT / "main.sh", cwd=tmp_path, METHOD="moco")
    assert result.returncode == 2 and "METHOD=moco: choose deepcluster" in result.stderr


def test_demo_keeps_its_folders_in_the_repository(tmp_path, recorder):
    assert bash(ROOT / "main.sh", cwd=tmp_path, PYTHON=recorder).returncode == 0
    assert calls(recorder)[0] == "demo.py demo_images"  # ROOT/ is cut off
    assert calls(recorder)[1].startswith("main.py demo_images/train --exp exp_demo ")


def test_tests_run_with_coverage_and_some_of_them_without(tmp_path, recorder):
    assert bash(ROOT / "test.sh", cwd=tmp_path, PYTHON="bin/recorder").returncode == 0
    assert bash(ROOT / "test.sh", "tests/test_demo.py", cwd=tmp_path, PYTHON="bin/recorder").returncode == 0
    whole, some = calls(recorder)
    modules = "algorithms checkpoint clustering data evaluation features models training"
    for module in modules.split():
        assert f"--cov={module} " in whole
    assert "--cov-fail-under=90 -n 2 " in whole
    assert some == "-m pytest tests/test_demo.py"


def test_ci_runs_ruff_and_the_tests(tmp_path, recorder):
    assert bash(ROOT / ".ci" / "run", cwd=tmp_path, PYTHON="bin/recorder").returncode == 0
    check, layout, tests = calls(recorder)
    assert (check, layout) == ("-m ruff check .", "-m ruff format --check .")
    assert tests.startswith("-m pytest --cov=")


# ---------------------------------------------------------------------------------------- flags


def parse(script: str, flags: list[str]) -> argparse.Namespace:
    """The flags as the script takes them; an exit of its parser fails the test."""
    return (
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).get_parser().parse_args(flags)
    )


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path not in EVALUATIONS], ids=lambda path: path.stem
)
def test_recipes_name_flags_that_their_script_takes(path, tmp_path):
    result = bash(path, "--seed", "7", cwd=tmp_path, PRINT="1")
    assert result.returncode == 0, result.stderr
    script, *flags = result.stdout.splitlines()
    args = parse(script, ["images", *flags])
    assert script.removesuffix(".py").removeprefix("main_") in ("main.py", "main", path.stem.split("_")[0])
    assert args.arch in models.ARCHITECTURES and args.seed == 7  # flags of the caller come last


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_recipes_of_evaluations_give_the_published_settings_and_take_a_network(path, tmp_path, recorder):
    result = bash(path, "--seed", "7", cwd=tmp_path, PYTHON=recorder, DIR="data", MODEL="net", GPUS="1")
    assert result.returncode == 0, result.stderr
    script, *flags = calls(recorder)[0].split()
    args = parse(script, flags)
    assert (args.data, args.model, args.exp, args.resume, args.seed) == ("data", "net", "exp", "auto", 7)
    rates = {"1percent": (0.02, 5), "10percent": (0.01, 0.2)}.get(path.stem.split("_")[-1])
    plain = parse(script, ["--data", "data", "--model", "net", "--resume", "auto", "--seed", "7"])
    if rates is not None:
        assert (args.lr, args.lr_last_layer) == rates and args.list is None
        plain.lr, plain.lr_last_layer, plain.labels_perc = *rates, args.labels_perc
    assert vars(args) == vars(plain)  # the defaults are the published settings
    printed = bash(path, cwd=tmp_path, PRINT="1", MODEL="net").stdout.splitlines()
    assert printed[:3] == [script, "--model", "net"]
    result = bash(path, cwd=tmp_path, PYTHON=recorder, DIR="data")
    assert result.returncode == 2 and "MODEL to a checkpoint" in result.stderr


def test_a_recipe_takes_the_published_list(tmp_path, recorder):
    recipe = ROOT / "recipes" / "eval_semisup_1percent.sh"
    bash(recipe, cwd=tmp_path, PYTHON=recorder, DIR="d", MODEL="m", GPUS="2", LIST="a.txt")
    (call,) = calls(recorder)
    assert call.startswith(
        "-m torch.distributed.run --standalone --nproc-per-node 2 eval_semisup.py --data d "
    )
    assert " --model m --labels_perc 1 --list a.txt " in call


def test_a_recipe_runs_its_script_and_goes_on(tmp_path, recorder):
    recipe = ROOT / "recipes" / "swav_200ep_bs256.sh"
    result = bash(recipe, "--seed", "7", cwd=tmp_path, PYTHON=recorder, DIR="images", EXP="run", GPUS="1")
    assert result.returncode == 0, result.stderr
    (call,) = calls(recorder)
    assert call.startswith("main_swav.py images --exp run --resume auto --arch resnet50 ")
    assert call.endswith(" --seed 7")
    bash(recipe, cwd=tmp_path, PYTHON=recorder, DIR="images", GPUS="4")
    assert calls(recorder)[1].startswith(
        "-m torch.distributed.run --standalone --nproc-per-node 4 main_swav.py"
    )
    assert bash(recipe, cwd=tmp_path, PYTHON=recorder).returncode == 2


@pytest.mark.parametrize(
    "nvidia_smi, processes",
    [
        ("exit 127", 1),
        ("echo 'NVIDIA-SMI has failed.'; echo 'Is the driver running?'; exit 9", 1),
        ("echo 'GPU 0: A (UUID: a)'", 1),
        ("echo 'GPU 0: A (UUID: a)'; echo '  MIG 1g (UUID: b)'; echo 'GPU 1: A (UUID: c)'", 2),
    ],
)
def test_a_recipe_takes_the_gpus_that_are_there_and_runs_without_any(
    tmp_path, recorder, nvidia_smi, processes
):
    tools = script(tmp_path / "tools" / "nvidia-smi", nvidia_smi).parent
    path = f"{tools}:{os.environ['PATH']}"
    recipe = ROOT / "recipes" / "swav_100ep.sh"
    result = bash(recipe, cwd=tmp_path, PYTHON=recorder, DIR="images", PATH=path)
    assert result.returncode == 0, result.stderr
    (call,) = calls(recorder)
    started = f"-m torch.distributed.run --standalone --nproc-per-node {processes} " if processes > 1 else ""
    assert call.startswith(f"{started}main_swav.py images ")


@pytest.mark.parametrize(
    "name, settings",
    [
        ("main.sh", {"DIR": "."}),
        ("main.sh", {}),
        ("eval_linear.sh", {"DATA": "images", "MODEL": "net", "CONV": "1 3"}),
        ("eval_linear.sh", {"DATA": "images", "MODEL": "net", "LAYERS": "layer3 avgpool"}),
        ("eval_retrieval.sh", {"DATASETS": "data", "MODEL": "net", "TEMP": "t", "GND": "g"}),
        ("eval_voc_classif.sh", {"VOC": ".", "MODEL": "net"}),
        ("eval_voc_classif_all.sh", {"VOC": ".", "MODEL": "net"}),
        ("eval_voc_classif_fc6_8.sh", {"VOC": ".", "MODEL": "net"}),
    ],
)
def test_scripts_name_flags_that_their_script_takes(name, settings, tmp_path, recorder):
    (tmp_path / "net").touch()
    result = bash(ROOT / name, cwd=tmp_path, PYTHON=recorder, **settings)
    assert result.returncode == 0, result.stderr
    assert calls(recorder)
    for call in calls(recorder):
        script, *flags = call.split()
        parse(script, flags)


@pytest.mark.parametrize("name", ["gradient_ascent.sh", "activ-retrieval.sh"])
def test_scripts_of_visu_name_flags_that_their_script_takes(name, tmp_path, recorder):
    (tmp_path / "net").touch()
    result = bash(ROOT / "visu" / name, cwd=tmp_path, PYTHON=recorder, DATA=".", MODEL="net", EXP="e")
    assert result.returncode == 0, result.stderr
    script, *flags = calls(recorder)[0].split()
    parse(script, flags)


# ---------------------------------------------------------------------------------------- env.sh


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with env.sh, requirements and a `python3` whose environments only note down pip calls."""
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / "a.txt").write_text("numpy\n")
    (tmp_path / "b.txt").write_text("pytest\n")
    inner = f'[[ $1 != -m ]] || {{ echo "$*" >>"{tmp_path}/calls"; [[ ! -e "{tmp_path}/offline" ]]; }}'
    template = script(tmp_path / "template", inner)
    outer = (
        f'[[ "$1 $2" != "-m venv" ]] || {{ mkdir -p "$4/bin"; cp "{template}" "$4/bin/python"; }}\n'
        f'[[ $1 != -c ]] || [[ ! -e "{tmp_path}/old" ]]'
    )
    script(tmp_path / "bin" / "python3", outer)
    script(tmp_path / "start.sh", f'set -euo pipefail\n. "{tmp_path}/env.sh" "$@"\necho "PY=$PY"')
    return tmp_path


def start(project: Path, *files: str) -> subprocess.CompletedProcess:
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return bash(project / "start.sh", *files, cwd=project, PATH=path)


def installations(project: Path) -> int:
    calls = project / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_environment_is_made_once_and_reused(project):
    first = start(project, "a.txt")
    assert first.returncode == 0, first.stderr
    assert "installing a.txt" in first.stdout
    assert f"PY={project}/.venv/bin/python" in first.stdout
    second = start(project, "a.txt")
    assert second.stdout.splitlines()[0] == f"environment: {project}/.venv (has a.txt)"
    assert installations(project) == 1


def test_changed_requirements_are_installed(project):
    start(project, "a.txt")
    (project / "a.txt").write_text("numpy==2\n")
    assert "installing" in start(project, "a.txt").stdout
    assert installations(project) == 2


def test_environment_of_the_tests_serves_training_too(project):
    start(project, "a.txt", "b.txt")
    assert "installing" not in start(project, "a.txt").stdout
    assert "installing" not in start(project, "a.txt", "b.txt").stdout
    assert installations(project) == 1


def test_failed_installation_is_reported_and_tried_again(project):
    (project / "offline").touch()
    result = start(project, "a.txt")
    assert result.returncode == 2 and "pip could not install a.txt" in result.stderr
    (project / "offline").unlink()
    assert start(project, "a.txt").returncode == 0
    assert installations(project) == 2


def test_python_that_is_too_old_is_refused(project):
    (project / "old").touch()
    result = start(project, "a.txt")
    assert result.returncode == 2 and "3.11" in result.stderr
    assert not (project / ".venv").exists()
