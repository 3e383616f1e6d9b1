"""Steps of the three methods in float64: one process does what two and three do, whatever their shares."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distributed
import main_deepclusterv2
import main_deepercluster
import main_swav
import models
from algorithms.sinkhorn import sinkhorn
from data.views import Batch
from models.parallel import Share, share_among_ranks
from models.two_level import super_classifier
from tests import toy
from tests.helpers import equal
from tests.ranks import own_rows, spawn
from training import multicrop
from training.memory import Bank, Queue
from training.optim import sgd
from training.steps import Steps
from training.two_level import Hits, SubHeads, by_super_class

BATCH, STEPS, CPU = 8, 5, torch.device("cpu")
SIZES = (24, 24, 16)  # of three crops
SETTINGS = SimpleNamespace(
    base_lr=0.5, final_lr=0.01, wd=1e-3, epochs=1, warmup_epochs=0, start_warmup=0.0, larc=True
)


def network(prototypes, share):
    toy.register()
    net = models.build("toy", seed=1)
    if prototypes is not None:
        net.set_embedding(6, 4, prototypes, seed=2)
    return prepared(net, share)


def prepared(net, share):
    if distributed.world_size() > 1:
        share_among_ranks(net, share, sync_bn=True)
    return net.double().train()


def make_steps(steps, share, view_of, index_of):
    """STEPS steps on the rows of this rank, as a pass over the images would make them."""
    losses = []
    for step in range(STEPS):
        index = index_of(step)
        share.total, share.rows = BATCH, distributed.share_of(BATCH)
        rows = slice(share.rows.start, share.rows.stop)
        columns = [torch.from_numpy(c[rows].copy()) for c in np.atleast_2d(index.T)]
        views = [v[rows] for v in view_of(step)] if isinstance(view_of(step), list) else view_of(step)[rows]
        losses.append(steps.step(Batch(views, columns[0], [], tuple(columns[1:])), BATCH, step, False)[0])
    return losses


def crops(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, 256, (BATCH, 3, s, s), dtype=torch.uint8, generator=generator) for s in SIZES]


def order(step):
    """Every image once, as in an epoch."""
    return np.random.default_rng(0).permutation(STEPS * BATCH)[step * BATCH :][:BATCH]


def in_float64(loss):
    """The loss, of views in float64."""
    return lambda net, x, *more: loss(
        net, [v.double() for v in x] if isinstance(x, list) else x.double(), *more
    )


def swav():
    share = Share()
    net = network(7, share)
    queue = Queue(2 * BATCH, BATCH, 2, 4, CPU)
    queue.on = True
    use = multicrop.PrototypeUse(7, {}, print)
    codes = partial(sinkhorn, epsilon=0.05, niter=3)
    loss = partial(main_swav.loss, [0, 1], 0.1, codes, net.prototypes, queue, use)
    return train_crops(net, loss, share, freeze=2) | {"queue": queue.state_dict()["embeddings"]}


def deepclusterv2():
    share = Share()
    net = network([5, 4], share)
    net.prototypes.normalise()
    bank = Bank(STEPS * BATCH, 2, 4)
    ids = torch.arange(STEPS * BATCH)
    labels = SimpleNamespace(of=lambda index, device, head: ids[index] % (5 - head))
    loss = partial(main_deepclusterv2.loss, [0, 1], 0.1, bank, labels, multicrop.PrototypeUse(5, {}, print))
    return train_crops(net, loss, share, freeze=10**10) | {"bank": bank.state_dict()["embeddings"]}


def train_crops(net, loss, share, freeze):
    optimizer, schedule = multicrop.optimizer_and_schedule(SimpleNamespace(args=SETTINGS), net, STEPS)
    after = partial(multicrop.freeze_prototypes, net.prototypes, freeze)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = Steps(net, [optimizer], in_float64(loss), CPU, "fp32", scaler, schedule, after_backward=after)
    return {"loss": make_steps(steps, share, crops, order), "net": net.state_dict()}


def deepercluster():
    coarse, fine, turns, n = 2, 3, 4, STEPS * BATCH
    share = Share()
    net = models.build("toy", seed=1) if toy.register() is None else None
    net.top_layer = super_classifier(net.feature_dim, coarse * turns, 3)
    net = prepared(net, share)
    ids = np.random.default_rng(0).integers(0, coarse * fine, n)
    labels = SimpleNamespace(of=lambda index, device: torch.from_numpy(ids)[index])
    active, heads, hits = np.arange(coarse), SubHeads(CPU, 0.1, 0.9, 1e-3), Hits()
    heads.make(net.feature_dim, fine, coarse * turns, BATCH, n, seed=4)
    heads.module.double()
    draws = by_super_class(ids, fine, active, turns, n, BATCH, seed=5)
    pixels = torch.randint(
        0, 256, (n, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(6)
    )
    loss = partial(main_deepercluster.loss, labels, active, fine, turns, heads, hits, share)
    optimizers = [sgd(net.parameters(), 0.1, 0.9, 1e-3), heads.optimizer]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = Steps(net, optimizers, in_float64(loss), CPU, "fp32", scaler, after_backward=heads.reduce)
    rows = [slice(step * BATCH, (step + 1) * BATCH) for step in range(STEPS)]
    losses = make_steps(steps, share, lambda s: pixels[draws[rows[s], 0]], lambda s: draws[rows[s]])
    found = {name: v for name, v in heads.state_dict().items() if name != "shape"}
    return {"loss": losses, "net": net.state_dict(), "heads": found, "hits": hits.finish()}


def assert_close(a, b, within):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], within)
    elif isinstance(a, torch.Tensor):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=within)
    else:
        assert a == pytest.approx(b, abs=within)


def codes():
    """Of samples dealt over the ranks in unequal shares, also none."""
    scores = torch.rand(13, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return [sinkhorn(own_rows(scores, counts), 0.05, 3) for counts in SHARES[distributed.world_size()]]


def memories(put):
    """State dicts of a queue and a bank that saw `put` global batches, and what is read from the bank."""
    queue, bank = Queue(12, 6, 2, 3, CPU), Bank(11, 2, 3)
    queue.on = True
    for step in range(put):
        z = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(step))
        index = torch.from_numpy(np.random.default_rng(step).permutation(11)[:6])
        rows = distributed.share_of(6)
        own = z[:, rows.start : rows.stop]
        queue.put(own)
        bank.put(index[rows.start : rows.stop], own)
        bank.settle()  # images come again
    return {"queue": queue.state_dict(), "bank": bank.state_dict(), "crop": bank.crop(1)}


def read_back(*states):
    """What a queue and a bank hold after they took each of these states over, together."""
    return [memories_from(state) for state in states]


def memories_from(state):
    queue, bank = Queue(12, 6, 2, 3, CPU), Bank(11, 2, 3)
    queue.load_state_dict(state["queue"])
    bank.load_state_dict(state["bank"])
    return {"queue": queue.state_dict(), "bank": bank.state_dict(), "filled": queue.filled}


METHODS = {"swav": swav, "deepclusterv2": deepclusterv2, "deepercluster": deepercluster}
SHARES = {1: [(13,)], 2: [(9, 4), (13, 0)], 3: [(5, 1, 7), (0, 0, 13)]}
FILLED = (1, 3)  # batches in the queue, before and after it is full


def everything():
    """All of the above in one group of processes, as starting one takes seconds."""
    found = {name: method() for name, method in METHODS.items()}
    return found | {"codes": codes(), "memories": [memories(put) for put in FILLED]}


@pytest.fixture(scope="module")
def results():
    """{number of processes: what each of its ranks found}."""
    return {size: spawn(everything, size) for size in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])  # shares of 4 and 4, of 2, 3 and 3
@pytest.mark.parametrize("method", METHODS)
def test_five_steps_of_one_process_are_those_of_several(method, size, results):
    one = results[1][0][method]
    assert len(set(one["loss"])) == STEPS
    assert_close(results[size][0][method], one, within=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_codes_over_ranks_are_those_of_one_process(size, results):
    for which, counts in enumerate(SHARES[size]):
        parts = [rank["codes"][which] for rank in results[size]]
        assert [len(part) for part in parts] == list(counts)
        assert torch.allclose(torch.cat(parts), results[1][0]["codes"][0], atol=1e-6)


@pytest.mark.slow
def test_memories_are_the_same_whatever_the_number_of_processes(results):
    for which, put in enumerate(FILLED):
        (one,) = (rank["memories"][which] for rank in results[1])
        for size in (2, 3):
            several = [rank["memories"][which] for rank in results[size]]
            for name in ("queue", "bank"):
                assert equal(several[0][name], one[name])
            assert np.array_equal(np.concatenate([part["crop"] for part in several]), one["crop"])
        assert memories_from(several[0])["filled"] == min(put, 2)
    for size, other in ((2, 3), (3, 2)):
        states = results[size][0]["memories"]
        for state, again in zip(states, spawn(read_back, other, *states)[0]):
            assert all(equal(state[name], again[name]) for name in ("queue", "bank"))
