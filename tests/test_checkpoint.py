import os
import pickle
import resource
import tracemalloc
import zipfile

import numpy as np
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
    assert checkpoint.read(good)["epoch"] == 101
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


# ---------------------------------------------------------------------------------------- damaged, hostile


def test_a_file_of_python_2_with_its_optimiser_is_read(tmp_path):
    """64-bit ids, which Python 2 wrote as opcode INT with decimal text; torch's reader lacks it."""
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(legacy.PYTHON2_WITH_OPTIMISER)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported operand 73"):
        torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.read(path)
    assert (state["epoch"], state["arch"]) == (7, "alexnet") and isinstance(state["state_dict"], dict)
    weight = state["state_dict"]["top_layer.bias"]
    assert weight.dtype == torch.float32 and weight.tolist() == [1.0, -2.0]
    (group,) = state["optimizer"]["param_groups"]
    assert group == {"lr": 0.05, "nesterov": False, "params": [140000000000000]}
    assert state["optimizer"]["state"][140000000000000]["momentum_buffer"].tolist() == [[0.5, 3.0]]


def test_any_flipped_bit_of_the_numbers_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    state = {"w": torch.randn(40, 50), "v": torch.arange(500), "epoch": 3}
    checkpoint.save(path, state)
    content = path.read_bytes()
    for name in ("w", "v"):
        start = content.index(state[name].numpy().tobytes())
        for at in (start, start + 777, start + state[name].nbytes - 1):
            flipped = bytearray(content)
            flipped[at] ^= 4
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=r"damaged .*\(archive/data/\d is not what .* CRC32"):
                checkpoint.read(path)
            assert checkpoint.read(path, peek=True)["epoch"] == 3  # which reads no numbers
    path.write_bytes(content)
    assert torch.equal(checkpoint.read(path)["w"], checkpoint.read(path, peek=True)["w"])
    assert torch.equal(checkpoint.read(path)["w"], state["w"])


def test_storages_are_shared_and_views_are_views(tmp_path):
    base = torch.arange(12.0)
    state = {"a": base, "b": base[2:8].view(2, 3).T, "empty": torch.zeros(0, 3), "one": torch.tensor(5),
             "half": torch.ones(3, dtype=torch.bfloat16), "flags": torch.tensor([True, False])}  # fmt: skip
    for zipped in (True, False):
        torch.save(state, tmp_path / "c.tar", _use_new_zipfile_serialization=zipped)
        for peek in (True, False):
            found = checkpoint.read(tmp_path / "c.tar", peek)
            for name, value in state.items():
                assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
            assert found["b"].stride() == (1, 3)
            found["a"][2] = -1
            assert found["b"][0, 0] == -1


def rezip(path, change, **options):
    """Write the entries of the zip file again, each changed by change(name, content)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def peak_of(call):
    """The most that Python's objects take during call(), in bytes."""
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_a_small_file_that_would_become_large_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.tar"
    checkpoint.save(path, {"w": torch.zeros(1)})
    rezip(
        path,
        lambda name, content: bytes(2**28) if "/data/" in name else content,
        compression=zipfile.ZIP_DEFLATED,
    )

    def read():
        with pytest.raises(UserError, match=r"bomb\.tar: refused, .*compressed"):
            checkpoint.read(path)

    assert path.stat().st_size < 2**20 and peak_of(read) < 2**21


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_other_kinds_or_false_sizes_are_one_line(tmp_path, zipped):
    path = tmp_path / "odd.tar"
    for value, message in (
        (torch.zeros(3, device="meta"), "_rebuild_meta_tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (torch.ones(3, dtype=torch.complex64), "Complex"),
        (torch.ones(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(1).expand(2**31, 2**31), f"a tensor of {2**62} elements where there are 1"),
        (torch.float32, "asks for torch.float32"),
        ({1, 2}, "asks for"),
    ):
        torch.save({"w": value}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=rf"odd\.tar: refused, .*{message}") as error:
            checkpoint.read(path)
        assert "\n" not in str(error.value)


def test_a_storage_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "long.tar"
    torch.save({"w": torch.zeros(77)}, path)
    long = b"\x8a\x05" + (2**33).to_bytes(5, "little")  # LONG1 in place of BININT1 77
    rezip(
        path,
        lambda name, content: content.replace(b"K\x4dt", long + b"t") if name.endswith(".pkl") else content,
    )
    with pytest.raises(UserError, match=rf"it says {2**33} elements of an entry of 308 bytes"):
        checkpoint.read(path)
    torch.save({"w": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x4dNt", long + b"Nt"))
    with pytest.raises(UserError, match="its tensors are larger than the file"):
        checkpoint.read(path)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = tmp_path / "c.tar"
    checkpoint.save(path, {})

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.tensor_files, "read", denied)
    with pytest.raises(UserError, match=r"c\.tar: Permission denied$"):
        checkpoint.read(path)


def test_garbage_in_any_place_is_one_line(tmp_path, net):
    """A few hundred files with random bytes changed: read, or refused in a line; never anything else."""
    path = tmp_path / "c.tar"
    rng = np.random.default_rng(0)
    for write in (lambda: torch.save({"w": torch.ones(9), "n": {"a": [1, 2.5, "x"]}}, path),
                  lambda: path.write_bytes(legacy.PYTHON2_WITH_OPTIMISER)):  # fmt: skip
        write()
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(150):
            changed = content.copy()
            changed[rng.integers(0, len(content), rng.integers(1, 6))] = rng.integers(0, 256)
            path.write_bytes(changed.tobytes())
            try:
                assert isinstance(checkpoint.read(path), dict)
            except UserError as error:
                assert "\n" not in str(error) and str(error).startswith(str(path))
