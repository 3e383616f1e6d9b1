import numpy as np
import pytest
import torch

from training.two_level import SubHeads, by_super_class, classes_of, global_batches, held_classes


def sub_labels(n, coarse, fine, seed=0):
    return np.random.default_rng(seed).integers(0, coarse * fine, n)


@pytest.mark.parametrize(
    "n, coarse, turns, fine, batch",
    [(96, 2, 4, 3, 16), (101, 3, 1, 4, 17), (60, 1, 4, 2, 64), (101, 2, 4, 3, 20), (97, 2, 4, 2, 24)],
)
def test_an_epoch_has_n_draws_equal_over_classes_and_sub_classes(n, coarse, turns, fine, batch):
    ids = sub_labels(n, coarse, fine)
    draws = by_super_class(ids, fine, np.unique(ids // fine), turns, n, batch, seed=5)
    assert draws.shape == (n, 2)
    classes = ids[draws[:, 0]] // fine * turns + draws[:, 1]
    counts = np.bincount(classes, minlength=coarse * turns)
    assert counts.sum() == n and counts.max() - counts.min() <= 1
    for rows in global_batches(n, batch):
        part = classes[rows.start : rows.stop]
        assert (np.diff(part) >= 0).all()  # ordered by class
        in_batch = np.bincount(part, minlength=coarse * turns)
        assert in_batch.max() - in_batch.min() <= 1
    for which in range(coarse * turns):
        found = np.bincount(ids[draws[classes == which, 0]] % fine, minlength=fine)
        there = np.bincount(ids[ids // fine == which // turns] % fine, minlength=fine) > 0
        assert found[there].max() - found[there].min() <= 1 and not found[~there].any()


def test_draws_of_different_classes_and_epochs_differ():
    ids = np.repeat(np.arange(4), 50)
    draws = [by_super_class(ids, 4, np.array([0]), 4, 200, 200, seed) for seed in (1, 2)]
    parts = [d[d[:, 1] == q, 0] for d in draws for q in range(4)]
    assert len({tuple(part) for part in parts}) == 8


def test_an_empty_super_cluster_gets_no_draws():
    ids = np.array([0, 1, 4, 5, 4, 5])  # of three super-clusters of two, the second is empty
    draws = by_super_class(ids, 2, np.array([0, 2]), 1, 6, 4, seed=0)
    assert set(ids[draws[:, 0]] // 2) == {0, 2}


@pytest.mark.parametrize(
    "classes, batch, draws, ranks",
    [(8, 16, 96, 2), (8, 17, 101, 3), (3, 10, 23, 4), (4, 64, 60, 3), (8, 20, 101, 2), (7, 5, 400, 3)],
)
def test_a_rank_holds_the_classes_of_the_rows_that_it_is_dealt(classes, batch, draws, ranks):
    for rank in range(ranks):
        held = set()
        for dealt in global_batches(draws, batch):
            own = range(len(dealt) * rank // ranks, len(dealt) * (rank + 1) // ranks)
            held |= set(classes_of(dealt, classes)[own.start : own.stop].tolist())
        assert held <= set(held_classes(classes, batch, draws, rank, ranks))
    assert len(held_classes(8, 16, 96, 0, 4)) == 2  # not all of them


def test_scale_is_the_batch_over_the_views_of_a_class():
    heads = SubHeads(torch.device("cpu"), 0.1, 0.9, 0.0)
    heads.make(dim=4, outputs=2, classes=4, batch=16, draws=32, seed=1)
    assert heads.scale(torch.arange(4).repeat(4), 16).tolist() == [4, 4, 4, 4]
    assert heads.scale(torch.tensor([0, 0, 1, 2, 2, 3]), 6).tolist() == [3, 6, 3, 6]


def test_a_last_batch_of_one_view_joins_the_one_before_it():
    """As training takes them: the class of its view is in the order of the longer batch."""
    assert global_batches(33, 16) == [range(16), range(16, 33)]
    draws = by_super_class(np.zeros(33, np.int64), 1, np.array([0]), 4, 33, 16, seed=1)
    assert (np.diff(draws[16:, 1]) >= 0).all() and held_classes(4, 16, 33, 1, 2) == range(1, 4)


def test_heads_go_on_from_their_state_momentum_included():
    heads, other = (SubHeads(torch.device("cpu"), 0.1, 0.9, 1e-2) for _ in range(2))
    heads.make(dim=4, outputs=2, classes=3, batch=6, draws=6, seed=1)

    def step(h):
        h.optimizer.zero_grad()
        h.module.weight.grad = torch.ones_like(h.module.weight)
        h.reduce()
        h.optimizer.step()

    step(heads)
    other.load_state_dict(heads.state_dict())
    step(heads), step(other)
    assert torch.equal(heads.module.weight, other.module.weight)
    assert torch.equal(heads.module.bias, other.module.bias)


def test_a_head_without_views_moves_by_decay_and_momentum_alone():
    heads = SubHeads(torch.device("cpu"), 0.1, 0.9, 0.5)
    heads.make(dim=4, outputs=2, classes=2, batch=4, draws=4, seed=1)
    before = heads.module.weight.detach().clone()
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(3, dtype=torch.int64)
    loss, _ = heads.module(features, zeros, zeros, torch.ones(2))
    loss.backward()
    heads.reduce()
    heads.optimizer.step()
    assert torch.allclose(heads.module.weight[1], before[1] * (1 - 0.1 * 0.5))
    assert not torch.allclose(heads.module.weight[0], before[0] * (1 - 0.1 * 0.5))
