import math

import numpy as np
import pytest
import torch

from algorithms.sinkhorn import sinkhorn
from tests import reference

BY_HAND = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6]])


@pytest.mark.parametrize(
    "epsilon, niter, expected",
    [
        (0.5, 3, [[0.660245, 0.339755], [0.516091, 0.483909], [0.323964, 0.676036]]),
        (0.5, 1000, [[0.660148, 0.339852], [0.515983, 0.484017], [0.323869, 0.676131]]),
        (0.05, 3, [[0.999802, 0.000198], [0.926144, 0.073856], [0.004189, 0.995811]]),
    ],
)
def test_codes_computed_by_hand(epsilon, niter, expected):
    assert torch.allclose(sinkhorn(BY_HAND, epsilon, niter), torch.tensor(expected), atol=2e-6)


def test_three_iterations_leave_prototypes_uneven():
    assert sinkhorn(BY_HAND, 0.05, 3).sum(0).tolist() == pytest.approx([1.930, 1.070], abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_codes_equal_loops_in_float64(epsilon):
    scores = torch.rand(17, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference.sinkhorn(scores.double().numpy(), epsilon, 3)
    assert np.allclose(sinkhorn(scores, epsilon, 3).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("niter", [1, 2, 3, 10])
def test_every_code_sums_to_one(niter):
    scores = torch.rand(40, 7, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(sinkhorn(scores, 0.05, niter).sum(1), torch.ones(40), atol=1e-6)


def test_at_convergence_prototypes_carry_equal_shares():
    scores = torch.rand(40, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(sinkhorn(scores, 0.5, 1000).sum(0), torch.full((8,), 5.0), atol=2e-5)


def test_a_constant_and_the_order_change_nothing():
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(12, 5, generator=generator)
    codes = sinkhorn(scores, 0.05)
    assert torch.allclose(sinkhorn(scores + 3, 0.05), codes, atol=1e-4)
    rows, columns = torch.randperm(12, generator=generator), torch.randperm(5, generator=generator)
    assert torch.allclose(sinkhorn(scores[rows][:, columns], 0.05), codes[rows][:, columns], atol=1e-6)


def test_uniform_scores_give_uniform_codes_without_gradient():
    scores = torch.full((6, 4), 0.3, requires_grad=True)
    codes = sinkhorn(scores, 0.05)
    assert torch.allclose(codes, torch.full((6, 4), 0.25)) and not codes.requires_grad


def test_small_epsilon_and_lost_prototypes_stay_finite():
    scores = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.9], [0.0, 0.0, 0.0]])
    codes = sinkhorn(scores, 0.003, 3)
    assert codes.isfinite().all() and torch.allclose(codes.sum(1), torch.ones(3), atol=1e-5)
    assert codes[:, 1].sum() > 0.5  # far from all of them, and yet due its share


def test_half_precision_scores_are_computed_in_float32():
    scores = BY_HAND.to(torch.bfloat16)
    assert sinkhorn(scores, 0.05).dtype == torch.float32
    assert math.isclose(sinkhorn(scores, 0.05).sum().item(), 3, abs_tol=1e-5)
