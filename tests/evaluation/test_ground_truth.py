"""evaluation/ground_truth.py: databases and queries, bad files by name, pickles of every kind."""

import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evaluation import ground_truth
from formats import safe_pickle
from tests.cities import make_city, truth_of
from util import UserError

# -------------------------------------------------------------------------------- classic


@pytest.fixture
def city(tmp_path) -> Path:
    """A small Oxford that a test may damage."""
    return make_city(tmp_path / "Oxford", ["cat", "coins"], 0)


def read(city: Path) -> list[ground_truth.Query]:
    return ground_truth.read_queries(city, ground_truth.list_database(city))


def read_revisited(path: Path, known: list[str]) -> tuple[list[str], list[ground_truth.Query]]:
    """As eval_retrieval.py does."""
    return ground_truth.revisited_truth(path, safe_pickle.load(path, encoding="latin1"), known)


def test_ground_truth_is_read(city):
    query = read(city)[0]
    assert (query.name, query.image) == ("cat_1", "cat_000000")  # without oxc1_
    assert query.box == (14.6, 11.2, 131.4, 101.2)
    assert query.lists["good"] == ["cat_000000", "cat_000001", "cat_000002"]
    assert (query.lists["ok"], query.lists["junk"]) == (["cat_000004"], ["cat_000003"])


def test_bad_ground_truth_is_refused_by_name(city):
    lab = city / "lab"
    (lab / "cat_1_junk.txt").write_text("cat_000003\nnowhere_000001\n")
    with pytest.raises(UserError, match=r"cat_1_junk\.txt: lists the image nowhere_000001, which is absent"):
        read(city)
    (lab / "cat_1_junk.txt").unlink()
    with pytest.raises(UserError, match=r"cat_1_junk\.txt is missing"):
        read(city)
    (lab / "cat_1_junk.txt").touch()
    for text in ("", "cat_000000 1 2 3", "cat_000000 1 2 3 four", "cat_000000 1 2 nan 4"):
        (lab / "cat_1_query.txt").write_text(text)
        with pytest.raises(UserError, match=r"cat_1_query\.txt: expected one line"):
            read(city)
    (lab / "cat_1_query.txt").write_text("oxc1_nobody 1 2 3 4")
    with pytest.raises(UserError, match="lists the image nobody"):
        read(city)
    (lab / "cat_1_query.txt").write_text("cat_000000 1 2 3 4")
    (lab / "cat_1_ok.txt").write_text("")
    (lab / "cat_1_good.txt").write_text("")
    with pytest.raises(UserError, match="no right answer"):
        read(city)


def test_missing_folders_and_empty_query_lists_are_refused(city):
    for file in (city / "lab").glob("*_query.txt"):
        file.unlink()
    with pytest.raises(UserError, match="holds no query"):
        read(city)
    (city / "lab").rename(city / "away")
    with pytest.raises(UserError, match="lab/ is missing in"):
        read(city)
    (city / "jpg").rename(city / "images")
    with pytest.raises(UserError, match="jpg/ is missing in"):
        ground_truth.list_database(city)


def test_corrupt_files_of_paris_are_left_out(city):
    assert len(ground_truth.CORRUPT) == 20
    (city / "jpg/paris_louvre_000136.jpg").write_bytes(b"\xff\xd8\xff broken")
    good = city / "lab/cat_1_good.txt"
    good.write_text(good.read_text() + "paris_louvre_000136\nparis_triomphe_000867\n")
    assert "paris_louvre_000136" not in ground_truth.list_database(city)
    assert read(city)[0].lists["good"] == ["cat_000000", "cat_000001", "cat_000002"]


def test_images_in_sub_folders_are_found_and_double_names_refused(city):
    (city / "jpg/more").mkdir()
    (city / "jpg/cat_000000.jpg").rename(city / "jpg/more/cat_000000.jpg")
    assert ground_truth.list_database(city)["cat_000000"] == city / "jpg/more/cat_000000.jpg"
    (city / "jpg/more/cat_000001.jpg").write_bytes((city / "jpg/cat_000001.jpg").read_bytes())
    with pytest.raises(UserError, match="same name"):
        ground_truth.list_database(city)


