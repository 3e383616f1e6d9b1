import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from data.crops import random_resized_crop
from data.multicrop import BLUR_TAPS, Colours, MultiCrop, colour_transform
from data.views import RandomView, collate, seeded

PLAIN = Colours(jitter=0, grey=0, blur=0)


@pytest.fixture
def image():
    ramp = np.linspace(0, 255, 3 * 90 * 120).reshape(3, 90, 120)
    noise = np.random.default_rng(0).integers(-40, 40, (3, 90, 120))
    return torch.from_numpy(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def test_crops_come_in_the_order_of_the_groups(image):
    crops = MultiCrop([2, 6], [64, 32], [0.14, 0.05], [1, 0.14])(image)
    assert [tuple(crop.shape) for crop in crops] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 6
    assert all(crop.dtype == torch.uint8 for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


def test_without_colours_a_crop_is_the_plain_random_crop(image):
    crops = seeded(MultiCrop([2], [48], [0.2], [0.9], PLAIN), image, 7)
    plain = random_resized_crop(48, (0.2, 0.9), (3 / 4, 4 / 3))
    assert all(map(torch.equal, crops, seeded(lambda i: [plain(i), plain(i)], image, 7)))


@pytest.mark.parametrize("which, share", [("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)])
def test_how_often_colours_change(which, share):
    only = Colours(**({"jitter": 0, "grey": 0, "blur": 0} | {which: share}))
    (step,) = colour_transform(32, only)
    picture = torch.randint(
        0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    torch.manual_seed(0)
    changed = sum(not torch.equal(step(picture), picture) for _ in range(2000))
    # A blur of less than a third of a pixel, a tenth of the draws, changes no whole number.
    unseen = 0.06 if which == "blur" else 0.005
    assert step.p == share
    assert abs(changed / 2000 - share) < 3 * (share * (1 - share) / 2000) ** 0.5 + unseen


def test_grey_has_three_equal_channels(image):
    (crop,) = MultiCrop([1], [32], [0.5], [1], Colours(jitter=0, grey=1, blur=0))(image)
    assert torch.equal(crop[0], crop[1]) and torch.equal(crop[1], crop[2])


def test_blur_is_a_gaussian_of_23_taps(image):
    (step,) = colour_transform(64, Colours(jitter=0, grey=0, blur=1))
    blur = step.transforms[0]
    found = blur.transform(image, {"sigma": [1.5, 1.5]})
    offsets = np.arange(BLUR_TAPS) - BLUR_TAPS // 2
    taps = np.exp(-0.5 * (offsets / 1.5) ** 2)
    taps /= taps.sum()
    expected = image.numpy().astype(np.float64)
    for axis in (1, 2):
        expected = correlate1d(expected, taps, axis=axis, mode="mirror")
    assert np.abs(found.numpy() - expected).max() <= 0.51  # rounding to whole numbers


class Images:
    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 3

    def decode(self, i):
        return self.image.roll(10 * i, dims=2)


def test_crops_depend_on_seed_epoch_and_position_alone(image):
    view = RandomView(Images(image), MultiCrop([2, 1], [32, 16], [0.2, 0.1], [1, 0.2]))
    one, again = (view.at(3, 1)[(5, 2)] for _ in range(2))
    others = [view.at(3, 2)[(5, 2)], view.at(4, 1)[(5, 2)], view.at(3, 1)[(6, 2)]]
    assert all(map(torch.equal, one[0], again[0])) and one[1] == 2
    assert not any(torch.equal(one[0][0], other[0][0]) for other in others)


def test_batches_hold_a_stack_for_each_crop(image):
    view = RandomView(Images(image), MultiCrop([2, 1], [32, 16], [0.2, 0.1], [1, 0.2])).at(0, 0)
    items = [view[(p, p)] for p in range(3)]
    batch = collate(items)
    assert [tuple(stack.shape) for stack in batch.views] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)]
    assert torch.equal(batch.views[2][1], items[1][0][2]) and batch.index.tolist() == [0, 1, 2]
