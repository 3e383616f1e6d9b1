"""Batch norm in channels_last on a CPU: as exact as in NCHW, and torch's own wherever that is exact."""

import copy

import pytest
import torch
from torch import nn

import models
from models.norm import LONG, BatchNorm2d, sums_are_long
from models.parallel import Share, SyncBatchNorm, share_among_ranks


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).add_(0.5).contiguous(memory_format=torch.channels_last)


def trained(norm, x):
    """(output, gradients of input, weight and bias, running mean and variance) of a step in train mode."""
    norm = copy.deepcopy(norm).train()
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    y.backward(maps(*x.shape, seed=1).to(x.dtype))
    return y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def pair(channels):
    """torch's layer and ours with the same weights."""
    theirs, ours = nn.BatchNorm2d(channels), BatchNorm2d(channels)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2)
        theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_statistics_of_a_large_batch_are_those_of_float64():
    x, (theirs, ours) = maps(64, 8, 56, 56), pair(8)
    theirs.momentum = ours.momentum = 1.0
    variance = x.double().var((0, 2, 3))
    errors = [
        float((norm.train()(x), norm.running_var.double() / variance - 1)[1].abs().max())
        for norm in (copy.deepcopy(theirs), copy.deepcopy(ours))
    ]
    assert errors[1] < 1e-6
    if torch.get_num_threads() == 1:
        assert errors[0] > 10 * errors[1]  # else there is nothing to mend any more


def test_a_step_is_that_of_float64():
    x, (theirs, ours) = maps(16, 6, 40, 40), pair(6)
    assert sums_are_long(x)
    exact = trained(theirs.double(), x.double())
    for found, expected in zip(trained(ours, x), exact):
        assert found.dtype == torch.float32
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.double() / scale, expected / scale, atol=1e-5, rtol=0)
    assert trained(ours, x)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "x",
    [
        maps(4, 5, 32, 32),  # short sums
        maps(16, 5, 40, 40).contiguous(),  # NCHW
        maps(16, 5, 40, 40).double(),
    ],
    ids=["short", "NCHW", "float64"],
)
def test_elsewhere_it_is_torchs_bit_for_bit(x):
    theirs, ours = (norm.to(x.dtype) for norm in pair(5))
    assert not sums_are_long(x)
    for found, expected in zip(trained(ours, x), trained(theirs, x)):
        assert torch.equal(found, expected)


def test_in_eval_mode_it_is_torchs_bit_for_bit():
    x, (theirs, ours) = maps(16, 5, 40, 40), pair(5)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_the_count_of_batches_and_the_momentum_are_torchs():
    x, (theirs, ours) = maps(16, 5, 40, 40), pair(5)
    for norm in (theirs, ours):
        for _ in range(3):
            norm.train()(x)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    torch.testing.assert_close(ours.running_var, theirs.running_var, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-4, rtol=1e-4)
    assert x.numel() / 5 > LONG


@pytest.mark.parametrize("arch", ["alexnet", "resnet18s", "resnet50"])
def test_every_network_has_it_and_ranks_replace_it(arch):
    net = models.build(arch)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(m) is BatchNorm2d for m in norms)
    if arch == "resnet18s":
        share_among_ranks(net, Share(), sync_bn=True)
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(type(m) is SyncBatchNorm for m in norms)
