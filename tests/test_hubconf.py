"""torch.hub.load from another folder, in another process, beside modules of the same names."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import hubconf
import models
from tests import legacy
from util import UserError

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import copy, pathlib, pickle, sys
import torch
import util                                  # the caller's own, loaded before
repo, weights, out = sys.argv[1:4]
net = torch.hub.load(repo, "alexnet", source="local", weights=weights, progress=False)
again = torch.hub.load(repo, "alexnet", source="local", weights=weights, progress=False)
fresh = torch.hub.load(repo, "alexnet", source="local", sobel=False, num_clusters=7, seed=1)
import models, data                          # the caller's own, loaded after
assert util.WHOSE == models.WHOSE == data.WHOSE == "caller", (util, models, data)
assert sys.modules["util"] is util and "checkpoint" not in sys.modules and "formats" not in sys.modules
assert "models.network" not in sys.modules
assert repo not in sys.path
assert type(net) is type(again) is type(fresh) and not net.training and not fresh.training
assert fresh.sobel is None and fresh.top_layer.out_features == 7
x = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
with torch.no_grad():
    logits = net(x)
    assert torch.equal(copy.deepcopy(net)(x), logits)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), logits)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), logits)
    torch.save({"logits": logits, "conv5": net.activations(x, ["conv5"])["conv5"], "arch": net.arch}, out)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(a checkpoint as the authors wrote theirs, its network)."""
    net = models.build("alexnet", sobel=True, num_clusters=12, seed=5)
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64))
    path = tmp_path_factory.mktemp("server") / "checkpoint.pth.tar"
    legacy.write(path, legacy.authors_state(net, optimizer=False))
    return path, net.eval()


def test_hub_load_by_url_from_a_folder_with_modules_of_the_same_names(tmp_path, released):
    path, net = released
    for name in ("util", "models", "data", "checkpoint"):
        (tmp_path / f"{name}.py").write_text('WHOSE = "caller"\n')
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"TORCH_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "script.py", str(ROOT), path.as_uri(), "out.pt"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (stored,) = (tmp_path / "home" / "hub" / "checkpoints").iterdir()
    assert stored.name.startswith("deepcluster-") and stored.name.endswith("-checkpoint.pth.tar")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    x = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(out["logits"], net(x))
        assert torch.equal(out["conv5"], net.activations(x, ["conv5"])["conv5"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_a_url_is_downloaded_once_and_two_of_the_same_name_do_not_clash(tmp_path, released, hub):
    path, _ = released
    other = tmp_path / "other" / "checkpoint.pth.tar"
    other.parent.mkdir()
    weights = models.build("alexnet", sobel=False, seed=2)
    checkpoint.save(other, {"arch": "alexnet", "state_dict": weights.state_dict()})
    assert hubconf.alexnet(path.as_uri(), progress=False).top_layer.out_features == 12
    assert hubconf.alexnet(other.as_uri(), progress=False).sobel is None
    assert len(list(hub.iterdir())) == 2
    other.unlink()
    assert hubconf.alexnet(other.as_uri(), progress=False).top_layer is None  # from the folder


def test_a_download_that_is_no_checkpoint_is_not_kept(tmp_path, hub):
    bad = tmp_path / "checkpoint.pth.tar"
    bad.write_bytes(b"<html>moved</html>")
    with pytest.raises(UserError, match=r"not a (plain|PyTorch) checkpoint"):
        hubconf.alexnet(bad.as_uri(), progress=False)
    assert list(hub.iterdir()) == []


def test_a_file_is_read_and_what_was_asked_is_checked(released):
    path, _ = released
    assert hubconf.alexnet(path, sobel=True, num_clusters=12).arch == "alexnet"
    for call, message in (
        (lambda: hubconf.alexnet(path, sobel=False), "its sobel is True, not False"),
        (lambda: hubconf.alexnet(path, num_clusters=3), "its num_clusters is 12, not 3"),
        (lambda: hubconf.vgg16(str(path)), "its arch is alexnet, not vgg16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UserError, match="no such checkpoint"):
        hubconf.alexnet("missing.pth.tar")


def test_without_weights_it_is_random_with_sobel_and_without_a_head():
    net = hubconf.alexnet(seed=4)
    assert net.sobel is not None and net.top_layer is None and not net.training
    expected = models.build("alexnet", True, None, seed=4)
    assert torch.equal(net.features[0].weight, expected.features[0].weight)


def test_a_resnet_is_read_from_a_file_and_random_ones_are_in_colour(tmp_path):
    expected = models.build("resnet18", sobel=True, num_clusters=7, seed=3)
    checkpoint.save(tmp_path / "r.pth.tar", {"arch": "resnet18", "state_dict": expected.state_dict()})
    net = hubconf.resnet18(tmp_path / "r.pth.tar")
    assert net.arch == "resnet18" and net.sobel is not None and net.top_layer.out_features == 7
    assert torch.equal(net.layer4[1].conv2.weight, expected.layer4[1].conv2.weight) and not net.training
    with pytest.raises(ValueError, match="its arch is resnet18, not resnet50"):
        hubconf.resnet50(tmp_path / "r.pth.tar")
    fresh = hubconf.resnet50(num_clusters=5, seed=1)
    assert fresh.sobel is None and fresh.conv1.in_channels == 3 and fresh.top_layer.out_features == 5


NAMES = (
    "alexnet vgg16 vgg16wide vgg16folded resnet18 resnet18s resnet50 resnet50w2 resnet50w4 resnet50w5".split()
)


def test_each_entry_point_builds_its_network(monkeypatch):
    monkeypatch.setattr(models, "build", lambda arch, *rest: torch.nn.Flatten(arch))
    for name in NAMES:
        assert getattr(hubconf, name)().start_dim == name


def test_what_can_be_called_are_the_networks():
    """torch.hub.list shows every public name that can be called, torch.hub.help its docstring."""
    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == set(NAMES)
    for name in public:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name and "num_clusters (int)" in entry.__doc__
        assert list(inspect.signature(entry).parameters) == "weights sobel num_clusters seed progress".split()
