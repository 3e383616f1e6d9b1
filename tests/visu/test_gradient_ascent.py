"""The script of gradient ascent: its files, its flags, its mistakes, every network."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import models
from models import Network
from tests.helpers import ROOT, refuses
from tests.visu.test_ascent import settled
from visu import ascent, gradient_ascent


def saved(folder: Path, net: Network) -> Path:
    checkpoint.save(folder / "net.pth.tar", {"arch": net.arch, "state_dict": net.state_dict()})
    return folder / "net.pth.tar"


def run(*flags: str | int | Path) -> list[ascent.Ascent]:
    return gradient_ascent.main(
        gradient_ascent.get_parser().parse_args([*map(str, flags), "--device", "cpu"])
    )


def test_flags_win_over_the_preset_and_no_preset_is_the_usage_text(tmp_path):
    net = settled()

    def settings(*flags):
        args = gradient_ascent.get_parser().parse_args(["--model", "x", *flags])
        return gradient_ascent.choose_settings(args, net, "conv1")

    plain = settings("--no-preset")
    assert (plain.lr, plain.wd, plain.sig, plain.step, plain.niter, plain.idim) == (
        3,
        1e-5,
        0.3,
        5,
        1000,
        224,
    )
    assert plain.noise == 20 and plain.released
    chosen = settings()
    assert not chosen.released and chosen == ascent.preset(0.0, False, 224)
    given = settings(
        "--lr", "30", "--wd", "0", "--niter", "3000", "--sig", "1", "--step", "2", "--idim", "64"
    )
    assert given == replace(ascent.preset(0.0, False, 64), lr=30.0, wd=0.0, niter=3000, sig=1.0, step=2)


# ---------------------------------------------------------------------------------------- the script


def test_writes_the_named_files_and_a_sheet(tmp_path, capsys):
    path = saved(tmp_path, settled())
    results = run("--model", path, "--conv", 2, "--exp", tmp_path / "e", "--idim", 32, "--niter", 10)
    folder = tmp_path / "e" / "conv2"
    names = {f"layer2-channel{c}.jpeg" for c in range(12)} | {"layer2.jpeg", ".drawn"}  # no source of images
    assert {file.name for file in folder.iterdir()} == names
    for result in results:
        with Image.open(folder / f"layer2-channel{result.channel}.jpeg") as picture:
            assert picture.size == (32, 32) and picture.format == "JPEG"
            assert np.abs(np.asarray(picture, int) - result.picture).mean() < 6  # JPEG of noise
    with Image.open(folder / "layer2.jpeg") as picture:
        assert picture.width > 4 * gradient_ascent.SHEET_TILE
    out = capsys.readouterr().out
    assert "against that of noise: median x" in out and str(folder / "layer2.jpeg") in out


def test_chosen_filters_only(tmp_path):
    path = saved(tmp_path, settled(sobel=True))
    flags = ("--idim", 32, "--niter", 2, "--no-preset", "--filters", 5, 2, 5)
    assert [r.channel for r in run("--model", path, "--exp", tmp_path, "--conv", 1, *flags)] == [5, 2]


@pytest.mark.parametrize(
    ("arch", "flags", "files"),
    [
        ("resnet18", ("--layer", "layer3"), "layer3/layer3-channel1.jpeg"),
        ("resnet18s", ("--conv", 1), "conv1/layer1-channel1.jpeg"),
        ("resnet50", ("--layer", "layer1"), "layer1/layer1-channel1.jpeg"),
        ("vgg16", ("--conv", 3), "conv3/layer3-channel1.jpeg"),
        ("toy", (), "a/layera-channel1.jpeg"),
        ("toy:sobel", ("--layer", "b", "--no-preset"), "b/layerb-channel1.jpeg"),
    ],
)
def test_every_network_has_its_pictures(tmp_path, arch, flags, files):
    common = ("--exp", tmp_path, "--idim", 32, "--niter", 2, "--filters", 1)
    run("--model", f"random:{arch}", *common, *flags)
    with Image.open(tmp_path / files) as picture:
        assert picture.size == (32, 32)


def test_bad_flags_are_answered_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for script in ("gradient_ascent.py", "filters.py", "activ_retrieval.py", "clusters.py", "report.py"):
        for flags, code in ((["--help"], 0), (["--no-such-flag"], 2)):
            command = [sys.executable, ROOT / "visu" / script, *flags]
            result = subprocess.run(
                command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
            )
            assert result.returncode == code, result.stderr
            assert "torch was imported" not in result.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--conv", 3), "--conv 3: tiny has the maps conv1, conv2; name one with --layer"),
        (("--layer", "conv1.pre"), "--layer conv1.pre: tiny has the maps"),
        (("--conv", 0), "--conv: 0: must be at least 1"),
        (("--arch", "vgg16"), "--arch vgg16: .* holds tiny"),
        (("--filters", 8), "--filters 8: .* filters 0 to 7"),
        (("--lr", 0), "--lr"),
        (("--wd", "nan"), "--wd"),
        (("--niter", 0), "--niter"),
        (("--batch", 0), "--batch"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    path = saved(tmp_path, settled())
    with refuses(words):
        run("--model", path, "--exp", tmp_path / "e", *flags)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "where, name", [(ROOT, "visu/gradient_ascent.py"), (ROOT / "visu", "gradient_ascent.py")]
)
def test_runs_as_a_script_from_either_folder(tmp_path, where, name):
    command = [sys.executable, name, "--model", str(tmp_path / "missing.pth")]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("missing.pth: no such checkpoint file")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "script, settings, expected",
    [
        ("gradient_ascent.sh", {"ARCH": "alexnet"}, "--model m --arch alexnet --exp e --conv 4 --lr 9"),
        ("gradient_ascent.sh", {"LAYER": "layer3"}, "--model m --exp e --layer layer3 --lr 9"),
        ("activ-retrieval.sh", {"DATA": "d"}, "--model m --exp e --conv 4 --data d --workers 4 --lr 9"),
        (
            "activ-retrieval.sh",
            {"DATA": "d", "LAYER": "b"},
            "--model m --exp e --layer b --data d --workers 4 --lr 9",
        ),
    ],
)
def test_shell_scripts_pass_their_settings_on(script, settings, expected):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/echo", "MODEL": "m", "EXP": "e", "CONV": "4"}
    result = subprocess.run(
        [f"./{script}", "--lr", "9"],
        cwd=ROOT / "visu",
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(expected)


def test_weights_that_are_not_finite_are_refused_before_anything_is_drawn(tmp_path):
    net = models.build("tiny", seed=1)
    with torch.no_grad():
        next(net.body_parameters()).fill_(float("nan"))
    torch.save({"arch": "tiny", "state_dict": net.state_dict()}, tmp_path / "nan.pth.tar")
    flags = ["--model", str(tmp_path / "nan.pth.tar"), "--exp", str(tmp_path / "out")]
    with refuses("nan.pth.tar: has weights that are not finite"):
        gradient_ascent.main(gradient_ascent.get_parser().parse_args(flags))
    assert not (tmp_path / "out").exists()
