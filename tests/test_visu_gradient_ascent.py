"""Gradient ascent: the step by hand, the dead ReLU, blur, growth, files, and that batches change nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

import checkpoint
import data
import models
from tests import tiny
from util import UserError
from visu import gradient_ascent as ga

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = ga.Settings(lr=1.0, wd=1e-5, sig=0.4, step=2, niter=5, idim=32, normalised=True)


@pytest.fixture(autouse=True)
def _tiny():
    tiny.register()


def settled(sobel: bool = False) -> models.DeepClusterNet:
    """A tiny net whose batch norm has seen something, in eval mode."""
    net = tiny.tiny(sobel, seed=3).train()
    with torch.no_grad():
        for i in range(20):
            net(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(i)))
    return net.eval()


def saved(folder: Path, net: models.DeepClusterNet) -> Path:
    checkpoint.save(folder / "net.pth.tar", {"arch": net.arch, "state_dict": net.state_dict()})
    return folder / "net.pth.tar"


def run(*flags: str | int | Path) -> list[ga.Ascent]:
    return ga.main(ga.get_parser().parse_args([*map(str, flags), "--device", "cpu"]))


# ---------------------------------------------------------------------------------------- the method


def by_hand(net, conv, channel, settings, seed) -> np.ndarray:
    """The ascent of one filter as evaluation tools describe it, in plain steps on the unchanged network."""
    x = ga.noise(seed, conv, channel, settings.noise, settings)[None]
    for i in range(1, settings.niter + 1):
        x = x.detach().requires_grad_()
        activation = net.activations(x, [f"conv{conv}"])[f"conv{conv}"].mean(dim=(2, 3))[0]
        assert activation[channel] > 0  # else the layer before the ReLU would count
        loss = torch.log_softmax(activation, 0)[channel] - settings.wd * (x**2).sum()
        loss.backward()
        x = (x + settings.lr * x.grad / x.grad.norm()).detach()
        if i % settings.step == 0:
            blurred = [gaussian_filter(colour.double(), settings.sig, mode="nearest") for colour in x[0]]
            x = torch.from_numpy(np.stack(blurred)).float()[None]
    return x.numpy()[0]


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("conv", [1, 2])
def test_equals_the_ascent_by_hand(sobel, conv):
    net = settled(sobel)
    settings = replace(SMALL, wd=1e-2)
    result = next(iter(ga.ascend_layer(net, conv, [3], settings, 31, 1, CPU)))
    x = by_hand(net, conv, 3, settings, 31)
    pixels = x * np.reshape(data.IMAGENET_STD, (3, 1, 1)) + np.reshape(data.IMAGENET_MEAN, (3, 1, 1))
    picture = np.clip((pixels - pixels.mean()) / pixels.std() * 0.1 + 0.5, 0, 1).transpose(1, 2, 0) * 255
    assert np.abs(result.picture - picture).max() < 1.0
    with torch.no_grad():
        end = net.activations(torch.from_numpy(x)[None], [f"conv{conv}"])[f"conv{conv}"][0, 3].mean()
    assert result.end == pytest.approx(float(end), rel=1e-3)


def test_step_has_length_lr_for_every_image():
    g = torch.randn(3, 3, 8, 8) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1, 1)
    torch.testing.assert_close(ga.unit(g).flatten(1).norm(dim=1), torch.ones(3))
    assert torch.equal(ga.unit(torch.zeros(2, 3, 8, 8)), torch.zeros(2, 3, 8, 8))


def test_weight_decay_is_in_the_gradient():
    net = ga.prepare(settled())
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 5])
    without, with_decay = (ga.gradient(net, 2, x, target, wd) for wd in (0.0, 0.5))
    torch.testing.assert_close(without - with_decay, x, atol=1e-5, rtol=1e-4)


def test_dead_filter_is_driven_by_the_layer_before_its_relu():
    net = settled()
    with torch.no_grad():
        net.features[1].bias[4] = -6.0  # dead in noise
    frozen = ga.prepare(net)
    x = ga.noise(31, 1, 4, ga.NOISE_STD, SMALL)[None]
    before, after = ga.mean_activations(frozen, 1, x)
    assert after[0, 4] == 0 and before[0, 4] < 0
    assert ga.gradient(frozen, 1, x, torch.tensor([4]), 0.0).abs().max() > 0
    result = next(iter(ga.ascend_layer(net, 1, [4], replace(SMALL, lr=20.0, niter=60), 31, 1, CPU)))
    assert result.noise == 0 and result.end > 0.5


def test_only_dead_images_of_a_batch_use_the_layer_before():
    net = settled()
    with torch.no_grad():
        net.features[1].bias[4] = -6.0
    frozen = ga.prepare(net)
    x = torch.cat([ga.noise(31, 1, c, ga.NOISE_STD, SMALL)[None] for c in (4, 2)])
    both = ga.gradient(frozen, 1, x, torch.tensor([4, 2]), 0.0)
    alone = ga.gradient(frozen, 1, x[1:], torch.tensor([2]), 0.0)
    torch.testing.assert_close(both[1:], alone, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 2.5])
def test_blur_equals_scipy(sigma):
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    matrix = ga.blur_matrix(20, sigma).double()
    expected = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose((matrix @ x @ matrix.T).numpy(), expected, atol=1e-6)
    assert torch.equal(ga.blur_matrix(20, 0), torch.eye(20))


def test_noise_has_the_papers_statistics_and_depends_on_seed_layer_and_channel():
    raw = replace(SMALL, normalised=False, idim=224)
    x = ga.noise(31, 1, 7, 20.0, raw)
    assert abs(float(x.mean()) - 128) < 0.3 and abs(float(x.std()) - 20) < 0.2
    torch.testing.assert_close(ga.noise(31, 1, 7, 20.0, replace(raw, normalised=True)), data.normalise(x))
    for other in ((32, 1, 7), (31, 2, 7), (31, 1, 8)):
        assert not torch.equal(ga.noise(*other, 20.0, raw), x)


def test_picture_is_centred_with_std_a_tenth():
    x = torch.randn(2, 3, 40, 40) * torch.tensor([0.01, 50.0]).view(2, 1, 1, 1) + 3
    for picture in ga.to_pictures(x, normalised=False).numpy() / 255:
        assert abs(picture.mean() - 0.5) < 0.003 and abs(picture.std() - 0.1) < 0.002
    outlier = torch.zeros(1, 3, 40, 40)
    outlier[0, :, 0, 0] = 1e6  # far beyond the range after scaling: clipped, not wrapped round
    assert ga.to_pictures(outlier, normalised=False)[0, 0, 0].tolist() == [255, 255, 255]


# ---------------------------------------------------------------------------------------- the faster network


@pytest.mark.parametrize("kernel, stride, border", [(11, 4, 2), (5, 2, 2), (3, 2, 0), (4, 2, 1), (2, 3, 0)])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (16, 29)])
def test_convolution_over_blocks_is_the_strided_one(kernel, stride, border, size):
    conv = nn.Conv2d(3, 6, kernel, stride, border)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(ga.BlockConv(conv)(x), conv(x), atol=1e-5, rtol=1e-5)


def test_prepared_network_gives_the_same_activations_and_leaves_the_original_alone():
    net = models.build("alexnet", True, seed=0).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = ga.prepare(net)
    x = torch.randn(1, 3, 101, 90)
    with torch.no_grad():
        for name in ("sobel", "conv1.pre", "conv3"):
            torch.testing.assert_close(
                prepared.activations(x, [name])[name], net.activations(x, [name])[name], atol=1e-4, rtol=1e-4
            )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(p.requires_grad for p in prepared.features.parameters())


def test_sobel_with_other_weights_stays_as_it_is():
    net = settled(sobel=True)
    assert isinstance(ga.prepare(net).sobel, ga.SlicedSobel)
    with torch.no_grad():
        net.sobel[1].weight[0, 0, 0, 0] = 3
    assert ga.prepare(net).sobel is net.sobel


def test_growth_is_against_the_filters_noise_and_strictly_against_the_layers():
    result = ga.Ascent(channel=0, picture=None, noise=0.1, layer=0.5, end=2.0, even=1.0)
    assert (result.growth, result.strict_growth, result.even_growth) == (20.0, 4.0, 2.0)
    assert replace(result, layer=0.01).strict_growth == 20.0
    assert replace(result, noise=0.0).growth == float("inf")
    assert replace(result, noise=0.0, end=0.0).growth == 0.0


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("group", [1, 4])  # as on a CPU, and as groups work on a GPU
def test_pictures_do_not_depend_on_batch_threads_or_company(group, monkeypatch):
    monkeypatch.setitem(ga.GROUP, "cpu", group)
    net, settings = settled(), replace(SMALL, niter=40)
    channels = list(range(7))

    def pictures(batch, channels=channels):
        found = ga.ascend_layer(net, 2, channels, settings, 31, batch, CPU)
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
    settings = replace(ga.preset(conv, 5, sobel, 64), niter=60)  # a fifth of the preset's iterations
    for result in ga.ascend_layer(net, conv, [0, 31], settings, 31, 2, CPU):
        assert result.growth >= 10 and result.strict_growth >= 10
        assert result.even_growth >= 2  # more than a larger contrast would do


def test_flags_win_over_the_preset_and_no_preset_is_the_usage_text(tmp_path):
    net = settled()

    def settings(*flags):
        args = ga.get_parser().parse_args(["--model", "x", *flags])
        return ga.choose_settings(args, net)

    plain = settings("--no-preset")
    assert (plain.lr, plain.wd, plain.sig, plain.step, plain.niter, plain.idim) == (
        3,
        1e-5,
        0.3,
        5,
        1000,
        224,
    )
    assert plain.noise == 20 and not plain.normalised
    chosen = settings()
    assert chosen.normalised and chosen == ga.preset(1, 2, False, 224)
    given = settings(
        "--lr", "30", "--wd", "0", "--niter", "3000", "--sig", "1", "--step", "2", "--idim", "64"
    )
    assert given == replace(ga.preset(1, 2, False, 64), lr=30.0, wd=0.0, niter=3000, sig=1.0, step=2)


# ---------------------------------------------------------------------------------------- the script


def test_writes_the_named_files_and_a_sheet(tmp_path, capsys):
    path = saved(tmp_path, settled())
    results = run("--model", path, "--conv", 2, "--exp", tmp_path / "e", "--idim", 32, "--niter", 10)
    folder = tmp_path / "e" / "conv2"
    names = {f"layer2-channel{c}.jpeg" for c in range(12)} | {"layer2.jpeg"}
    assert {file.name for file in folder.iterdir()} == names
    for result in results:
        with Image.open(folder / f"layer2-channel{result.channel}.jpeg") as picture:
            assert picture.size == (32, 32) and picture.format == "JPEG"
            assert np.abs(np.asarray(picture, int) - result.picture).mean() < 6  # JPEG of noise
    with Image.open(folder / "layer2.jpeg") as picture:
        assert picture.width > 4 * ga.SHEET_TILE
    out = capsys.readouterr().out
    assert "against that of noise: median x" in out and str(folder / "layer2.jpeg") in out


def test_chosen_filters_only(tmp_path):
    path = saved(tmp_path, settled(sobel=True))
    flags = ("--idim", 32, "--niter", 2, "--no-preset", "--filters", 5, 2, 5)
    assert [r.channel for r in run("--model", path, "--exp", tmp_path, "--conv", 1, *flags)] == [5, 2]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--conv", 3), "--conv 3: tiny has convolutions 1 to 2"),
        (("--conv", 0), "--conv 0"),
        (("--arch", "vgg16"), "--arch vgg16: .* holds tiny"),
        (("--filters", 8), "--filters 8: .* filters 0 to 7"),
        (("--lr", 0), "--lr"),
        (("--wd", "nan"), "--wd"),
        (("--niter", 0), "--niter"),
        (("--batch", 0), "--batch"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    path = saved(tmp_path, settled())
    with pytest.raises(UserError, match=words):
        run("--model", path, "--exp", tmp_path / "e", *flags)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "where, name", [(ROOT, "visu/gradient_ascent.py"), (ROOT / "visu", "gradient_ascent.py")]
)
def test_runs_as_a_script_from_either_folder(tmp_path, where, name):
    command = [sys.executable, name, "--model", str(tmp_path / "missing.pth")]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("missing.pth: no such checkpoint file")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "script, settings, expected",
    [
        ("gradient_ascent.sh", {"ARCH": "alexnet"}, "--model m --arch alexnet --exp e --conv 4 --lr 9"),
        ("activ-retrieval.sh", {"DATA": "d"}, "--model m --exp e --conv 4 --data d --workers 4 --lr 9"),
    ],
)
def test_shell_scripts_pass_their_settings_on(script, settings, expected):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/echo", "MODEL": "m", "EXP": "e", "CONV": "4"}
    result = subprocess.run(
        [f"./{script}", "--lr", "9"],
        cwd=ROOT / "visu",
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(expected)
