import itertools
import os
import pickle
import resource

import numpy as np
import pytest
import torch

import checkpoint
import models
from tests import legacy, tiny
from util import UserError


@pytest.fixture(scope="module")
def net():
    """A network whose batch-norm statistics are not the trivial ones."""
    net = models.build("alexnet", sobel=True, num_clusters=12, seed=5)
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))  # train mode: moves the statistics
    return net.eval()


def logits(net):
    with torch.no_grad():
        return net(torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64))


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("data_parallel", ["features", "all", None])
def test_files_of_the_authors_give_the_same_activations(tmp_path, net, data_parallel, optimizer):
    path = tmp_path / "released.pth.tar"
    legacy.write(path, legacy.authors_state(net, data_parallel, optimizer))
    loaded = checkpoint.load_model(path)
    assert (loaded.arch, loaded.top_layer.out_features) == ("alexnet", 12)
    assert torch.equal(logits(loaded), logits(net))


@pytest.mark.parametrize("data_parallel", ["features", "all", "both", None])
@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("head", [5, None])
def test_every_kind_of_file_that_was_ever_written_loads(tmp_path, data_parallel, sobel, head):
    """Names of DataParallel at either level, x optimiser or not, x batch counters or not, x three formats."""
    tiny.register()
    net = tiny.tiny(sobel, head, seed=2)
    net(torch.randn(4, 3, 32, 32))
    net.eval()
    x = torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32)
    path = tmp_path / "checkpoint.pth.tar"
    for optimizer, counters in itertools.product([True, False], repeat=2):
        state = legacy.authors_state(net, data_parallel, optimizer, counters)
        for write in (
            lambda state: legacy.write(path, state, version=1),
            lambda state: legacy.write(path, state, version=2),
            lambda state: torch.save(state, path, _use_new_zipfile_serialization=False),
            lambda state: torch.save(state, path),
        ):
            write(state)
            loaded = checkpoint.load_model(path)
            assert (loaded.arch, loaded.sobel is not None, loaded.training) == ("tiny", sobel, False)
            assert (loaded.top_layer is None) == (head is None)
            with torch.no_grad():
                for name, value in net.activations(x, net.activation_names).items():
                    assert torch.equal(loaded.activations(x, [name])[name], value), name


def test_a_legacy_file_that_would_run_code_is_refused(tmp_path, net):
    """The malicious object among Python 2's: after the magic number, beside good weights."""
    witness, path = tmp_path / "witness", tmp_path / "released.pth.tar"
    state = legacy.authors_state(net, optimizer=False) | {"epoch": Malicious(f"touch {witness}")}
    legacy.write(path, state)
    with pytest.raises(UserError, match=r"released\.pth\.tar: refused, .*system"):
        checkpoint.load_model(path)
    assert not witness.exists()


def test_a_file_without_head_sobel_or_arch_loads(tmp_path):
    net = models.build("vgg16", sobel=False, seed=1).eval()
    checkpoint.save(tmp_path / "bare.pth.tar", dict(net.state_dict()))
    loaded = checkpoint.load_model(tmp_path / "bare.pth.tar")
    assert loaded.arch == "vgg16" and loaded.sobel is None and loaded.top_layer is None
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "witness"
    new, old, plain = tmp_path / "new.tar", tmp_path / "old.tar", tmp_path / "plain.tar"
    bad = {"state_dict": {}, "x": Malicious(f"touch {witness}")}
    torch.save(bad, new)
    torch.save(bad, old, _use_new_zipfile_serialization=False)
    plain.write_bytes(pickle.dumps(bad))
    for path in (new, old, plain):
        with pytest.raises(UserError, match=path.name):
            checkpoint.read(path)
    with pytest.raises(UserError, match="system"):
        checkpoint.read(new)
    assert not witness.exists()


def test_a_truncated_file_says_so(tmp_path, net):
    good = tmp_path / "good.tar"
    legacy.write(good, legacy.authors_state(net))
    checkpoint.save(tmp_path / "ours.tar", {"state_dict": net.state_dict()})
    for path in (good, tmp_path / "ours.tar"):
        content = path.read_bytes()
        for part in (0, 100, len(content) // 2, len(content) - 50):
            path.write_bytes(content[:part])
            with pytest.raises(UserError, match=r"truncated|refused"):
                checkpoint.read(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "missing.tar")


def test_weights_that_do_not_fit_name_the_parameter(tmp_path, net):
    weights = dict(net.state_dict())
    del weights["features.4.bias"]
    checkpoint.save(tmp_path / "a.tar", {"arch": "alexnet", "state_dict": weights})
    with pytest.raises(UserError, match=r"lacks features\.4\.bias"):
        checkpoint.load_model(tmp_path / "a.tar")
    weights = dict(net.state_dict()) | {"features.4.bias": torch.zeros(3)}
    checkpoint.save(tmp_path / "b.tar", {"arch": "alexnet", "state_dict": weights})
    with pytest.raises(UserError, match=r"features\.4\.bias is \(3,\)"):
        checkpoint.load_model(tmp_path / "b.tar")
    checkpoint.save(tmp_path / "c.tar", {"state_dict": {"fc.weight": torch.zeros(3)}})
    with pytest.raises(UserError, match="not a DeepCluster network"):
        checkpoint.load_model(tmp_path / "c.tar")
    torch.save([1, 2], tmp_path / "d.tar")
    with pytest.raises(UserError, match="holds a list"):
        checkpoint.load_model(tmp_path / "d.tar")


def test_what_is_refused_is_named_and_odd_contents_are_one_line(tmp_path):
    tiny.register()
    weights, path = tiny.tiny(True, 5, seed=1).state_dict(), tmp_path / "odd.tar"
    for state, message in (
        ({"epoch": np.float64(3), "state_dict": weights}, r"refused, .*asks for numpy\S*multiarray\.scalar"),
        ({"arch": ["tiny"], "state_dict": weights}, "unknown; choose one of"),
        ({"arch": "tiny", "state_dict": {1: torch.zeros(1)}}, "no state_dict of tensors"),
        (
            {"arch": "tiny", "state_dict": weights | {"top_layer.bias": torch.tensor(1.0)}},
            r"top_layer\.\w+ is ",
        ),
    ):
        torch.save(state, path)
        with pytest.raises(UserError, match=message):
            checkpoint.load_model(path)


def test_init_takes_everything_but_the_head(tmp_path, net):
    path = tmp_path / "released.tar"
    legacy.write(path, legacy.authors_state(net, optimizer=False))
    fresh = models.build("alexnet", sobel=True, num_clusters=3, seed=9)
    head = fresh.top_layer.weight.clone()
    checkpoint.init_weights(fresh, path)
    assert torch.equal(fresh.features[5].running_mean, net.features[5].running_mean)
    assert torch.equal(fresh.classifier[4].weight, net.classifier[4].weight)
    assert torch.equal(fresh.top_layer.weight, head)
    with pytest.raises(UserError, match="with Sobel, the run is alexnet without Sobel"):
        checkpoint.init_weights(models.build("alexnet", sobel=False, seed=1), path)


def test_a_write_that_fails_is_one_line_and_leaves_the_last_good_file(tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the middle of a tensor."""
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint.save(path, {"epoch": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            checkpoint.save(path, {"epoch": 2, "weights": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.read(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth.tar"]
