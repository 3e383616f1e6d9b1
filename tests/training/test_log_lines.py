"""log.jsonl read back, whatever stands in it."""

import json

import pytest

from training import logs

BROKEN = [
    b'{"epoch": 1, "lo',
    b"[1, 2]",
    b"null",
    b'{"loss": 3.0}',
    b'{"epoch": "1"}',
    b'{"epoch": true}',
    b'{"epoch": -1}',
    b'{"epoch": 1.5}',
    b'{"epoch": 1, "name": "\xff"}',
    b"[" * 100_000,
    b'{"epoch": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_named_and_those_around_it_count(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + line + b'\n{"epoch": 2}\n')
    assert logs.check_lines(path) == ([{"epoch": 0}, {"epoch": 2}], [2])


def test_lines_of_later_epochs_and_broken_ones_are_dropped_where_a_run_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"epoch": epoch, "loss": 1.5}) for epoch in range(4)]
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[1:], '{"epoch": 4, "lo']))
    logs.keep_lines_before(path, 2)
    assert path.read_text() == lines[0] + "\n" + lines[1] + "\n"
