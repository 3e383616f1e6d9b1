import os
import pickle
import resource

import pytest
import torch

import checkpoint
import models
from tests import legacy
from util import UserError


@pytest.fixture(scope="module")
def net():
    """A network whose batch-norm statistics are not the trivial ones."""
    net = models.build("alexnet", sobel=True, num_clusters=12, seed=5)
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))  # train mode: moves the statistics
    return net.eval()


def test_a_legacy_file_that_would_run_code_is_refused(tmp_path, net):
    """The malicious object among Python 2's: after the magic number, beside good weights."""
    witness, path = tmp_path / "witness", tmp_path / "released.pth.tar"
    state = legacy.authors_state(net, optimizer=False) | {"epoch": Malicious(f"touch {witness}")}
    legacy.write(path, state)
    with pytest.raises(UserError, match=r"released\.pth\.tar: refused, .*system"):
        checkpoint.read(path)
    assert not witness.exists()


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
