"""What has to be true of DeeperCluster's loop: special cases, periods, interruptions of a clustering."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import clustering
import main
import main_deepercluster
import models
from data.views import Batch
from models.parallel import Share
from models.two_level import super_classifier
from tests.test_methods import assert_same_run, images, train
from training import two_level
from training.logs import read_lines
from training.optim import sgd
from training.steps import Steps
from util import Preempted

CPU = torch.device("cpu")
images = images  # the fixture


def steps_of(net, optimizers, loss, **options):
    return Steps(net, optimizers, loss, CPU, "fp32", torch.amp.GradScaler("cpu", enabled=False), **options)


def test_one_super_class_is_deepcluster_bit_for_bit():
    """Three steps: the same losses, weights of body and head, for the same views and labels."""
    ids, n = torch.tensor([0, 3, 1, 2, 2, 0, 3, 1]), 8
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = SimpleNamespace(of=lambda index, device: ids[index])
    share = Share(n, range(n))

    heads, hits = two_level.SubHeads(CPU, 0.1, 0.9, 1e-3), two_level.Hits()
    deeper = models.build("toy", seed=2)
    deeper.top_layer = super_classifier(deeper.feature_dim, 1, seed=3)
    v = deeper.top_layer.weight.detach().clone()
    heads.make(deeper.feature_dim, 4, 1, n, n, seed=4)
    loss = partial(main_deepercluster.loss, labels, np.array([0]), 4, 1, heads, hits, share)

    plain = models.build("toy", num_clusters=4, seed=2)
    with torch.no_grad():
        plain.top_layer.weight.copy_(heads.module.weight[0])
        plain.top_layer.bias.copy_(heads.module.bias[0])
    nets = {
        "deeper": steps_of(
            deeper, [sgd(deeper.body_parameters(), 0.1, 0.9, 1e-3), heads.optimizer], loss,
            after_backward=heads.reduce,
        ),
        "plain": steps_of(
            plain, [sgd(plain.parameters(), 0.1, 0.9, 1e-3)], partial(main.loss, labels)
        ),
    }  # fmt: skip
    for step in range(3):
        index, turn = torch.arange(n), torch.zeros(n, dtype=torch.int64)
        of_deeper = nets["deeper"].step(Batch(views, index, [], (turn,)), n, step, False)
        assert of_deeper == nets["plain"].step(Batch(views, index, []), n, step, False)
        assert not deeper.top_layer.weight.grad.any() and not deeper.top_layer.bias.grad.any()
    for name, value in deeper.state_dict().items():
        if not name.startswith("top_layer."):
            assert torch.equal(value, plain.state_dict()[name]), name
    assert torch.equal(heads.module.weight[0], plain.top_layer.weight)
    assert torch.equal(heads.module.bias[0], plain.top_layer.bias) and torch.equal(deeper.top_layer.weight, v)


@pytest.mark.parametrize("super_classes, k, remade", [(8, 6, 3), (4, 3, 1)])
def test_clusterings_before_every_period_and_heads_made_anew(
    super_classes, k, remade, images, tmp_path, monkeypatch
):
    """T = 3, 7 epochs: before 0, 3, 6; the super-classifier anew exactly where there are super-clusters."""
    made, tops, momenta = [], [], []
    make, top, sgd_of = two_level.SubHeads.make, main_deepercluster.super_classifier, main_deepercluster.sgd

    def recorded_make(heads, *args, **options):
        made.append(0 if heads.module is None else len(heads.optimizer.state))
        make(heads, *args, **options)
        assert not heads.optimizer.state  # no momentum yet

    def recorded_sgd(*args):
        momenta.append(sgd_of(*args))
        return momenta[-1]

    monkeypatch.setattr(two_level.SubHeads, "make", recorded_make)
    monkeypatch.setattr(main_deepercluster, "super_classifier", lambda *a: tops.append(a[2]) or top(*a))
    monkeypatch.setattr(main_deepercluster, "sgd", recorded_sgd)
    flags = ["--super_classes", super_classes, "--k", k, "--reassignment", 3]
    exp = train("deepercluster", images, tmp_path / "exp", *flags, epochs=7)
    assert len(made) == 3 and made[0] == 0 and made[1] > 0
    assert len(tops) == len(set(tops)) == remade
    assert len(momenta) == 1 + remade and momenta[0].state  # the body's optimiser goes on
    found = [line["clusters"] for line in read_lines(exp / "log.jsonl")]
    assert found[0] == found[1] == found[2] and found[3] == found[4] == found[5]


def interrupt(monkeypatch, where, function, call):
    """The call-th call of a function ends the run as a signal does that comes there."""
    original, calls = getattr(where, function), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Preempted("SIGTERM")
        return original(*args, **options)

    monkeypatch.setattr(where, function, interrupted)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of three epochs, clustered before the first and the third one."""
    return train("deepercluster", images, tmp_path_factory.mktemp("whole") / "exp")


PLACES = {
    "in the features": (main_deepercluster.clustering, "preprocess", 1),
    "before level 1": (clustering, "kmeans_two_level", 1),
    "between the levels": (clustering, "kmeans", 2),
    "inside level 2": (clustering, "kmeans", 3),
    "before the heads": (two_level.SubHeads, "make", 1),
    "before the first step": (two_level, "by_super_class", 1),
    "in the second clustering, before level 1": (clustering, "kmeans_two_level", 2),
    "in the second clustering, inside level 2": (clustering, "kmeans", 6),
    "behind the second clustering, before the heads": (two_level.SubHeads, "make", 2),
    "in the second epoch, before its first step": (two_level, "by_super_class", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_stopped_in_a_clustering_repeats_it_exactly(place, images, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, *PLACES[place])
        with pytest.raises(Preempted):
            train("deepercluster", images, tmp_path / "exp")
    train("deepercluster", images, tmp_path / "exp", "--resume", "auto")
    assert_same_run(tmp_path / "exp", whole)


def test_size_dataset_takes_the_first_images(images, tmp_path):
    exp = train("deepercluster", images, tmp_path / "exp", "--size_dataset", 40, epochs=1)
    assert len((exp / "assignments.csv").read_text().splitlines()) == 41


def test_the_head_is_linear_and_pytorchs():
    top = super_classifier(16, 4, seed=1)
    assert isinstance(top, nn.Linear) and top.weight.abs().max() <= 0.25 and top.bias.any()
