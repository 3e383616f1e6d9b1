import numpy as np
import pytest
import torch

from data import crops
from data.colours import Colours
from data.crops import random_resized_crop
from data.multicrop import MultiCrop
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


def test_areas_of_crops_lie_in_the_range_of_their_group(monkeypatch):
    areas = []
    monkeypatch.setattr(crops, "_resize_to", lambda box, *_: areas.append(box.shape[1] * box.shape[2]) or box)
    image, transform = (
        torch.zeros(3, 300, 400, dtype=torch.uint8),
        MultiCrop([1, 1], [32, 16], [0.14, 0.05], [1, 0.14], PLAIN),
    )
    for seed in range(300):
        seeded(transform, image, seed)
    shares = np.array(areas).reshape(300, 2) / (300 * 400)
    assert 0.13 < shares[:, 0].min() < 0.2 and shares[:, 0].max() > 0.7
    assert 0.045 < shares[:, 1].min() and shares[:, 1].max() < 0.145


def test_batches_hold_a_stack_for_each_crop(image):
    view = RandomView(Images(image), MultiCrop([2, 1], [32, 16], [0.2, 0.1], [1, 0.2])).at(0, 0)
    items = [view[(p, p)] for p in range(3)]
    batch = collate(items)
    assert [tuple(stack.shape) for stack in batch.views] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)]
    assert torch.equal(batch.views[2][1], items[1][0][2]) and batch.index.tolist() == [0, 1, 2]
