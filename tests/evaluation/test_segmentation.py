"""evaluation/segmentation.py: masks, dilation, the loss, mean IoU."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import models
from data import VOID, ImageError
from evaluation import segmentation
from evaluation.voc import decoded_sizes
from tests.helpers import refuses
from tests.voc_scenes import LABELS, make_scenes


@pytest.fixture
def scenes(tmp_path):
    return make_scenes(tmp_path, number=2)


def mask_of(scenes, name="000001"):
    return scenes / "SegmentationClass" / f"{name}.png"


# ---------------------------------------------------------------------------------------- masks


def test_masks_are_indexes_of_the_palette_beside_their_images(scenes):
    trained, tested = segmentation.open_masks(scenes)
    assert (len(trained), len(tested), trained.split, tested.split) == (2, 2, "train", "val")
    with Image.open(mask_of(scenes)) as image:
        assert image.mode == "P"
        expected = np.array(image)
    item = trained.decode(1)
    assert item.dtype == torch.uint8 and item.shape == (4, 64, 96)
    assert np.array_equal(item[3], expected)
    assert set(item[3].unique().tolist()) == {0, VOID, LABELS["coffee"], LABELS["rocket"]}
    assert item[:3].float().std() > 20
    assert decoded_sizes(trained, "train", 1).tolist() == [[64, 96]] * 2


def test_grey_masks_hold_labels_too(scenes):
    with Image.open(mask_of(scenes)) as image:
        labels = np.array(image)
    Image.fromarray(labels, "L").save(mask_of(scenes))
    assert np.array_equal(segmentation.read_mask(mask_of(scenes)), labels)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: Image.open(path).convert("RGB").save(path), "000001.png: mode RGB, not the indexes"),
        (lambda path: Image.new("L", (96, 64), 21).save(path), "000001.png: label 21, not 0 to 20 or 255"),
        (lambda path: Image.new("P", (64, 96)).save(path), "64 x 96 pixels, its image 96 x 64"),
        (lambda path: path.write_bytes(b"no picture"), "000001.png: not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "000001.png: "),
    ],
)
def test_bad_mask_is_named(scenes, make, words):
    make(mask_of(scenes))
    images, _ = segmentation.open_masks(scenes)
    with pytest.raises(ImageError, match=words):
        images.decode(1)
    with refuses("1 of 2 images of train cannot be decoded"):
        decoded_sizes(images, "train", 1)


def test_missing_files_are_named(scenes, tmp_path):
    with refuses("ImageSets/Segmentation is missing"):
        segmentation.open_masks(tmp_path)
    mask_of(scenes).unlink()
    with refuses(r"000001.png does not exist but is listed in train.txt \(1 of 2"):
        segmentation.open_masks(scenes)
    (scenes / "ImageSets" / "Segmentation" / "val.txt").unlink()
    (scenes / "ImageSets" / "Segmentation" / "train.txt").write_text("000000\n")
    with refuses("val.txt does not exist"):
        segmentation.open_masks(scenes)


# ---------------------------------------------------------------------------------------- the network


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_dilated_stages_hold_the_values_that_they_had_between_others(arch):
    net = models.build(arch, seed=1).eval()
    x = noise(1, 3, 64, 64)
    with torch.inference_mode():
        before = net.activations(x, net.maps)
        segmentation.dilate(net)
        after = net.activations(x, net.maps)
    for name, by in (("layer2", 1), ("layer3", 2), ("layer4", 4)):
        assert after[name].shape[-1] == before["layer2"].shape[-1]
        assert torch.allclose(after[name][..., ::by, ::by], before[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("arch", "sobel"), [("tiny", True), ("toy", False), ("resnet18s", False)])
@pytest.mark.parametrize("freeze", [False, True])
def test_one_step_moves_what_trains_and_no_statistics_of_the_trunk(arch, sobel, freeze):
    segmenter = segmentation.Segmenter(models.build(arch, sobel, 7, seed=1), freeze, seed=2).train()
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=0.1)
    logits = segmenter(noise(2, 3, 16, 16), (40, 50))
    assert logits.shape == (2, 21, 40, 50)
    mask = torch.randint(0, 21, (2, 40, 50), generator=torch.Generator().manual_seed(3))
    segmentation.segmentation_loss(logits, mask).backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    optimizer.step()
    moved = {name for name, value in segmenter.state_dict().items() if not torch.equal(value, before[name])}
    of_trunk = {name for name in moved if name.startswith("trunk.")}
    assert bool(of_trunk) != freeze and {"head.0.weight", "head.1.running_mean"} <= moved
    assert not any("running" in name or "sobel" in name for name in of_trunk)


def test_it_learns_a_mask():
    segmenter = segmentation.Segmenter(models.build("toy", seed=1), False, seed=2).train()
    x, mask = noise(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    x[:, 0, 4:20, 8:28] += 4
    mask[:, 4:20, 8:28] = 5
    optimizer = torch.optim.SGD(segmenter.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    for _ in range(100):
        optimizer.zero_grad()
        (segmentation.segmentation_loss(segmenter(x, (32, 32)), mask) / 2).backward()
        optimizer.step()
    taken = segmenter.eval()(x, (32, 32)).argmax(1)
    assert segmentation.mean_iou(segmentation.count_pixels(taken, mask))["mIoU"] > 80


# ---------------------------------------------------------------------------------------- loss and mean IoU


def test_loss_is_the_mean_over_pixels_that_count_summed_over_images():
    logits, mask = noise(3, 5, 4, 6), torch.randint(0, 5, (3, 4, 6))
    mask[0, :2], mask[2] = VOID, VOID
    by_hand = [F.cross_entropy(logits[i][:, m != VOID].T, m[m != VOID]) for i, m in enumerate(mask[:2])]
    logits.requires_grad_()
    loss = segmentation.segmentation_loss(logits, mask)
    assert loss.item() == pytest.approx(sum(by_hand).item(), rel=1e-5)
    loss.backward()
    assert not logits.grad[2].any() and not logits.grad[0, :, :2].any() and logits.grad[1].any()


def test_mean_iou_is_that_of_a_count_by_hand():
    rng = np.random.default_rng(0)
    total, pairs = torch.zeros((5, 5), dtype=torch.int64), []
    for _ in range(3):
        mask = rng.choice([0, 1, 2, 4, VOID], (7, 9))  # class 3 is in no mask
        taken = rng.integers(0, 5, (7, 9))
        total += segmentation.count_pixels(torch.from_numpy(taken), torch.from_numpy(mask), classes=5)
        pairs += [(m, t) for m, t in zip(mask.flatten(), taken.flatten()) if m != VOID]
    results = segmentation.mean_iou(total, tuple("abcde"))
    expected = {}
    for c, name in enumerate("abcde"):
        both = sum(m == c and t == c for m, t in pairs)
        either = sum(m == c or t == c for m, t in pairs)
        expected[name] = 100 * both / either if any(m == c for m, _ in pairs) else None
    assert results["IoU"] == pytest.approx(expected)
    there = [iou for iou in expected.values() if iou is not None]
    assert expected["d"] is None and results["mIoU"] == pytest.approx(np.mean(there))
    assert results["pixel accuracy"] == pytest.approx(100 * np.mean([m == t for m, t in pairs]))


def test_right_masks_have_100_and_masks_of_void_nothing():
    mask = torch.tensor([[0, 1], [VOID, 3]])
    assert segmentation.mean_iou(segmentation.count_pixels(mask, mask))["mIoU"] == 100
    nothing = segmentation.count_pixels(mask, torch.full((2, 2), VOID))
    assert segmentation.mean_iou(nothing)["mIoU"] is None
