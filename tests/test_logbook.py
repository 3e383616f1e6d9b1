import os
import pickle

import logbook
import pytest

from util import UserError

EPOCHS = [[[0, 2], [], [1, 70000]], [[1], [0, 2, 70000], []], [[], [], list(range(1000))]]


def test_clusters_log_is_a_list_of_epochs_after_each_append(tmp_path):
    log = logbook.ClusterLog(tmp_path / "clusters")
    for n, lists in enumerate(EPOCHS):
        log.append(lists)
        with open(tmp_path / "clusters", "rb") as file:
            assert pickle.load(file) == EPOCHS[: n + 1]
        assert log.size == os.path.getsize(tmp_path / "clusters")


def test_an_append_leaves_what_was_written_in_place(tmp_path):
    log = logbook.ClusterLog(tmp_path / "clusters")
    log.append(EPOCHS[0])
    before = (tmp_path / "clusters").read_bytes()
    log.append(EPOCHS[2])
    assert (tmp_path / "clusters").read_bytes()[: len(before) - 1] == before[:-1]


def test_a_kill_between_the_writes_of_an_append_leaves_a_readable_pickle(tmp_path):
    """Whatever was written behind the STOP does not count until the STOP itself is replaced."""
    log = logbook.ClusterLog(tmp_path / "clusters")
    log.append(EPOCHS[0])
    size = log.size
    with open(tmp_path / "clusters", "ab") as file:
        file.write(b"half of the next epoch")
    with open(tmp_path / "clusters", "rb") as file:
        assert pickle.load(file) == EPOCHS[:1]
    log = logbook.ClusterLog(tmp_path / "clusters", size)
    log.append(EPOCHS[1])
    with open(tmp_path / "clusters", "rb") as file:
        assert pickle.load(file) == EPOCHS[:2]
        assert file.read() == b""


def test_continuing_from_an_earlier_epoch_cuts_the_later_ones(tmp_path):
    log = logbook.ClusterLog(tmp_path / "clusters")
    sizes = []
    for lists in EPOCHS:
        log.append(lists)
        sizes.append(log.size)
    logbook.ClusterLog(tmp_path / "clusters", sizes[0])
    with open(tmp_path / "clusters", "rb") as file:
        assert pickle.load(file) == EPOCHS[:1]
    with pytest.raises(UserError, match="shorter"):
        logbook.ClusterLog(tmp_path / "clusters", sizes[2])


def test_log_lines_of_later_epochs_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in range(3):
        logbook.append_line(path, {"epoch": epoch, "loss": 1.5})
    with open(path, "a") as file:
        file.write('{"epoch": 3, "lo')
    logbook.keep_lines_before(path, 2)
    assert logbook.read_lines(path) == [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": 1.5}]
