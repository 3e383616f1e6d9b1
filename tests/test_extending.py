"""The code of docs/extending.md, as it stands there, on a few crops."""

import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import clustering
import main
import models
from models import weights
from tests import small_run, tiny

PAGE = Path(main.__file__).parent / "docs" / "extending.md"
COMMON = f"--image-size {small_run.SIZE} --batch 16 --workers 0 --device cpu --no-report".split()


def code_of_page() -> dict[str, str]:
    """Blocks of Python by the file name in their first line."""
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return dict(blocks)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a block registers is gone after the test."""
    monkeypatch.setattr(clustering, "CLUSTERINGS", dict(clustering.CLUSTERINGS))
    monkeypatch.setattr(models, "ARCHITECTURES", models.ARCHITECTURES | {"tiny": tiny.tiny})
    monkeypatch.setattr(main, "CLUSTERINGS", clustering.CLUSTERINGS)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small_run.write_crops(tmp_path_factory.mktemp("crops") / "photos", pictures=3, each=8)


def load(name: str) -> types.ModuleType:
    module = types.ModuleType(Path(name).stem)
    exec(compile(code_of_page()[name], f"docs/extending.md: {name}", "exec"), module.__dict__)
    return module


def train(script, crops, exp, *flags, **settings):
    """A run of the script; settings: of args, where the parser does not know them."""
    args = script.get_parser().parse_args([str(crops), "--exp", str(exp), *COMMON, *map(str, flags)])
    vars(args).update(settings)
    script.main(args)
    return checkpoint.read(exp / "checkpoint.pth.tar")


def test_every_block_has_its_test():
    assert set(code_of_page()) == {"ward.py", "models/bottle.py", "main_exemplar.py"}


def test_a_clustering(crops, tmp_path):
    ward = load("ward.py").ward
    points = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)  # three heaps of four
    found = ward(points, k=3, seed=0)
    assert sorted(found.sizes()) == [4, 4, 4] and found.objective == 0

    # As it is registered, main.py offers it.
    saved = train(main, crops, tmp_path / "exp", "--arch", "tiny", "--k", 4, "--epochs", 2, clustering="Ward")
    assert saved["epoch"] == 2
    assert saved["parts"]["labels"]["assignments"][0]["num_clusters"] == 4
    assert (tmp_path / "exp" / "assignments.csv").read_text().count("\n") == 1 + 24


def test_a_backbone(crops, tmp_path):
    load("models/bottle.py")
    train(main, crops, tmp_path / "exp", "--arch", "bottle", "--sobel", "--k", 4, "--epochs", 1)
    net = weights.load(tmp_path / "exp" / "checkpoint.pth.tar", ["stage1", "stage2"])
    assert (net.arch, net.sobel is not None, net.feature_dim) == ("bottle", True, 32)
    images = torch.randn(2, 3, 32, 32)
    plain, folded = (n.activations(images, net.maps) for n in (net, net.folded()))
    assert [tuple(plain[name].shape) for name in net.maps] == [(2, 16, 16, 16), (2, 32, 8, 8)]
    for name in net.maps:
        torch.testing.assert_close(folded[name], plain[name], rtol=1e-4, atol=1e-5)
    first, second = (models.build("bottle", seed=seed).state_dict() for seed in (1, 2))
    again = models.build("bottle", seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stage1.0.weight"], second["stage1.0.weight"])


def test_a_method_learns_and_resumes_in_mid_epoch(crops, tmp_path):
    script = load("main_exemplar.py")
    flags = ("--arch", "tiny", "--checkpoints", 1, "--epochs", 3)
    whole = train(script, crops, tmp_path / "whole", *flags)
    assert whole["method"] == "exemplar" and whole["iteration"] == 6
    assert whole["state_dict"]["top_layer.weight"].shape[0] == 24

    middle = tmp_path / "whole" / "checkpoints" / "checkpoint_3.pth.tar"  # one step into the second epoch
    assert checkpoint.read(middle)["position"] == 1
    resumed = train(script, crops, tmp_path / "resumed", *flags, "--resume", middle)
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert not torch.equal(
        whole["state_dict"]["features.0.weight"], checkpoint.read(middle)["state_dict"]["features.0.weight"]
    )
