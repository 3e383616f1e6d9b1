"""EXP/results.json: evaluators side by side, files that are something else."""

import io
import json
import sys

import pytest

from evaluation import results
from util import UserError


def test_protocol_is_printed_and_stands_beside_the_results_of_other_evaluators(tmp_path, capsys):
    results.report(tmp_path / "new", "knn", {"k": 20}, {"top-1": 50.0})
    results.report(tmp_path / "new", "linear", {"data": "here", "lr": 0.1}, [1])
    results.report(tmp_path / "new", "linear", {"data": "here", "lr": 0.2}, [2])
    written = json.loads((tmp_path / "new/results.json").read_text())
    assert written == results.read(tmp_path / "new")
    assert written["knn"] == {"protocol": {"k": 20}, "results": {"top-1": 50.0}, "command": sys.argv}
    assert written["linear"]["results"] == [2]
    out = capsys.readouterr().out
    assert f"linear protocol: data here, lr 0.1\nresults in {tmp_path}/new/results.json\n" in out


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b"3", b"[" * 100_000])
def test_file_of_something_else_is_named_and_left_as_it_is(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    for call in (lambda: results.read(tmp_path), lambda: results.report(tmp_path, "knn", {}, 1)):
        with pytest.raises(UserError, match=r"results\.json: not valid JSON .*; move it away"):
            call()
    assert (tmp_path / "results.json").read_bytes() == content


def test_nothing_there_is_no_result(tmp_path):
    assert results.read(tmp_path) == {}


def test_terminal_that_lacks_a_character_gets_it_escaped(tmp_path, monkeypatch):
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="ascii"))
    results.report(tmp_path, "knn", {"data": "Bäume"}, 1)
    sys.stdout.flush()
    assert bytes_out.getvalue().startswith(b"knn protocol: data B\\xe4ume\n")
