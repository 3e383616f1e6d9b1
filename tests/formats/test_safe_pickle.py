"""Pickles that attack: nothing is executed, and nothing is allocated on a file's word."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from formats import safe_pickle
from training.logs import ClusterLog
from util import UserError

ROOT = Path(safe_pickle.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "operations",
    [
        # a state for a function
        b"cnumpy.core.multiarray\nscalar\n}X\x04\x00\x00\x00callX\x01\x00\x00\x00xsb.",
        b"cnumpy.core.multiarray\nscalar\nN}X\x04\x00\x00\x00callX\x01\x00\x00\x00xs\x86b.",
        b"cnumpy\nndarray\n)R.",
        b"cnumpy\ndtype\n)\x81.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x0anumpy.core\x8c\x12multiarray._frombuffer\x93.",
        b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"Pid\n.",  # a persistent id
        b"\x82\x01.",  # an extension code
        b"r\xff\xff\xff\x7f.",  # a place in an empty memo
        b"K\x01j\x00\x00\x00\x40.",
        b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",  # 2^40 bytes that are not there
        b"\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"\x8d\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"T\xff\xff\xff\x7f.",
        b"\x95\x00\x00\x00\x00\x00\x01\x00\x00K\x01.",  # a frame of them
        b"\x8b\x00\x00\x00\x40.",  # a number of 2^30 bytes
        b"I" + b"9" * 1000 + b"\n.",
        b"\x8a\x11" + b"\x7f" * 17 + b".",
        b"cnumpy\nndarray\nq\x00K\x01\x85\x81.",
    ],
)
def test_hand_made_attacks_are_refused(tmp_path, operations):
    (tmp_path / "evil.pickle").write_bytes(operations)
    with pytest.raises(UserError, match=r"evil\.pickle: (refused|truncated)"):
        safe_pickle.load(tmp_path / "evil.pickle")


def load_in_little_memory(path):
    """(exit code, stderr) of a process that loads the file with half a GiB to take."""
    code = """
import resource, sys
from formats import safe_pickle
import util
resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29))
try:
    print(repr(safe_pickle.load(sys.argv[1]))[:100])
except util.UserError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("index", [b"r\x00\x00\x00\x40", b"p1073741824\n"])
def test_a_large_memo_index_takes_no_memory(tmp_path, index):
    path = tmp_path / "few.pickle"
    path.write_bytes(b"]" + index + b".")
    assert load_in_little_memory(path) == (0, "[]\n")


def test_text_that_is_copied_again_and_again_is_refused(tmp_path):
    path = tmp_path / "copies.pickle"
    text = b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
    again = b"h\x00h\x01R"  # _codecs.encode(text, "latin1")
    path.write_bytes(
        b"](c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01" + again * 10**5 + b"e."
    )
    code, said = load_in_little_memory(path)
    assert code == 1 and "refused, its pickle is more than plain data (it copies its text" in said


def test_a_number_of_any_size_can_be_told(tmp_path):
    path = tmp_path / "n.pickle"
    for number in (0, -1, 2**31, -(2**63), 2**100):
        for protocol in (0, 2, 4):
            path.write_bytes(pickle.dumps([number, True, False], protocol))
            assert safe_pickle.load(path) == [number, True, False]


def test_the_log_of_clusters_of_a_run_is_read_as_plain_lists(tmp_path):
    log = ClusterLog(tmp_path / "clusters")
    for epoch in ([[0, 2], [], [1]], [[1], [0, 70000], [2]]):
        log.append(epoch)
    assert safe_pickle.load(tmp_path / "clusters") == [[[0, 2], [], [1]], [[1], [0, 70000], [2]]]