# -------------------------------------------------------------------------------- revisited


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap", [list, np.array, lambda x: np.array(x, ">i4"), lambda x: [np.int64(i) for i in x]]
)
def test_ground_truth_pickles_of_every_kind_are_read(city, tmp_path, protocol, wrap):
    queries, names = read(city), list(ground_truth.list_database(city))
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(truth_of(queries, names, wrap), protocol))
    database, revisited = read_revisited(path, names)
    assert "cat_000000" not in database and len(database) == len(names) - 2
    assert revisited[0].box == queries[0].box
    assert revisited[0].lists == {
        "easy": ["cat_000001", "cat_000002"], "hard": ["cat_000004"], "junk": ["cat_000003"],
    }  # fmt: skip


PYTHON_2 = b"""(dp0
S'imlist'
p1
(lp2
S'a'
aS'b'
asS'qimlist'
p3
(lp4
S'b'
asS'gnd'
p5
(lp6
(dp7
S'bbx'
(lp8
F1.5
aF2
aF3
aF4
asS'easy'
cnumpy.core.multiarray
_reconstruct
(cnumpy
ndarray
(I0
tS'b'
tR(I1
(I1
tcnumpy
dtype
(S'i8'
I0
I1
tR(I3
S'<'
NNNI-1
I-1
I0
tbI00
S'RAW'
tbsS'hard'
(lp9
sS'junk'
(lp10
sas."""


def test_python_2_pickles_of_arrays_are_read(tmp_path):
    """Written by hand: text as bytes, and the raw content of an array as such text."""
    raw = b"\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
    (tmp_path / "gnd.pkl").write_bytes(PYTHON_2.replace(b"RAW", raw))
    names, queries = read_revisited(tmp_path / "gnd.pkl", ["a", "b"])
    assert names == ["a", "b"] and queries[0].lists["easy"] == ["b"] and queries[0].box == (1.5, 2, 3, 4)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickles_are_refused_and_never_run(tmp_path, protocol):
    canary, path = tmp_path / "canary", tmp_path / "gnd.pkl"
    evils = [
        Evil(os.system, f"touch {canary}"),
        Evil(eval, f"open({str(canary)!r}, 'w')"),
        Evil(exec, f"open({str(canary)!r}, 'w')"),
        Evil(subprocess.call, ["touch", str(canary)]),
        Evil(np.load, "x.npy"),
        Evil(getattr, "text", "encode"),
        np.array([Evil(os.system, f"touch {canary}")], dtype=object),
        np.array([[1, 2]]),
        np.array(["a"]),
    ]
    for evil in evils:
        truth = {"gnd": [{"bbx": [0, 0, 1, 1], "easy": evil, "hard": [], "junk": []}]}
        path.write_bytes(pickle.dumps(truth | {"imlist": ["a"], "qimlist": ["a"]}, protocol))
        with pytest.raises(UserError, match=r"gnd\.pkl: (refused|not a ground truth)") as error:
            read_revisited(path, ["a"])
        assert "\n" not in str(error.value)
    assert not canary.exists()


def test_foreign_and_wrong_ground_truth_is_refused(tmp_path):
    path = tmp_path / "gnd.pkl"
    good = {
        "gnd": [{"bbx": [0, 0, 1, 1], "easy": [0], "hard": [], "junk": []}],
        "imlist": ["a"],
        "qimlist": ["a"],
    }
    with pytest.raises(UserError, match="No such file"):
        read_revisited(path, ["a"])
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"gnd\.pkl: "):
        read_revisited(path, ["a"])
    for change in (
        {"gnd": [{**good["gnd"][0], "easy": [1]}]},
        {"gnd": [{**good["gnd"][0], "easy": [-1]}]},
        {"gnd": [{**good["gnd"][0], "bbx": [1, 2, 3]}]},
        {"gnd": [{**good["gnd"][0], "bbx": [1, 2, 3, float("inf")]}]},
        {"gnd": [{**good["gnd"][0], "bbx": [1, 2, 3, 10**400]}]},
        {"gnd": None},
        {"imlist": [7], "qimlist": [7]},
        {"imlist": ["a\nb"], "qimlist": ["a\nb"]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "ok": [0], "junk": []}]},
        {"qimlist": ["a", "a"]},
        {"qimlist": [], "gnd": []},
    ):
        path.write_bytes(pickle.dumps(good | change))
        with pytest.raises(
            UserError, match=r"gnd\.pkl: (not a ground truth|holds no query|refused, .*128 bits)"
        ) as error:
            read_revisited(path, ["a", "a\nb"])
        assert "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(good))
    with pytest.raises(UserError, match="lists the image a, which is absent"):
        read_revisited(path, ["b"])
    assert read_revisited(path, ["a"])[0] == ["a"]
