"""Gradient ascent: the step by hand, dead filters, blur, growth, and that batches change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

import data
import models
from tests import tiny, toy
from visu import ascent
from visu.layers import first_conv

CPU = torch.device("cpu")
SMALL = ascent.Settings(lr=1.0, wd=1e-5, sig=0.4, step=2, niter=5, idim=32, released=False)


def settled(sobel: bool = False) -> models.Network:
    """A tiny net whose batch norm has seen something, in eval mode."""
    net = tiny.tiny(sobel, seed=3).train()
    with torch.no_grad():
        for i in range(20):
            net(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(i)))
    return net.eval()


# ---------------------------------------------------------------------------------------- the method


def by_hand(net, name, channel, settings, seed, blurs) -> np.ndarray:
    """The ascent of one filter as evaluation tools describe it, in plain steps on the unchanged network."""
    x = ascent.noise(seed, name, channel, settings.noise, settings)[None]
    for i in range(1, settings.niter + 1):
        x = x.detach().requires_grad_()
        activation = net.activations(x, [name])[name].mean(dim=(2, 3))[0]
        assert activation[channel] > 0  # else the layer before the ReLU would count
        loss = torch.log_softmax(activation, 0)[channel] - settings.wd * (x**2).sum()
        loss.backward()
        x = (x + settings.lr * x.grad / x.grad.norm()).detach()
        if i in blurs:
            blurred = [gaussian_filter(colour.double(), settings.sig, mode="nearest") for colour in x[0]]
            x = torch.from_numpy(np.stack(blurred)).float()[None]
    return x.numpy()[0]


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_equals_the_ascent_by_hand(sobel, name):
    net = settled(sobel)
    settings = replace(SMALL, wd=1e-2)
    result = next(iter(ascent.ascend_layer(net, name, [3], settings, 31, 1, CPU)))
    x = by_hand(net, name, 3, settings, 31, blurs={2, 4})
    pixels = x * np.reshape(data.IMAGENET_STD, (3, 1, 1)) + np.reshape(data.IMAGENET_MEAN, (3, 1, 1))
    picture = np.clip((pixels - pixels.mean()) / pixels.std() * 0.1 + 0.5, 0, 1).transpose(1, 2, 0) * 255
    assert np.abs(result.picture - picture).max() < 1.0
    with torch.no_grad():
        end = net.activations(torch.from_numpy(x)[None], [name])[name][0, 3].mean()
    assert result.end == pytest.approx(float(end), rel=1e-3)


def test_as_released_the_start_is_in_pixels_and_the_first_iteration_ends_with_a_blur():
    net = settled()
    settings = replace(SMALL, lr=30.0, wd=0.0, sig=0.8, step=3, niter=5, released=True)
    result = next(iter(ascent.ascend_layer(net, "conv1", [1], settings, 31, 1, CPU)))
    x = by_hand(net, "conv1", 1, settings, 31, blurs={1, 4})
    picture = np.clip((x - x.mean()) / x.std() * 0.1 + 0.5, 0, 1).transpose(1, 2, 0) * 255
    assert np.abs(result.picture - picture).max() < 1.0


@pytest.mark.parametrize(("released", "expected"), [(True, [1, 6, 11]), (False, [5, 10])])
def test_blurs_come_every_step_iterations(released, expected):
    settings = ascent.Settings(released=released)
    assert [i for i in range(1, 15) if settings.blurs_after(i)] == expected
    assert not any(replace(settings, sig=0.0).blurs_after(i) for i in range(1, 15))


def test_step_has_length_lr_for_every_image():
    g = torch.randn(3, 3, 8, 8) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1, 1)
    torch.testing.assert_close(ascent.unit(g).flatten(1).norm(dim=1), torch.ones(3))
    assert torch.equal(ascent.unit(torch.zeros(2, 3, 8, 8)), torch.zeros(2, 3, 8, 8))


def test_weight_decay_is_in_the_gradient():
    net = ascent.prepare(settled())
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 5])
    without, with_decay = (ascent.gradient(net, "conv2", x, target, wd) for wd in (0.0, 0.5))
    torch.testing.assert_close(without - with_decay, x, atol=1e-5, rtol=1e-4)


def dead_fourth(net):
    """net with filter 4 of conv1 dead in noise; by its batch norm alone."""
    with torch.no_grad():
        net.features[1].bias[4] = -6.0
    return net


def test_dead_filter_is_driven_by_what_enters_its_relu():
    net = dead_fourth(settled())
    prepared = ascent.prepare(net)
    x = ascent.noise(31, "conv1", 4, ascent.NOISE_STD, SMALL)[None]
    found = prepared.activations(x, ["conv1.pre", "conv1"])
    assert found["conv1"][0, 4].max() == 0 and found["conv1.pre"][0, 4].max() < 0
    assert ascent.gradient(prepared, "conv1", x, torch.tensor([4]), 0.0).abs().max() > 0
    result = next(iter(ascent.ascend_layer(net, "conv1", [4], replace(SMALL, lr=20.0, niter=60), 31, 1, CPU)))
    assert result.noise == 0 and result.end > 0.5


def test_as_released_a_dead_filter_is_driven_by_its_convolution_before_batch_norm():
    net = dead_fourth(settled(sobel=True))
    x = ascent.noise(31, "conv1", 4, ascent.NOISE_STD, SMALL)[None]
    expected = x.clone().requires_grad_()
    net.features[0](net.sobel(expected)).mean(dim=(2, 3)).log_softmax(dim=1)[0, 4].backward()
    found = ascent.gradient(
        ascent.prepare(net, fold=False), "conv1", x, torch.tensor([4]), 0.0, released=True
    )
    torch.testing.assert_close(found, expected.grad, atol=1e-7, rtol=1e-4)
    other = ascent.gradient(ascent.prepare(net), "conv1", x, torch.tensor([4]), 0.0)
    assert not torch.allclose(found, other, atol=1e-7, rtol=1e-2)


def test_only_dead_images_of_a_batch_use_the_layer_before():
    net = ascent.prepare(dead_fourth(settled()))
    x = torch.cat([ascent.noise(31, "conv1", c, ascent.NOISE_STD, SMALL)[None] for c in (4, 2)])
    both = ascent.gradient(net, "conv1", x, torch.tensor([4, 2]), 0.0)
    alone = ascent.gradient(net, "conv1", x[1:], torch.tensor([2]), 0.0)
    torch.testing.assert_close(both[1:], alone, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 2.5])
def test_blur_equals_scipy(sigma):
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    matrix = ascent.blur_matrix(20, sigma).double()
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose((matrix @ x @ matrix.T).numpy(), expected, atol=1e-6)
    assert torch.equal(ascent.blur_matrix(20, 0), torch.eye(20))


def test_noise_has_the_papers_statistics_and_depends_on_seed_layer_and_channel():
    raw = replace(SMALL, released=True, idim=224)
    x = ascent.noise(31, "conv1", 7, 20.0, raw)
    assert abs(float(x.mean()) - 128) < 0.3 and abs(float(x.std()) - 20) < 0.2
    torch.testing.assert_close(
        ascent.noise(31, "conv1", 7, 20.0, replace(raw, released=False)), data.normalise(x)
    )
    for other in ((32, "conv1", 7), (31, "conv2", 7), (31, "layer1", 7), (31, "conv1", 8)):
        assert not torch.equal(ascent.noise(*other, 20.0, raw), x)


def test_picture_is_centred_with_std_a_tenth():
    x = torch.randn(2, 3, 40, 40) * torch.tensor([0.01, 50.0]).view(2, 1, 1, 1) + 3
    for picture in ascent.to_pictures(x, released=True).numpy() / 255:
        assert abs(picture.mean() - 0.5) < 0.003 and abs(picture.std() - 0.1) < 0.002
    outlier = torch.zeros(1, 3, 40, 40)
    outlier[0, :, 0, 0] = 1e6  # far beyond the range after scaling: clipped, not wrapped round
    assert ascent.to_pictures(outlier, released=True)[0, 0, 0].tolist() == [255, 255, 255]


# ---------------------------------------------------------------------------------------- the faster network


@pytest.mark.parametrize("kernel, stride, border", [(11, 4, 2), (5, 2, 2), (3, 2, 0), (4, 2, 1), (2, 3, 0)])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (16, 29)])
def test_convolution_over_blocks_is_the_strided_one(kernel, stride, border, size):
    conv = nn.Conv2d(3, 6, kernel, stride, border)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(ascent.BlockConv(conv)(x), conv(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: models.build("alexnet", True, seed=0), ("sobel", "conv1.pre", "conv3")),
        (lambda: models.build("resnet18", False, seed=0), ("conv1.pre", "conv1", "layer2")),
        (lambda: toy.toy(True, seed=0), ("a", "b")),
    ],
    ids=["alexnet", "resnet18", "toy"],
)
@pytest.mark.parametrize("fold", [True, False])
def test_prepared_network_gives_the_same_activations_and_leaves_the_original_alone(make, names, fold):
    net = make().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    strided = first_conv(net).stride[0] > 1
    prepared = ascent.prepare(net, fold)
    assert isinstance(first_conv(prepared), ascent.BlockConv) == strided
    x = torch.randn(1, 3, 101, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in names:
            torch.testing.assert_close(
                prepared.activations(x, [name])[name], net.activations(x, [name])[name], atol=1e-4, rtol=1e-4
            )
    assert not isinstance(first_conv(net), ascent.BlockConv)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_weights_get_no_gradient():
    net = settled()
    list(ascent.ascend_layer(net, "conv2", [0], SMALL, 31, 1, CPU))
    assert all(p.grad is None for p in net.parameters())


def test_growth_is_against_the_filters_noise_and_strictly_against_the_layers():
    result = ascent.Ascent(channel=0, picture=None, noise=0.1, layer=0.5, end=2.0, even=1.0)
    assert (result.growth, result.strict_growth, result.even_growth) == (20.0, 4.0, 2.0)
    assert replace(result, layer=0.01).strict_growth == 20.0
    assert replace(result, noise=0.0).growth == float("inf")
    assert replace(result, noise=0.0, end=0.0).growth == 0.0


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("group", [1, 4])  # as on a CPU, and as groups work on a GPU
def test_pictures_do_not_depend_on_batch_threads_or_company(group, monkeypatch):
    monkeypatch.setitem(ascent.GROUP, "cpu", group)
    net, settings = settled(), replace(SMALL, niter=40)
    channels = list(range(7))

    def pictures(batch, channels=channels):
        found = ascent.ascend_layer(net, "conv2", channels, settings, 31, batch, CPU)
        return {result.channel: result for result in found}

    reference = pictures(1)
    assert list(reference) == channels
    threads = torch.get_num_threads()
    try:
        others = [pictures(3), pictures(96), pictures(2, [6, 1])]
        torch.set_num_threads(3)
        others.append(pictures(96))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for other in others:
        for channel, result in other.items():
            np.testing.assert_array_equal(result.picture, reference[channel].picture)
            assert result.end == reference[channel].end
    assert not np.array_equal(reference[0].picture, reference[1].picture)


# ---------------------------------------------------------------------------------------- the preset


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("conv", [1, 2, 3, 4, 5])
def test_preset_grows_the_activation_tenfold_in_every_conv_of_alexnet(sobel, conv):
    net = models.build("alexnet", sobel, seed=0).eval()
    settings = replace(ascent.preset((conv - 1) / 4, sobel, 64), niter=60)  # a fifth of its iterations
    for result in ascent.ascend_layer(net, f"conv{conv}", [0, 31], settings, 31, 2, CPU):
        assert result.growth >= 10 and result.strict_growth >= 10
        assert result.even_growth >= 2  # more than a larger contrast would do


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv1", "layer1", "layer4"])
def test_preset_grows_the_activation_in_a_resnet(name):
    net = models.build("resnet18", False, seed=0).train()
    with torch.no_grad():
        for i in range(20):
            net(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(i)))
    settings = replace(ascent.preset(net.maps.index(name) / 4, False, 64), niter=60)
    for result in ascent.ascend_layer(net, name, [0, 31], settings, 31, 2, CPU):
        assert result.strict_growth >= 3 and result.even_growth >= 1.5
