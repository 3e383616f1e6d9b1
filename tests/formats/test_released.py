"""Released pickles: every plausible form, nothing executed; the writers, read by pickle itself."""

import os
import pickle
import pickletools
import subprocess
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from formats import released
from tests import legacy
from util import UserError

PAIRS = [("n01440764/a.JPEG", 7), ("n01440764/b.JPEG", 0), ("n02/été.JPEG", 9999)]


def python2_assignments(pairs, numpy_ints):
    """The bytes that Python 2's cPickle gives for [(str, int or numpy.int64)], protocol 2."""
    content = b"\x80\x02]("
    for path, cluster in pairs:
        raw = path.encode()
        content += b"U" + bytes([len(raw)]) + raw
        if numpy_ints:
            content += b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNN"
            content += (
                b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x08" + cluster.to_bytes(8, "little") + b"\x86R"
            )
        else:
            content += b"J" + cluster.to_bytes(4, "little")
        content += b"\x86"
    return content + b"e."


@pytest.mark.parametrize("numpy_ints", [False, True])
def test_assignments_of_python_2_are_read(tmp_path, numpy_ints):
    path = tmp_path / "alexnet_cluster_assignment.pickle"
    path.write_bytes(python2_assignments(PAIRS, numpy_ints))
    with open(path, "rb") as file:  # the file is what Python 2 writes: pickle itself agrees
        assert [int(c) for _, c in pickle.load(file, encoding="latin1")] == [7, 0, 9999]
    pairs = released.read_assignments(path)
    assert pairs == PAIRS and all(type(cluster) is int for _, cluster in pairs)


@pytest.mark.parametrize("protocol", range(6))
def test_assignments_of_python_3_with_numpy_ints_are_read(tmp_path, protocol):
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps([[p, np.int32(c)] for p, c in PAIRS], protocol))
    assert released.read_assignments(path) == PAIRS


def test_written_assignments_are_plain_pickles_of_protocol_2(tmp_path):
    path = tmp_path / "out.pickle"
    released.write_assignments_pickle(path, iter([(p, np.int64(c)) for p, c in PAIRS]))
    content = path.read_bytes()
    assert pickle.loads(content) == pickle.loads(content, encoding="latin1") == PAIRS
    operations = [operation for operation, _, _ in pickletools.genops(content)]
    assert max(operation.proto for operation in operations) == 2
    assert not any(operation.name in ("GLOBAL", "REDUCE") for operation in operations)
    assert released.read_assignments(path) == PAIRS


