"""Short runs of eval_voc_classif.py, with the fixtures that its tests share."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import eval_voc_classif as script
import models
from tests.voc_folder import make_voc

CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture(scope="module")
def vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def small_vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("small"), number=8)


def save_network(path: Path, arch: str = "tiny", sobel: bool = False) -> Path:
    """A checkpoint as the training leaves it: with batch-norm statistics and a head of 7."""
    net = models.build(arch, sobel, 7, seed=1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(0.1)
            layer.running_var.fill_(0.5)
    checkpoint.save(path, {"arch": arch, "state_dict": net.state_dict()})
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return save_network(tmp_path / "model.pth.tar")


def arguments(vocdir: Path, model: Path | None, exp: Path, *flags: str) -> argparse.Namespace:
    base = ["--vocdir", str(vocdir), "--exp", str(exp), "--image-size", str(SIZE), "--workers", "0"]
    base += ["--device", "cpu", "--nit", "5", "--batch", "7", "--model", str(model)]
    return script.get_parser().parse_args(base + list(flags))


def state(exp: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(exp / script.CHECKPOINT)["state_dict"]
