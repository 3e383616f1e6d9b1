"""Short runs of eval_linear.py on three colours, with the fixtures that its tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import eval_linear
import models
from tests.helpers import equal

SIZE = 64
COLOURS = {"blue": (60, 90, 170), "green": (70, 150, 60), "red": (190, 80, 70)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of noisy colour, 8 images each in train/ and 4 in val/."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 45, (76, 84, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def write_model(path: Path, arch: str) -> Path:
    """A checkpoint of a network with Sobel whose batch-norm statistics are not the initial ones."""
    net = models.build(arch, sobel=True, num_clusters=7, seed=5)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.2, 0.5, generator=generator)
    checkpoint.save(path, {"arch": arch, "state_dict": net.state_dict()})
    return path


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "alexnet.pth.tar", "alexnet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.pth.tar", "tiny")


@pytest.fixture(scope="module")
def evaluate(folder, model):
    """evaluate(exp, *flags) runs eval_linear with small settings; flags win over them."""

    def call(exp: Path, *flags: str | Path) -> list[dict]:
        settings = ["--data", folder, "--model", model, "--exp", exp, "--image-size", SIZE, "--device", "cpu"]
        settings += ["--workers", 0, "--batch_size", 10, "--epochs", 2]
        return eval_linear.main(eval_linear.get_parser().parse_args([*map(str, settings), *map(str, flags)]))

    return call


@pytest.fixture
def run(evaluate, tmp_path):
    """run(*flags): as `evaluate`, into tmp_path / "exp"."""
    return lambda *flags: evaluate(tmp_path / "exp", *flags)


def assert_same_classifier(one: Path, other: Path, layer: str, but: tuple[str, ...] = ()) -> None:
    """The files of a layer in two folders, but for some lines of the protocol."""
    for which in ("last", "best"):
        states = [checkpoint.read(exp / f"{layer}_{which}.pth.tar") for exp in (one, other)]
        for state in states:
            state["protocol"] = {k: v for k, v in state["protocol"].items() if k not in but}
        assert equal(*states), (layer, which)
    log = f"{layer}_log.jsonl"
    assert (one / log).read_text() == (other / log).read_text()
