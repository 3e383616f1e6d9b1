import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import main
import models
from data import normalise
from data.sampling import ShareSampler
from data.views import Batch
from models.network import make_sobel
from models.parallel import Share
from tests.helpers import refuses
from training.optim import bottou, halved, sgd
from training.steps import Steps, deal

CPU = torch.device("cpu")


class Labels:
    def __init__(self, ids):
        self.ids = torch.tensor(ids)

    def of(self, index, device):
        return self.ids[index]


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return net.train()


def steps_of(net, optimizers, loss, **options):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Steps(net, optimizers, loss, CPU, "fp32", scaler, **options)


def test_one_step_is_cross_entropy_and_sgd_as_written_in_the_paper():
    """Loss, gradient, momentum and decay of two steps against arithmetic in float64 on the same net."""
    net, double = (without_dropout(models.build("tiny", True, 5, seed=1)) for _ in range(2))
    double = double.double()
    optimizers = [
        sgd(net.body_parameters(), 0.05, 0.9, 1e-2),
        sgd(net.top_layer.parameters(), 0.05, 0.0, 1e-2),
    ]
    labels = Labels([3, 0, 4, 1, 2, 2])
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    batches = [Batch(images, torch.arange(6), []), Batch(images.flip(0), torch.arange(6).flip(0), [])]
    steps = steps_of(net, optimizers, partial(main.loss, labels))
    values = [steps.step(batch, 6, i, False)[0] for i, batch in enumerate(batches)]

    momentum, losses = {}, []
    for batch in batches:
        double.zero_grad()
        logits = double(normalise(batch.views).double())
        loss = -(logits - logits.logsumexp(1, keepdim=True))[range(6), labels.ids[batch.index]].mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in double.named_parameters():
                if not p.requires_grad:
                    continue
                step = p.grad + 1e-2 * p
                if not name.startswith("top_layer"):
                    step = momentum[name] = 0.9 * momentum.get(name, 0) + step
                p -= 0.05 * step
    assert values == pytest.approx(losses, rel=1e-5)
    for (name, p), q in zip(net.named_parameters(), double.parameters()):
        assert torch.allclose(p.double(), q, atol=2e-5), name
    assert torch.equal(net.sobel[1].weight, make_sobel()[1].weight)


def linear_step(clip=None, schedule=None, iteration=0, scale=1.0):
    """A step of a linear map with known gradient; (weights before, after, value)."""
    net = torch.nn.Linear(3, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    views = torch.tensor([[10, 20, 30], [30, 20, 10]], dtype=torch.uint8).view(2, 3, 1, 1)

    def loss(net, x, index):
        return scale * net(x.flatten(1)).sum()

    steps = steps_of(net, [optimizer], loss, clip=clip, schedule=schedule)
    value, stopped = steps.step(Batch(views, torch.arange(2), []), 4, iteration, True)
    gradient = scale * normalise(views).flatten(1).sum(0) / 4
    return before, net.weight.detach(), value, stopped, gradient


def test_the_sum_over_this_ranks_images_is_divided_by_the_global_batch():
    before, after, value, stopped, gradient = linear_step()
    assert torch.allclose(after, before - 0.1 * gradient, atol=1e-6) and stopped
    assert value == pytest.approx((before.flatten() @ gradient).item(), abs=1e-6)


def test_the_gradient_is_clipped_to_its_norm_and_the_schedule_sets_the_rate():
    before, after, *_, gradient = linear_step(clip=0.25, schedule=bottou(0.4, 0.5), iteration=6)
    rate = 0.4 / math.sqrt(1 + 0.4 * 0.5 * 6)
    assert torch.allclose(after, before - rate * 0.25 * gradient / gradient.norm(), atol=1e-6)
    assert [halved(0.8, 3)(n) for n in (0, 2, 3, 6)] == [0.8, 0.8, 0.4, 0.2]


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_iteration(scale):
    net = torch.nn.Linear(3, 1)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    steps = steps_of(net, [optimizer], lambda net, x, index: net(x.flatten(1)).sum() * scale)
    views = torch.ones(2, 3, 1, 1, dtype=torch.uint8)
    with refuses(r"the loss is \S+ at iteration 41; .* lower --lr"):
        steps.step(Batch(views, torch.arange(2), []), 2, 41, False)
    assert torch.equal(net.weight, before)


def test_a_draw_may_hold_more_than_an_image():
    seen = []

    def loss(net, x, index, turn):
        seen.append((index.tolist(), turn.tolist()))
        return F.mse_loss(net(x.flatten(1)), turn.float()[:, None], reduction="sum")

    net = torch.nn.Linear(3, 1)
    views = torch.ones(2, 3, 1, 1, dtype=torch.uint8)
    steps = steps_of(net, [torch.optim.SGD(net.parameters(), lr=0.1)], loss)
    steps.step(Batch(views, torch.tensor([4, 9]), [], (torch.tensor([1, 3]),)), 2, 0, False)
    assert seen == [([4, 9], [1, 3])]


def batches_of(sampler):
    """What a loader would make of the sampler."""
    for items in sampler:
        index = torch.tensor([i for _, i in items])
        yield Batch(index.float()[:, None], index, [])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("n, batch, first", [(20, 6, 0), (19, 6, 0), (20, 6, 2), (21, 5, 0), (11, 5, 1)])
def test_the_ranks_together_get_every_global_batch_once(n, batch, first, ranks):
    draws = np.random.default_rng(1).permutation(n)
    samplers = [ShareSampler(draws, batch, first, rank, ranks) for rank in range(ranks)]
    shares = [Share() for _ in samplers]
    dealt = [list(deal(batches_of(s), s, share)) for s, share in zip(samplers, shares)]
    sizes = [[total for total, _ in parts] for parts in dealt]
    assert all(s == sizes[0] for s in sizes) and sum(sizes[0]) == n - first * batch
    rows = [i for step in zip(*dealt) for _, part in step for i in part.index.tolist()]
    assert rows == draws[first * batch :].tolist()


@pytest.mark.parametrize(
    "n, sizes",
    [(12, [4, 4, 4]), (13, [4, 4, 5]), (14, [4, 4, 4, 2]), (5, [5]), (4, [4]), (1, [1]), (3, [3])],
)
def test_a_last_batch_of_one_image_joins_the_one_before_it(n, sizes):
    sampler = ShareSampler(np.arange(n), 4)
    assert [total for total, _ in sampler.shares()] == sizes
    assert sampler.steps == len(sizes) == len(sampler) and sampler.joined == (n in (13, 5))
    items = [item for part in sampler for item in part]
    assert items == [(i, i) for i in range(n)]
    assert list(ShareSampler(np.arange(n), 4, first=len(sizes))) == []  # resumed behind its last step
    assert [t for t, _ in ShareSampler(np.arange(n), 4, first=1).shares()] == sizes[1:]


def test_batches_of_one_stay_batches_of_one():
    assert [total for total, _ in ShareSampler(np.arange(3), 1).shares()] == [1, 1, 1]
