import os
import pickle

import numpy as np
import pytest

from tests.helpers import refuses
from training import logs

EPOCHS = [[[0, 2], [], [1, 70000]], [[1], [0, 2, 70000], []], [[], [], list(range(1000))]]


def read(path):
    with open(path, "rb") as file:
        return pickle.load(file)


def test_clusters_log_is_a_list_of_epochs_after_each_append(tmp_path):
    log = logs.ClusterLog(tmp_path / "clusters")
    for n, lists in enumerate(EPOCHS):
        log.append(lists)
        assert read(tmp_path / "clusters") == EPOCHS[: n + 1]
        assert log.size == os.path.getsize(tmp_path / "clusters")


def test_an_append_leaves_what_was_written_in_place(tmp_path):
    log = logs.ClusterLog(tmp_path / "clusters")
    log.append(EPOCHS[0])
    before = (tmp_path / "clusters").read_bytes()
    log.append(EPOCHS[2])
    assert (tmp_path / "clusters").read_bytes()[: len(before) - 1] == before[:-1]


def test_a_kill_between_the_writes_of_an_append_leaves_a_readable_pickle(tmp_path):
    """Whatever was written behind the STOP does not count until the STOP itself is replaced."""
    log = logs.ClusterLog(tmp_path / "clusters")
    log.append(EPOCHS[0])
    size = log.size
    with open(tmp_path / "clusters", "ab") as file:
        file.write(b"half of the next epoch")
    assert read(tmp_path / "clusters") == EPOCHS[:1]
    log = logs.ClusterLog(tmp_path / "clusters", size)
    log.append(EPOCHS[1])
    with open(tmp_path / "clusters", "rb") as file:
        assert pickle.load(file) == EPOCHS[:2]
        assert file.read() == b""


def test_continuing_from_an_earlier_epoch_cuts_the_later_ones(tmp_path):
    log = logs.ClusterLog(tmp_path / "clusters")
    sizes = []
    for lists in EPOCHS:
        log.append(lists)
        sizes.append(log.size)
    logs.ClusterLog(tmp_path / "clusters", sizes[0])
    assert read(tmp_path / "clusters") == EPOCHS[:1]
    with refuses("shorter"):
        logs.ClusterLog(tmp_path / "clusters", sizes[2])


def test_every_end_of_an_epoch_can_be_gone_on_from_and_nothing_else(tmp_path):
    log = logs.ClusterLog(tmp_path / "clusters")
    sizes = [log.size]
    for lists in EPOCHS:
        log.append(lists)
        sizes.append(log.size)
    whole = (tmp_path / "clusters").read_bytes()
    for n, size in enumerate(sizes):
        (tmp_path / "clusters").write_bytes(whole)
        logs.ClusterLog(tmp_path / "clusters", size)
        assert read(tmp_path / "clusters") == EPOCHS[:n]
    (tmp_path / "clusters").write_bytes(whole)
    for size in (0, 3, sizes[1] + 3):
        with refuses("no epoch ends"):
            logs.ClusterLog(tmp_path / "clusters", size)
    assert (tmp_path / "clusters").read_bytes() == whole


def test_log_lines_of_later_epochs_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in range(3):
        logs.append_line(path, {"epoch": epoch, "loss": 1.5})
    with open(path, "a") as file:
        file.write('{"epoch": 3, "lo')
    logs.keep_lines_before(path, 2)
    assert logs.read_lines(path) == [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": 1.5}]


def test_a_broken_line_does_not_take_those_behind_it_along(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [b'{"epoch": 0}', b"\xff\xfe", b"[1, 2]", b'{"epoch": "x"}', b'{"loss": 1}', b"[" * 5000]
    path.write_bytes(b"\n".join([*lines, b'{"epoch": 1}', b""]))
    assert logs.read_lines(path) == [{"epoch": 0}, {"epoch": 1}]


def test_assignments_are_a_table_that_any_path_fits_into(tmp_path):
    logs.write_assignments(
        tmp_path / "a.csv", ["a,b.jpg", 'c"d.jpg'], (np.array([1, 0]), np.array([0.5, 1 / 3], np.float32))
    )
    assert (tmp_path / "a.csv").read_text() == (
        'path,cluster,distance\n"a,b.jpg",1,0.5\n"c""d.jpg",0,0.333333\n'
    )


@pytest.mark.parametrize(
    "epoch, loss, word",
    [(5, 2.0, None), (5, 2.07, "stuck at log k"), (5, 3.8, "diverges"), (1, 3.8, None), (2, 2.3, "diverges")],
)
def test_a_loss_that_stays_or_explodes_is_told_with_the_way_to_turn(epoch, loss, word):
    """log 8 = 2.079."""
    said = logs.advice(epoch, loss, 2.079)
    assert (said is None) if word is None else (word in said)
    if word == "diverges":
        assert "lower --lr" in said
    elif word:
        assert "higher --lr" in said
