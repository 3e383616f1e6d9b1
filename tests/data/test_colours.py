"""The changes of colours: torchvision's draws, its pixels to one level, and a Gaussian that is one."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from data.colours import BLUR_SIGMA, BLUR_TAPS, ColourChange, Colours, as_floats, blurred, jittered

NOTHING = {"jitter": 0, "grey": 0, "blur": 0}


def picture(side=48, seed=0):
    """Smooth colours with noise, lying in memory as decoded ones do."""
    rng = np.random.default_rng(seed)
    ramps = rng.integers(0, 256, 3) + np.add.outer(np.arange(side), np.arange(side))[..., None] * rng.uniform(
        -2, 2, 3
    )
    noisy = np.clip(ramps + rng.integers(-30, 30, (side, side, 3)), 0, 255)
    return torch.from_numpy(noisy.astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "which, name, factors",
    [
        (0, "brightness", [0.2, 0.9, 1.8]),
        (1, "contrast", [0.2, 0.9, 1.8]),
        (2, "saturation", [0.2, 0.9, 1.8]),
        (3, "hue", [-0.2, -0.05, 0.0, 0.1, 0.2]),
    ],
)
def test_each_change_gives_torchvisions_pixels_to_one_level(which, name, factors):
    for factor in factors:
        settings = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, name: factor}
        for seed in range(5):
            x = picture(seed=seed)
            changed = jittered(
                as_floats(x), torch.tensor([which]), **{f"{k}_factor": v for k, v in settings.items()}
            )
            expected = getattr(functional, f"adjust_{name}")(x, factor)
            assert (changed - expected.float()).abs().max() <= 1


def test_hue_of_every_edge_of_the_cube_of_colours():
    steps = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).reshape(3, -1, 52)
    ones = {"brightness_factor": 1.0, "contrast_factor": 1.0, "saturation_factor": 1.0}
    for factor in (-0.5, -0.2, 0.13, 0.5):
        found = jittered(as_floats(cube), torch.tensor([3]), **ones, hue_factor=factor)
        expected = functional.adjust_hue(cube, factor).float()
        assert (found - expected).abs().max() <= 1 and found.min() >= 0 and found.max() <= 255


def test_all_changes_draw_as_torchvisions_do():
    """Step after step on uint8: where a step is off by a level the next ones may make more of it."""
    plain = v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        v2.RandomApply([v2.Grayscale(3)], 0.2),
        v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, BLUR_SIGMA)], 0.5),
    ])  # fmt: skip
    ours, differences = ColourChange(Colours()), []
    for seed in range(60):
        x = picture(seed=seed)
        torch.manual_seed(seed)
        expected = plain(x)
        torch.manual_seed(seed)
        found = ours(x)
        assert found.dtype == torch.uint8 and found.shape == x.shape
        differences.append((found.int() - expected.int()).abs())
    differences = torch.stack(differences)
    assert (differences <= 1).float().mean() > 0.999 and (differences == 0).float().mean() > 0.97
    assert differences.max() <= 6


@pytest.mark.parametrize("which, share", [("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)])
def test_how_often_colours_change(which, share):
    change = ColourChange(Colours(**(NOTHING | {which: share})))
    x = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    changed = sum(change(x) is not x for _ in range(10_000))
    assert abs(changed / 10_000 - share) < 3 * (share * (1 - share) / 10_000) ** 0.5


def test_without_strength_nothing_is_jittered():
    x = picture()
    change = ColourChange(Colours(strength=0, jitter=1, grey=0, blur=0))
    assert all(change(x) is x for _ in range(20))


@pytest.mark.parametrize("side", [64, 24, 16])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_of_23_taps(side, sigma):
    x, taps = picture(side), min(BLUR_TAPS, 2 * (side // 2) - 1)
    offsets = np.arange(taps) - taps // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    expected = x.numpy().astype(np.float64)
    for axis in (1, 2):
        expected = correlate1d(expected, weights / weights.sum(), axis=axis, mode="mirror")
    assert np.abs(blurred(as_floats(x), sigma).numpy() - expected).max() <= 0.501  # rounded