def test_python_2_reads_what_is_written(tmp_path):
    python2 = sorted(Path.home().glob(".pyenv/versions/2.7*/bin/python"))
    if not python2:
        pytest.skip("no Python 2 on this machine")
    path = tmp_path / "out.pickle"
    released.write_assignments_pickle(path, PAIRS)
    code = "import pickle, sys; b = pickle.load(open(sys.argv[1], 'rb')); print(b[1], type(b[2]), b[2][1])"
    out = subprocess.run([python2[0], "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "((u'n01440764/b.JPEG', 0), <type 'tuple'>, 9999)"


def test_wrong_assignments_say_what_was_found(tmp_path):
    path = tmp_path / "a.pickle"
    for content, found in (
        ({"a": 1}, "found a dict of 1, the first a tuple"),
        ([], "an empty list"),
        ([("a", 1), ("b", -1)], r"found a tuple \(text, int -1\) at position 1"),
        ([("a", 1), ("b", 1.5)], "float 1.5"),
        ([("a", 1, 2)], "at position 0"),
        ([["a", "b"]], "at position 0"),
        ([(3, 1)], "at position 0"),
        ([("a", 2**40)], "at position 0"),
        ("text", "found text"),
        ([[1, 2], [3]], "at position 0"),  # EXP/clusters
    ):
        path.write_bytes(pickle.dumps(content, 2))
        with pytest.raises(UserError, match=found) as error:
            released.read_assignments(path)
        assert "a.pickle: " in str(error.value) and "\n" not in str(error.value)


FEATURES = np.linspace(-1, 1, 3 * 8, dtype=np.float32).reshape(3, 8)
NAMES = ["a/1.jpg", "a/2.jpg", "b/é.jpg"]
FORMS = {
    "array": (FEATURES, None),
    "fortran": (np.asfortranarray(FEATURES), None),
    "pairs": (list(zip(NAMES, FEATURES)), NAMES),
    "two_pairs": (list(zip(NAMES, FEATURES))[:2], NAMES[:2]),
    "one_pair": ([[NAMES[2], FEATURES[0]]], NAMES[2:]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_both_forms_of_features_are_read(tmp_path, form, protocol):
    content, expected = FORMS[form]
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    names, features = released.read_features(path)
    assert names == expected and features.dtype == np.float32
    assert np.array_equal(features, FEATURES[: len(features)])
    assert len(features) == {"two_pairs": 2, "one_pair": 1}.get(form, 3)


def test_big_endian_doubles_are_read(tmp_path):
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(FEATURES.astype(">f8"), 2))
    assert np.array_equal(released.read_features(tmp_path / "f.pkl")[1], FEATURES.astype(float))


def test_other_features_say_what_was_found(tmp_path):
    path = tmp_path / "f.pkl"
    for content, found in (
        (FEATURES[0], r"found an array \(8,\) of f4"),
        (FEATURES.astype(int), "of i8"),
        (FEATURES[:0], r"array \(0, 8\)"),
        ([], "found a list of 0"),
        (list(FEATURES), r"found an array \(8,\) of f4 at position 0"),
        (dict(zip(NAMES, FEATURES)), "found a dict of 3"),
        ((NAMES, FEATURES), r"found a tuple \(a list .*an array \(3, 8\)"),
        ({}, "found a dict of 0"),
        (set(), "refused|found"),
        ("text", "found text"),
        ([("a", 1), ("b", 2), ("c", 3)], r"a tuple \(text, int 1\)"),
        ([("a", FEATURES[0]), ("b", FEATURES[0, :5])], r"array \(5,\) of f4\) at position 1"),
        ([("a", FEATURES)], r"array \(3, 8\) of f4\) at position 0"),
        ([(1, FEATURES[0])], "int 1"),
        ({"model": {"layer": 1}}, "found a dict of 1"),
        ([("a", FEATURES[0]), "text"], "found text at position 1"),
        ([("a\ud800", FEATURES[0])], r"found a tuple .str 'a.+ud800'"),
    ):
        path.write_bytes(pickle.dumps(content, 2))
        with pytest.raises(UserError, match=found) as error:
            released.read_features(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("read", [released.read_assignments, released.read_features])
def test_nothing_in_a_file_is_executed_and_what_was_refused_is_named(tmp_path, protocol, read):
    witness, path = tmp_path / "witness", tmp_path / "evil.pickle"
    for call, arguments, name in (
        (os.system, (f"touch {witness}",), "posix.system"),
        (eval, (f"open({str(witness)!r}, 'w')",), r"(__builtin__|builtins)\.eval"),
        (np.load, ("x.npy",), r"numpy.*load"),
        (getattr, ("text", "encode"), r"(__builtin__|builtins)\.getattr"),
        (np.dtype, ("O8",), "an array of O8"),
    ):
        path.write_bytes(pickle.dumps([("a.jpg", 1), ("b.jpg", Evil(call, *arguments))], protocol))
        with pytest.raises(UserError, match=rf"evil\.pickle: refused, .*{name}"):
            read(path)
    assert not witness.exists()


def test_lying_arrays_are_refused(tmp_path):
    """Arrays whose shape, bytes or dtype do not belong together must not become memory that is not theirs."""
    good = pickle.dumps(FEATURES, 2, fix_imports=True)
    path = tmp_path / "f.pkl"
    for old, new in (
        (b"K\x03K\x08\x86", b"K\x03K\x09\x86"),
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00O8"),
    ):
        assert good.count(old) == 1
        path.write_bytes(good.replace(old, new))
        with pytest.raises(UserError, match=r"f\.pkl: (refused|truncated)"):
            released.read_features(path)
    path.write_bytes(pickle.dumps(np.zeros(3, dtype=[("a", "f4")]), 2))
    with pytest.raises(UserError, match="refused"):
        released.read_features(path)


def test_truncated_empty_missing_and_foreign_files_say_so(tmp_path):
    path = tmp_path / "f.pkl"
    content = pickle.dumps(FORMS["pairs"][0], 2)
    for part in (0, 1, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:part])
        with pytest.raises(UserError, match=r"f\.pkl: truncated or not a pickle"):
            released.read_features(path)
    for foreign in (b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", os.urandom(50), b"path,cluster\n"):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match=r"f\.pkl: "):
            released.read_assignments(path)
    with pytest.raises(UserError, match="No such file"):
        released.read_features(tmp_path / "missing")


def written(path, count=3):
    with released.FeaturesPickle(path) as features:
        for name, row in list(zip(NAMES, FEATURES))[:count]:
            features.append(name, row)


def test_streamed_features_are_a_pickle_of_pairs_of_path_and_array(tmp_path):
    path = tmp_path / "f.pkl"
    written(path)
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("error")  # numpy's names of 2018 must not warn
        pairs = pickle.load(file, encoding="latin1")
    assert [name for name, _ in pairs] == NAMES and all(isinstance(pair, tuple) for pair in pairs)
    assert all(type(row) is np.ndarray and row.dtype == np.float32 for _, row in pairs)
    assert np.array_equal(np.stack([row for _, row in pairs]), FEATURES)
    assert max(operation.proto for operation, _, _ in pickletools.genops(path.read_bytes())) == 2
    names, features = released.read_features(path)
    assert names == NAMES and np.array_equal(features, FEATURES)
    assert [p.name for p in tmp_path.iterdir()] == ["f.pkl"]


def test_streamed_features_go_on_after_a_kill(tmp_path):
    written(tmp_path / "whole.pkl")
    path = tmp_path / "f.pkl"
    first = released.FeaturesPickle(path)
    first.append(NAMES[0], FEATURES[0])
    size = first.sync()
    first.append("lost", FEATURES[2])
    first.file.flush()
    first.file.close()  # killed: no STOP, an entry that nobody remembers
    with released.FeaturesPickle(path, size) as rest:
        for name, row in list(zip(NAMES, FEATURES))[1:]:
            rest.append(name, row)
    assert path.read_bytes() == (tmp_path / "whole.pkl").read_bytes()
    with pytest.raises(UserError, match=r"cannot write .*f\.pkl\.part"):
        released.FeaturesPickle(path, size)


def test_an_error_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "f.pkl"
    written(path, 1)
    with pytest.raises(KeyError), released.FeaturesPickle(path) as features:
        features.append("x", FEATURES[0])
        raise KeyError
    assert released.read_features(path)[0] == NAMES[:1]


def test_streaming_needs_constant_memory(tmp_path):
    row = np.ones(4096, dtype=np.float32)

    def peak(count):
        tracemalloc.start()
        with released.FeaturesPickle(tmp_path / "f.pkl") as features:
            for i in range(count):
                features.append(f"{i}.jpg", row)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(20), peak(400)  # 6.5 MB of features
    assert many < few + 100_000


def test_reading_pairs_holds_the_features_twice_at_most(tmp_path):
    path = tmp_path / "f.pkl"
    row = np.ones(4096, dtype=np.float32)
    with released.FeaturesPickle(path) as features:
        for i in range(600):
            features.append(f"{i}.jpg", row)
    tracemalloc.start()
    released.read_features(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2.2 * 600 * row.nbytes


def test_the_command_line_prints_and_converts(tmp_path, capsys):
    path = tmp_path / "a.pickle"
    path.write_bytes(python2_assignments([*PAIRS, ("c,d.JPEG", 7)], True))
    parse = released.get_parser().parse_args
    released.main(parse([str(path), "--csv", str(tmp_path / "a.csv")]))
    out = capsys.readouterr().out
    assert "4 images in 3 clusters (ids up to 9999); sizes 1 to 2, median 1" in out
    assert "n01440764/b.JPEG  0" in out
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert lines == [
        "path,cluster",
        "n01440764/a.JPEG,7",
        "n01440764/b.JPEG,0",
        "n02/été.JPEG,9999",
        '"c,d.JPEG",7',
    ]
    written(tmp_path / "f.pkl")
    released.main(parse([str(tmp_path / "f.pkl")]))
    assert "features (3, 8) of float32, with image names" in capsys.readouterr().out
    with pytest.raises(UserError, match="--csv: "):
        released.main(parse([str(tmp_path / "f.pkl"), "--csv", "x"]))


def test_text_of_python_2_pickler_matches_ours(tmp_path):
    """tests/legacy.py's Python-2 pickler, used for checkpoints, writes what is read here as well."""
    with open(tmp_path / "a.pickle", "wb") as file:
        legacy.Python2Pickler(file, []).dump(PAIRS[:2])
    assert released.read_assignments(tmp_path / "a.pickle") == PAIRS[:2]
