"""Batch norm and dropout of a batch that lies in two processes, against one process."""

import pytest
import torch
from torch import nn

import distributed
import models
from models.parallel import Share, SharedDropout, SyncBatchNorm, share_among_ranks
from tests.ranks import spawn

SPLITS = ((5, 3), (8, 0), (1, 7))


def whole():
    """The batch (8, 4, 3, 3), what the output is weighed with, and the layer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 4, 3, 3, generator=generator) * 2 + 5
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    layer = nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    return x, weight, layer


def on_rank():
    """What a rank computes of every split."""
    found, rank = [], distributed.rank()
    for split in SPLITS:
        x, weight, reference = whole()
        layer = SyncBatchNorm(4)
        layer.load_state_dict(reference.state_dict())
        rows = range(split[0]) if rank == 0 else range(split[0], 8)
        x = x[rows.start : rows.stop].requires_grad_()
        y = layer(x)
        (y * weight[rows.start : rows.stop]).sum().backward()
        torch.manual_seed(7)
        dropped = SharedDropout(0.5, Share(8, rows))(torch.ones(len(rows), 6))
        found.append({
            "y": y.detach(), "gradient": x.grad, "dropped": dropped,
            "weight": layer.weight.grad, "bias": layer.bias.grad, "state": layer.state_dict(),
        })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def ranks():
    return spawn(on_rank, 2)


@pytest.mark.parametrize("case", range(len(SPLITS)))
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(ranks, case):
    x, weight, layer = whole()
    x.requires_grad_()
    y = layer(x)
    (y * weight).sum().backward()
    one, two = (found[case] for found in ranks)
    assert torch.allclose(torch.cat([one["y"], two["y"]]), y, atol=1e-5)
    assert torch.allclose(torch.cat([one["gradient"], two["gradient"]]), x.grad, atol=1e-5)
    for name in ("weight", "bias"):
        assert torch.allclose(one[name] + two[name], getattr(layer, name).grad, atol=1e-4)
    for found in (one, two):
        for name, value in layer.state_dict().items():
            assert torch.allclose(found["state"][name].double(), value.double(), atol=1e-6), name


@pytest.mark.parametrize("case", range(len(SPLITS)))
def test_dropout_masks_of_two_processes_make_up_that_of_one(ranks, case):
    torch.manual_seed(7)
    expected = nn.functional.dropout(torch.ones(8, 6), 0.5)
    assert torch.equal(torch.cat([found[case]["dropped"] for found in ranks]), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_masks_of_maps_are_those_of_one_process_too(layout):
    maps = torch.ones(8, 4, 3, 5).contiguous(memory_format=layout)
    torch.manual_seed(7)
    expected = nn.functional.dropout(maps, 0.5)
    parts = []
    for rows in (range(3), range(3, 8)):
        torch.manual_seed(7)
        parts.append(SharedDropout(0.5, Share(8, rows))(maps[rows.start : rows.stop]))
    assert torch.equal(torch.cat(parts), expected)


def test_names_weights_and_evaluation_stay_as_they_are():
    net, shared = (models.build("tiny", True, 5, seed=1).eval() for _ in range(2))
    share_among_ranks(shared, Share(), sync_bn=True)
    assert list(net.state_dict()) == list(shared.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), shared(x))
    kinds = [type(layer) for layer in shared.features]
    assert SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    share_among_ranks(net, Share(), sync_bn=False)
    assert SyncBatchNorm not in [type(layer) for layer in net.features]
    assert isinstance(net, models.Network)
