import numpy as np
import pytest
import torch

import clustering
import features
import models
from data import normalise
from util import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    net = models.build("alexnet", sobel=True, num_clusters=4, seed=2)
    with torch.no_grad():
        for module in net.features:
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        net(torch.randn(8, 3, 64, 64))
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)


def batches(images, size, order=None):
    order = torch.arange(len(images)) if order is None else order
    return [(images[index], index) for index in order.split(size)]


def plain(net, images, layer="fc7.pre"):
    """The slow, obviously right way: float64, batch norm as it stands, one image at a time."""
    double = models.build("alexnet", sobel=True, num_clusters=4).double().eval()
    double.load_state_dict(net.state_dict())
    with torch.no_grad():
        rows = [
            double.activations(normalise(image[None]).double(), [layer])[layer].flatten() for image in images
        ]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("layer", ["fc7.pre", "conv3", "conv4.pre"])
def test_features_equal_the_plain_forward_in_float64(net, images, layer):
    found, broken = features.extract_features(net, batches(images, 4), layer, len(images), CPU)
    expected = plain(net, images, layer)
    assert found.dtype == np.float32 and broken == []
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_rows_stand_in_data_set_order_whatever_the_order_of_batches(net, images):
    straight, _ = features.extract_features(net, batches(images, 4), "fc7.pre", len(images), CPU)
    shuffled = batches(images, 3, torch.randperm(len(images)))
    found, _ = features.extract_features(net, shuffled, "fc7.pre", len(images), CPU)
    assert np.allclose(found, straight, atol=1e-4 * np.abs(straight).max())


def test_the_network_is_left_as_it_was(net, images):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features.extract_features(net, batches(images, 4), "fc7.pre", len(images), CPU)
    assert net.training and net.features[1].training and net.classifier[0].training
    assert isinstance(net.features[1], torch.nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_broken_images_are_listed_and_the_others_keep_their_rows(net, images):
    loader = batches(images, 4)
    loader[1][1][2] = -1 - 6
    found, broken = features.extract_features(net, loader, "fc7.pre", len(images), CPU)
    assert broken == [6]
    assert not found[6].any() and found[[5, 7]].any(axis=1).all()


def test_float16_features_are_the_rounded_float32_ones(net, images):
    full, _ = features.extract_features(net, batches(images, 4), "fc7.pre", len(images), CPU)
    half, _ = features.extract_features(
        net, batches(images, 4), "fc7.pre", len(images), CPU, dtype=np.float16
    )
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))


@pytest.mark.skipif(not features.cpu_has_amx(), reason="bf16 on a CPU needs AMX")
def test_bf16_keeps_directions_and_neighbours(net):
    """Not labels: k-means is chaotic. Pairwise cosines move by well under a hundredth, the loss hardly."""
    images = torch.nn.functional.interpolate(torch.rand(60, 3, 8, 8) * 255, 64, mode="bilinear").to(
        torch.uint8
    )
    exact, _ = features.extract_features(net, batches(images, 20), "fc7.pre", 60, CPU)
    fast, _ = features.extract_features(net, batches(images, 20), "fc7.pre", 60, CPU, precision="bf16")
    losses = [
        clustering.kmeans(clustering.preprocess(x, 16)[1], k=6, seed=1).objective for x in (exact, fast)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    exact, fast = (x - x.mean(0) for x in (exact, fast))
    cosines = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (exact, fast)]
    cosines = [x @ x.T for x in cosines]
    assert np.abs(cosines[0] - cosines[1]).mean() < 0.01
    nearest = [np.argsort(-(c - 2 * np.eye(60)), axis=1)[:, :5] for c in cosines]
    overlap = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*nearest)])
    assert overlap > 0.9


def test_precisions_that_make_no_sense_are_refused(monkeypatch):
    with pytest.raises(UserError, match="tf32"):
        features.set_precision("tf32", CPU)
    with pytest.raises(UserError, match="fp8"):
        features.set_precision("fp8", CPU)
    monkeypatch.setattr(features, "cpu_has_amx", lambda: False)
    with pytest.raises(UserError, match="AMX"):
        features.set_precision("bf16", CPU)


def test_a_network_can_still_be_exported_after_a_precision_was_set():
    """torch.export reads the TF32 switches in a way that fails when only its newer ones were set."""
    features.set_precision("fp32", torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.mkldnn.enabled
