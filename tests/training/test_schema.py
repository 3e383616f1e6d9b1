"""Checkpoints that do not fit: one line each, and nothing is loaded."""

import copy
import math

import pytest
import torch

import checkpoint
from tests.helpers import ROOT, refuses
from tests.runs import train
from training import schema

V1 = ROOT / "tests" / "files" / "v1" / "kmeans" / "checkpoints" / "checkpoint_2.pth.tar"


@pytest.fixture(scope="module")
def saved(whole):
    """A checkpoint in the middle of an epoch."""
    return checkpoint.read(whole / "checkpoints" / "checkpoint_2.pth.tar")


def change(state, path, value):
    """A copy of state in which the entry at path is value, or is gone, or is value(what it was)."""
    state = copy.deepcopy(state)
    *above, last = path.split("/")
    inner = state
    for name in above:
        inner = inner[int(name) if isinstance(inner, list) or name.isdigit() else name]
    last = int(last) if last.isdigit() else last
    if value is None:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return state


def with_value(index, value):
    def put(tensor):
        tensor = tensor.clone()
        tensor[(0,) * (tensor.dim() - 1) + (index,)] = value
        return tensor

    return put


MOMENTUM = "optimizer/state/0/momentum_buffer"
LABELS = "parts/labels"
FIRST = f"{LABELS}/assignments/0"
ALTERED = [
    ("epoch", "two", "epoch is 'two'"),
    ("epoch", math.nan, "epoch is nan"),
    ("epoch", True, "epoch is True"),
    ("epoch", 10**9, "does not fit 6 iterations"),
    ("epoch", 10**20, "epoch is 1000"),
    ("position", -1, "position is -1"),
    ("position", 5, "stands at step 5 of an epoch that has 4"),
    ("position", 10**9, "does not fit"),
    ("iteration", -5, "iteration is -5"),
    ("iteration", 1, "does not fit 1 iterations"),
    ("iteration", torch.tensor(6), "iteration is a tensor"),
    ("method", 3, "method is 3"),
    ("method", "swav", "a checkpoint of swav, not of deepcluster"),
    ("args", ["lr"], "args is a list"),
    ("args/seed", torch.ones(2), "args.seed is a tensor"),
    ("record", "x", "record is 'x'"),
    ("record/seconds", None, "record.seconds is None"),
    ("loss/sum", math.inf, "loss.sum is inf"),
    ("loss/count", -3, "loss.count is -3"),
    ("loss/count", None, "loss.count is None"),
    ("parts", None, "holds no parts"),
    ("parts/head", None, "holds no head"),
    ("parts/labels", None, "holds no labels"),
    ("optimizer", None, "holds no body"),
    ("state_dict", None, "holds no net"),
    ("state_dict", 7, "state_dict is 7"),
    ("state_dict/features.0.weight", lambda w: w[:3], r"features.0.weight is \(3, 2, 5, 5\)"),
    ("state_dict/features.0.weight", lambda w: w.to(torch.int32), "features.0.weight is torch.int32"),
    ("state_dict/features.0.weight", with_value(3, math.nan), "features.0.weight holds .* not finite"),
    ("state_dict/features.1.running_var", with_value(3, -1.0), "negative variance"),
    ("state_dict/top_layer.bias", lambda b: b[:5], r"top_layer.bias is \(5,\)"),
    (MOMENTUM, lambda m: m[:1], "momentum_buffer of parameter 0 is"),
    (MOMENTUM, lambda m: torch.ones(()), "momentum_buffer of parameter 0 is"),
    (MOMENTUM, lambda m: m.double(), "momentum_buffer of parameter 0 is"),
    (MOMENTUM, with_value(0, math.inf), "momentum_buffer holds numbers that are not finite"),
    (MOMENTUM, lambda m: m.to_sparse(), "not a plain checkpoint"),
    (MOMENTUM, lambda m: torch.complex(m, m), "not a plain checkpoint"),
    ("optimizer/state", lambda s: {"0": s[0]}, "number of a parameter"),
    ("optimizer/state", lambda s: {99: s[0]}, "parameter number 99"),
    ("optimizer/param_groups", 5, "param_groups is 5"),
    ("optimizer", [1], "optimizer is a list"),
    (f"{LABELS}/epoch", 7, "labels are of a later epoch"),
    (f"{LABELS}/epoch", "x", "labels.epoch is 'x'"),
    (f"{LABELS}/clusters_size", 10**9, "shorter than it was"),
    (f"{LABELS}/clusters_size", 1, "no epoch ends at byte 1"),
    (f"{LABELS}/figures", [1], "figures is a list"),
    (f"{LABELS}/assignments", "none", "assignments is 'none'"),
    (f"{FIRST}/labels", with_value(2, 8), "not one of 8 clusters"),
    (f"{FIRST}/labels", with_value(2, -1), "not one of 8 clusters"),
    (f"{FIRST}/labels", lambda x: x.float(), "labels is a tensor"),
    (f"{FIRST}/labels", lambda x: x[:50], "other numbers of labels"),
    (f"{FIRST}/labels", lambda x: x[:0], "labels is a tensor"),
    (f"{FIRST}/distances", with_value(1, math.nan), "distances holds numbers"),
    (f"{FIRST}/centroids", lambda x: x[:7], "7 centroids of 8"),
    (f"{FIRST}/num_clusters", 0, "centroids of 0"),
    (f"{FIRST}/objective", "low", "objective is 'low'"),
    ("parts/images/number", "many", "number is 'many'"),
    ("parts/images/digest", 1, "digest is 1"),
    ("parts/images/skipped", "abc", "skipped is 'abc'"),
    ("parts/images/skipped", [3], "no list of names"),
]


