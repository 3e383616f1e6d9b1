"""Sums, gathers and shares over processes, against one process."""

import os

import numpy as np
import pytest
import torch

import distributed
from tests.ranks import error_of, own_rows, spawn
from util import UserError

SIZES = (2, 3)  # processes; one is this one


def on_rank(size):
    return find_rows(size, distributed.rank()) | {"error": error_of(distributed.on_main, fail)}


def find_rows(size, rank):
    """Rows gathered in pieces of a few."""
    distributed.CHUNK_BYTES, chunk_bytes = 100, distributed.CHUNK_BYTES
    found = {}
    for name, (whole, counts) in rows_of(size).items():
        mine = own_rows(whole, counts)
        mine.flags.writeable = False  # as a memory map may be
        found[name] = distributed.gather_rows(mine), distributed.all_gather_rows(mine)
    distributed.CHUNK_BYTES = chunk_bytes
    objects = distributed.gather_objects(rank), distributed.broadcast_object(f"of {rank}")
    tensor = torch.full((3,), rank + 1.0)
    distributed.broadcast_tensors([tensor])
    reduced = torch.full((2,), rank + 1.0)
    same = distributed.all_reduce(reduced) is reduced
    return {
        "rows": found,
        "objects": objects,
        "reduced": (same, reduced.tolist()),
        "tensor": tensor.tolist(),
        "share": distributed.share_of(35),
        "main": (distributed.on_main(os.getpid), os.getpid(), distributed.is_main()),
    }


def rows_of(size):
    """{name: (all rows, how many each rank holds)}."""
    whole = np.arange(105).reshape(35, 3)
    first_empty, some = ((0, 35), (34, 1)) if size == 2 else ((0, 10, 25), (10, 0, 25))
    return {
        "even": (whole, None),
        "last empty": (whole, first_empty[::-1]),
        "first empty": (whole, first_empty),
        "labels": (whole[:, 0].copy(), some),
        "cubes": (np.arange(35 * 8).reshape(35, 2, 2, 2).astype(np.float16), some),
        "truth": (whole % 3 == 0, None),
        "columns": (np.asfortranarray(whole.astype(np.uint16)), None),
        "nothing": (whole[:0], None),
    }


def fail():
    raise UserError("the disk is full")


@pytest.fixture(scope="module", params=SIZES)
def ranks(request):
    return spawn(on_rank, request.param, request.param)


def test_errors_are_raised_on_every_rank(ranks):
    assert [found["error"] for found in ranks] == ["the disk is full"] * len(ranks)


def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    for name, (whole, _) in rows_of(len(ranks)).items():
        np.testing.assert_array_equal(ranks[0]["rows"][name][0], whole)
        assert all(found["rows"][name][0] is None for found in ranks[1:])
        for found in ranks:
            np.testing.assert_array_equal(found["rows"][name][1], whole)
            assert found["rows"][name][1].dtype == whole.dtype


def test_values_come_to_every_rank(ranks):
    size = len(ranks)
    assert [i for found in ranks for i in found["share"]] == list(range(35))
    for rank, found in enumerate(ranks):
        assert found["objects"] == (list(range(size)), "of 0")
        assert found["reduced"] == (True, [size * (size + 1) / 2] * 2)
        assert found["tensor"] == [1, 1, 1]
        assert found["main"][0] == ranks[0]["main"][1] and found["main"][2] == (rank == 0)


def set_launcher(monkeypatch, **values):
    for name in distributed.LAUNCHER_SETS:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_all_that_a_launcher_sets_there_is_no_group(monkeypatch):
    set_launcher(monkeypatch, WORLD_SIZE="4")
    assert distributed.init("cpu") == torch.device("cpu") and distributed.world_size() == 1
    set_launcher(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    assert distributed.init("cpu") == torch.device("cpu") and distributed.world_size() == 1
    with pytest.raises(UserError, match="--device tpu"):
        distributed.init("tpu")


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 101])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_shares_are_consecutive_and_whole(n, size):
    parts = [distributed.share_of(n, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_the_identity():
    x = np.random.default_rng(8).standard_normal((51, 6)).astype(np.float32)
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [1, 2]
    assert distributed.gather_rows(x) is x and distributed.all_gather_rows(x) is x
    assert distributed.gather_objects("a") == ["a"] and distributed.broadcast_object("a") == "a"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.shutdown()
    assert distributed.share_of(5) == range(5) and distributed.on_main(len, "abc") == 3
