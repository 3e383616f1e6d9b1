import math

import pytest
import torch
from torch import nn

from training.optim import LARC, bottou, cosine, cosine_by_epoch, halved, in_steps, polynomial, sgd


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            (4.8, 0.0048, 100, 10, 0.3, 312),
            {0: 0.3, 1: 0.301443, 312: 0.750144, 1560: 2.550721, 3119: 4.8, 3120: 4.8, 17160: 2.4024,
             24000: 0.741524, 31199: 0.004800},
        ),
        ((0.6, 0.0006, 200, 0, 0.0, 5004), {0: 0.6, 5004: 0.599963, 500400: 0.3003, 750600: 0.08838}),
        ((1.0, 0.01, 5, 2, 0.1, 4), {0: 0.1, 1: 0.228571, 6: 0.871429, 7: 1, 8: 1, 9: 0.983133, 10: 0.933683,
                                     19: 0.026867}),
    ],
)  # fmt: skip
def test_cosine_with_warm_up_computed_by_hand(settings, expected):
    rate = cosine(*settings)
    assert {step: rate(step) for step in expected} == pytest.approx(expected, abs=1.1e-6)


def larc(parameters, weight_decay=0.01, momentum=0.0, lr=1.0):
    return LARC(sgd(parameters, lr, momentum, weight_decay))


def test_larc_scales_a_gradient_as_computed_by_hand():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.6, 0.8])
    larc([p]).step()
    assert torch.allclose(p.grad, torch.tensor([0.003, 0.004]), atol=1e-8)
    assert torch.allclose(p.detach(), torch.tensor([2.997, 3.996]))


@pytest.mark.parametrize("weight, gradient", [([0.0, 0.0], [0.6, 0.8]), ([3.0, 4.0], [0.0, 0.0])])
def test_larc_leaves_what_has_no_norm_as_it_is_without_decay(weight, gradient):
    p = nn.Parameter(torch.tensor(weight))
    p.grad = torch.tensor(gradient)
    larc([p]).step()
    assert torch.equal(p.grad, torch.tensor(gradient))
    assert torch.equal(p.detach(), torch.tensor(weight) - torch.tensor(gradient))


def test_momentum_of_larc_runs_on_the_scaled_gradients():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = larc([p], momentum=0.9)
    at, velocity = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        p.grad = torch.tensor([0.6, 0.8])
        optimizer.step()
        g = torch.tensor([0.6, 0.8], dtype=torch.float64)
        scaled = (g + 0.01 * at) * 0.001 * at.norm() / (g.norm() + 0.01 * at.norm() + 1e-8)
        velocity = 0.9 * velocity + scaled
        at = at - velocity
    assert torch.allclose(p.detach().double(), at, atol=1e-6)


def test_larc_goes_on_from_its_state():
    one, two = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    first = larc([one], momentum=0.9)
    one.grad = torch.tensor([0.6, 0.8])
    first.step()
    second = larc([two], momentum=0.9, lr=0.5)
    second.load_state_dict(first.state_dict())
    two.data.copy_(one.data)
    for p, optimizer in ((one, first), (two, second)):
        p.grad = torch.tensor([0.1, 0.0])
        optimizer.step()
    assert second.param_groups[0]["lr"] == 0.5 and not torch.equal(one, two)
    momenta = [o.state_dict()["state"][0]["momentum_buffer"] for o in (first, second)]
    assert torch.allclose(*momenta)


def test_bottou_and_halved():
    assert bottou(0.01, 1e-4)(3) == pytest.approx(0.01 / math.sqrt(1 + 0.01 * 1e-4 * 3))
    assert [halved(0.4, 2)(s) for s in range(5)] == [0.4, 0.4, 0.2, 0.2, 0.1]


def test_cosine_by_epoch_is_one_rate_an_epoch_that_falls_to_nearly_0():
    rate = cosine_by_epoch(0.3, 100, steps_per_epoch=5004)
    assert rate(0) == rate(5003) == 0.3
    assert rate(5004) == pytest.approx(0.15 * (1 + math.cos(math.pi / 100)))
    assert rate(50 * 5004) == pytest.approx(0.15)
    assert rate(100 * 5004 - 1) == pytest.approx(0.15 * (1 + math.cos(0.99 * math.pi)))
    assert rate(100 * 5004) == pytest.approx(0)


def test_rates_of_detection_and_segmentation_computed_by_hand():
    rates = [in_steps(0.02, [10, 6], warmup=4)(s) for s in (0, 2, 4, 5, 6, 9, 10)]
    assert rates == pytest.approx([2e-5, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.002, 0.0002])
    assert in_steps(0.02, [], warmup=0)(0) == 0.02
    assert [polynomial(0.1, 4)(s) for s in (0, 2, 4, 5)] == pytest.approx([0.1, 0.1 * 0.5**0.9, 0, 0])