@pytest.mark.parametrize("path, value, message", ALTERED)
def test_an_altered_checkpoint_is_refused_in_one_line(photos, whole, saved, tmp_path, path, value, message):
    altered = tmp_path / "run" / "checkpoint.pth.tar"
    altered.parent.mkdir()
    (altered.parent / "clusters").write_bytes((whole / "clusters").read_bytes())
    checkpoint.save(altered, change(saved, path, value))
    with refuses(message):
        train(photos, tmp_path / "exp", "--resume", altered)


def test_both_parts_of_labels_of_another_length_are_refused(photos, whole, saved, tmp_path):
    state = change(saved, f"{FIRST}/labels", lambda x: x[:50])
    state = change(state, f"{FIRST}/distances", lambda x: x[:50])
    checkpoint.save(tmp_path / "checkpoint.pth.tar", state)
    with refuses("labels does not fit .labels of another number of images than 60"):
        train(photos, tmp_path / "exp", "--resume", tmp_path / "checkpoint.pth.tar")


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("epoch", "two", "epoch is 'two'"),
        ("clustered", "yes", "clustered is 'yes'"),
        ("clustered", False, "stands in an epoch that has no labels"),
        ("images", 3, "images is 3"),
        ("record", [1], "record is a list"),
        ("skipped", 5, "skipped is 5"),
        ("assignment", 5, "assignments.0 is 5"),
        ("assignment/labels", with_value(0, 99), "not one of 8 clusters"),
        ("optimizer_head", [], "parts.head is a list"),
        ("images", None, "holds no parts"),
    ],
)
def test_an_altered_checkpoint_of_the_first_version_is_refused_too(tmp_path, path, value, message):
    checkpoint.save(tmp_path / "checkpoint.pth.tar", change(checkpoint.read(V1), path, value))
    with refuses(message):
        schema.read(tmp_path / "checkpoint.pth.tar")


def test_good_ones_are_read_and_tell_their_place(whole):
    for path, place in ((V1, (1, 6)), (whole / "checkpoint.pth.tar", (3, 12))):
        state = schema.read(path)
        assert (state["epoch"], state["iteration"]) == place == schema.place(path)
        assert state["method"] == "deepcluster" and state["parts"].keys() == {"images", "labels", "head"}
        assert state["parts"]["labels"]["figures"]["pca_dims"] > 0
    assert schema.read(V1)["parts"]["labels"]["epoch"] == 1  # it is in the middle of it
    end = schema.read(V1.parents[1] / "checkpoint.pth.tar")
    assert (end["epoch"], end["parts"]["labels"]["epoch"]) == (2, 1)


def test_a_nest_that_holds_itself_or_has_2_to_60_leaves_is_told_at_once(saved, tmp_path):
    itself, doubled, deep = {}, [1], []
    itself["a"] = itself
    for _ in range(60):
        doubled, deep = [doubled, doubled], [deep]
    for nest, message in (
        (itself, "parts.images.skipped"),
        (doubled, "nested too deep"),
        (deep, "nested too deep"),
    ):
        checkpoint.save(tmp_path / "c.pth.tar", saved | {"extra": nest})
        if nest is itself:
            schema.read(tmp_path / "c.pth.tar")  # plain, if odd: nothing reads it
            state = change(saved, "parts/images/skipped", nest)
            checkpoint.save(tmp_path / "c.pth.tar", state)
        with refuses(message):
            schema.read(tmp_path / "c.pth.tar")
    assert list(schema.leaves("x", {"a": [1, (2,)], "b": 3})) == [("x.a.0", 1), ("x.a.1.0", 2), ("x.b", 3)]
