"""Poolings of the probes: DeeperCluster's windows, SwAV's, by hand and at the papers' sizes."""

import pytest
import torch
from torch.nn import functional as F

import models
from evaluation.pooling import make_pooling
from evaluation.probe import Frozen
from tests.helpers import refuses

CPU = torch.device("cpu")
CONVS = [f"conv{i}" for i in range(1, 14)]


@pytest.mark.parametrize("arch", ["vgg16", "vgg16wide"])
def test_deeperclusters_windows_leave_the_papers_sizes_at_224_pixels(arch):
    """No forward pass: the maps' sides are those of the geometry."""
    first = 226 if arch == "vgg16wide" else 224
    half = 113 if arch == "vgg16wide" else 112
    sides = [first] * 2 + [half] * 2 + [56] * 3 + [28] * 3 + [14] * 3
    channels = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    values = []
    for layer, side, width in zip(CONVS, sides, channels):
        pooling = make_pooling(arch, layer, (width, side, side), "windows")
        assert (pooling.kernel_size, pooling.stride, pooling.padding) == (pooling.kernel_size,) * 2 + (0,)
        values.append(pooling(torch.zeros(width, side, side)).numel())
    assert values == [9216] * 2 + [8192] * 2 + [9216] * 3 + [8192] * 6


def test_the_remainder_is_cut_off():
    x = torch.rand(1, 512, 14, 14, generator=torch.Generator().manual_seed(0))
    pooled = make_pooling("vgg16", "conv13", (512, 14, 14), "windows")(x)
    assert pooled.shape == (1, 512, 4, 4)
    torch.testing.assert_close(pooled[..., 3, 3], x[..., 9:12, 9:12].mean((2, 3)))
    again = x.clone()
    again[..., 12:, :] = again[..., 12:] = 100.0
    assert torch.equal(make_pooling("vgg16", "conv13", (512, 14, 14), "windows")(again), pooled)


def test_windows_shrink_to_small_maps_and_are_refused_elsewhere():
    assert make_pooling("vgg16", "conv1", (64, 16, 16), "windows")(torch.zeros(64, 16, 16)).shape == (
        64,
        1,
        1,
    )
    for arch, layer in (("resnet50", "layer4"), ("alexnet", "conv1")):
        with refuses(f"--pooling windows: made for VGG-16's convolutions, not {layer} of {arch}"):
            make_pooling(arch, layer, (8, 7, 7), "windows")


def test_swavs_poolings_are_one_value_a_channel_or_8192_of_the_last_map():
    net = models.build("resnet50", seed=0)
    layers = [*net.maps, "avgpool"]
    assert Frozen(net, layers, 224, CPU, "global").values == [64, 256, 512, 1024, 2048, 2048]
    trunk = Frozen(net, layers, 224, CPU, "overlapping")
    assert trunk.values[-2:] == [8192, 2048] and trunk.shapes[-2] == (2048, 2, 2)
    x = torch.rand(1, 2048, 7, 7, generator=torch.Generator().manual_seed(0))
    pooled = trunk.pools[-2](x)
    torch.testing.assert_close(pooled[..., 0, 1], x[..., 0:6, 1:7].mean((2, 3)))
    torch.testing.assert_close(pooled, F.avg_pool2d(x, 6, 1))
