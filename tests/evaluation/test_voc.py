"""evaluation/voc.py: VOC's lists, ignored labels, what trains, average precisions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

import models
from data import ImageList
from evaluation import voc
from tests.helpers import refuses
from tests.voc_folder import CLASSES, make_voc

SIZE = 32


@pytest.fixture(scope="module")
def vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


def small_split(labels: np.ndarray) -> voc.VocSplit:
    images = ImageList(Path("nowhere"), [f"{i}.jpg" for i in range(len(labels))])
    names = [f"class{c}" for c in range(labels.shape[1])]
    return voc.VocSplit("test", images, labels.astype(np.int8), names)


# ---------------------------------------------------------------------------------------- lists


def test_split_names_what_is_trained_and_what_tested(vocdir):
    trained, tested = voc.open_voc(vocdir, "train")
    assert (trained.name, tested.name, len(trained), len(tested)) == ("train", "val", 24, 24)
    trained, tested = voc.open_voc(vocdir, "trainval")
    assert (trained.name, tested.name, len(trained), len(tested)) == ("trainval", "test", 48, 24)
    assert not set(trained.images.paths) & set(tested.images.paths)
    assert tested.class_names == sorted(CLASSES)


def test_labels_stand_beside_their_images(vocdir):
    _, tested = voc.open_voc(vocdir, "trainval")
    assert set(np.unique(tested.labels)) == {-1, 0, 1}
    for c, name in enumerate(tested.class_names):
        for line in (vocdir / "ImageSets" / "Main" / f"{name}_test.txt").read_text().splitlines():
            image, label = line.split()
            row = list(tested.images.paths).index(f"{image}.jpg")
            assert tested.labels[row, c] == int(label)
    assert tested.images.path(0) == vocdir / "JPEGImages" / "002000.jpg"


def test_lists_that_order_images_differently_are_matched_by_name(tmp_path):
    root = make_voc(tmp_path, number=4)
    before, _ = voc.open_voc(root, "train")
    path = root / "ImageSets" / "Main" / "rocket_train.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\r\n\n")
    after, _ = voc.open_voc(root, "train")
    assert list(after.images.paths) == list(before.images.paths)
    assert np.array_equal(after.labels, before.labels)


def edit(name: str, text: str | None):
    """A change of one file of the folder: new text, or removal."""

    def change(root: Path) -> None:
        path = root / name
        path.unlink() if text is None else path.write_text(text)

    return change


def remove_all_lists(root: Path) -> None:
    for path in (root / "ImageSets" / "Main").glob("*_val.txt"):
        path.rename(path.with_suffix(".bak"))


MAIN = "ImageSets/Main/"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(MAIN + "grass_val.txt", None), ["grass_val.txt is missing"]),
        (remove_all_lists, ["coffee_val.txt is missing"]),
        (edit(MAIN + "grass_val.txt", "\n"), ["grass_val.txt lists no image"]),
        (edit(MAIN + "grass_val.txt", "001000 -1\n001001 2\n"), ["grass_val.txt line 2", "001001 2"]),
        (edit(MAIN + "grass_val.txt", "001000\n"), ["grass_val.txt line 1", "001000"]),
        (edit(MAIN + "grass_val.txt", "001000 1\n001000 1\n"), ["001000 is listed twice"]),
        (edit(MAIN + "grass_val.txt", "../x 1\n"), ["grass_val.txt line 1", "no name of an image"]),
        (
            edit(MAIN + "grass_val.txt", "001000 1\n"),
            ["coffee_val.txt lists 001001 and grass_val.txt does not"],
        ),
        (edit("JPEGImages/001002.jpg", None), ["001002.jpg does not exist", "1 of 4"]),
    ],
)
def test_bad_folder_is_refused_in_one_line_that_names_the_thing(tmp_path, change, words):
    root = make_voc(tmp_path, number=4)
    change(root)
    for word in words:
        with refuses(word):
            voc.open_voc(root, "train")


def test_folder_without_voc_in_it_is_refused(tmp_path):
    with refuses("ImageSets/Main is missing"):
        voc.open_voc(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    with refuses("no list of a class"):
        voc.open_voc(tmp_path, "train")


def test_state_of_a_split_knows_other_images_and_other_labels(tmp_path):
    root = make_voc(tmp_path, number=4)
    trained, tested = voc.open_voc(root, "train")
    trained.load_state_dict(voc.open_voc(root, "train")[0].state_dict())
    with refuses("other images or labels"):
        trained.load_state_dict(tested.state_dict())
    path = root / MAIN / "grass_train.txt"
    path.write_text(path.read_text().replace(" 1", " 0", 1))
    with refuses("other images or labels"):
        trained.load_state_dict(voc.open_voc(root, "train")[0].state_dict())


# ---------------------------------------------------------------------------------------- loss


def test_loss_is_summed_over_classes_and_images():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = torch.tensor([[1, -1, 0], [-1, 0, 1]], dtype=torch.int8)
    by_hand = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.0)), math.log(2), math.log1p(math.exp(2.0))]
    assert voc.voc_loss(logits, labels).item() == pytest.approx(sum(by_hand), rel=1e-6)


def test_ignored_labels_give_no_loss_and_no_gradient():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(-1, 2, (6, 5), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    voc.voc_loss(logits, labels).backward()
    assert (labels == 0).any() and (labels != 0).any()
    assert torch.all(logits.grad[labels == 0] == 0)
    assert torch.all(logits.grad[labels != 0] != 0)
    assert torch.all(logits.grad[labels == 1] < 0) and torch.all(logits.grad[labels == -1] > 0)
    assert voc.voc_loss(torch.tensor([[4.0, 4.0]]), torch.tensor([[0, 0]])).item() == 0


# ---------------------------------------------------------------------------------------- the network


def linears(net: models.Network) -> list[nn.Linear]:
    return [layer for layer in net.parts()[1].modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(("arch", "number"), [("tiny", 2), ("toy", 1), ("resnet18s", 0)])
def test_classifier_is_drawn_anew_from_the_seed(arch, number):
    first, second, other = (models.build(arch, num_clusters=7, seed=3) for _ in range(3))
    old = models.build(arch, num_clusters=7, seed=3)
    for net, seed in ((first, 31), (second, 31), (other, 32)):
        voc.renew(net, 100, seed)
    assert first.top_layer.weight.shape == (100, first.feature_dim)
    assert len(linears(first)) == number
    for i, layer in enumerate([*linears(first), first.top_layer]):
        assert torch.all(layer.bias == 0.1)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert torch.equal(layer.weight, [*linears(second), second.top_layer][i].weight)
        assert not torch.equal(layer.weight, [*linears(other), other.top_layer][i].weight)
    for layer, before in zip(linears(first), linears(old)):
        assert not torch.equal(layer.weight, before.weight)
    kept, was = first.parts()[0].state_dict(), old.parts()[0].state_dict()
    assert kept and all(torch.equal(value, was[name]) for name, value in kept.items())


@pytest.mark.parametrize("arch", ["tiny", "resnet18s"])
def test_batch_norm_uses_and_keeps_its_global_statistics_while_training(arch):
    net = models.build(arch, num_clusters=4, seed=1)
    before = {name: value.clone() for name, value in net.named_buffers()}
    wrapped = voc.GlobalStatistics(net).train()
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    last = net.maps[-1]
    alone, together = net.activations(x[:1], [last])[last], net.activations(x, [last])[last]
    assert torch.allclose(alone[0], together[0], rtol=1e-4, atol=1e-5)  # not by the batch
    wrapped(x)
    assert before and all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    dropout = any(isinstance(layer, nn.Dropout) for layer in net.modules())
    assert torch.equal(wrapped(x), wrapped(x)) != dropout
    assert torch.equal(wrapped.eval()(x), wrapped(x))


# ---------------------------------------------------------------------------------------- metrics


def test_ap_is_sklearns_on_the_images_that_are_not_ignored():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(-1, 2, (60, 5)), rng.normal(size=(60, 5)).astype(np.float32)
    results = voc.average_precisions(scores, small_split(labels))
    expected = []
    for c in range(5):
        kept = labels[:, c] != 0
        expected.append(100 * average_precision_score(labels[kept, c] == 1, scores[kept, c]))
        assert results["AP"][f"class{c}"] == pytest.approx(expected[-1])
    assert results["mAP"] == pytest.approx(np.mean(expected))
    other = np.where(labels == 0, 1e6, scores)  # where they rank does not matter
    assert voc.average_precisions(other, small_split(labels)) == results


def test_class_without_positives_is_left_out_of_the_mean():
    split = small_split(np.array([[1, -1], [-1, 0], [1, -1]]))
    results = voc.average_precisions(np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]]), split)
    assert results["AP"]["class1"] is None and results["AP_11point"]["class1"] is None
    assert results["mAP"] == results["AP"]["class0"] == pytest.approx(100 * (1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        ("1000", 1.0),
        ("0001", 1 / 4),
        ("1010", (6 * 1 + 5 * 2 / 3) / 11),  # recall 0.5 at precision 1, recall 1 at 2/3
        ("0101", (6 * 1 / 2 + 5 * 1 / 2) / 11),
        ("0110", 2 / 3),  # the precision that comes later counts backwards
        # 10 positives: recall 0.3 is reached by the third, exactly.
        ("111" + "0" * 7 + "1" * 7, (4 * 1 + 7 * 10 / 17) / 11),
    ],
)
def test_eleven_point_metric_by_hand(ranking, expected):
    present = np.array([mark == "1" for mark in ranking])
    scores = np.linspace(1, 0, len(ranking))
    shuffled = np.random.default_rng(0).permutation(len(ranking))
    assert voc.eleven_point(present[shuffled], scores[shuffled]) == pytest.approx(expected)


def test_pessimistic_ties_put_positives_behind_what_scores_within_1e5_of_them():
    """A positive 1e-6 above a negative, another far above, and a difficult one: ranks 1 and 2, or 1 and 3."""
    labels = np.array([[1], [-1], [1], [0]])
    near, split = np.array([[0.500001], [0.5], [2.0], [9.0]]), small_split(labels)
    usual, late = (voc.average_precisions(near, split, ties) for ties in (False, True))
    assert usual["mAP"] == pytest.approx(100)
    assert late["mAP"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert (usual["mAP_11point"], late["mAP_11point"]) == pytest.approx((100, 100 * (6 + 5 * 2 / 3) / 11))
    equal = np.array([[200], [200], [300], [900]], dtype=np.float32)  # where float32 would not hold 1e-5
    assert voc.average_precisions(equal, split, True)["mAP_11point"] == pytest.approx(late["mAP_11point"])
    apart = np.array([[0.6], [0.5], [2.0], [9.0]])
    assert voc.average_precisions(apart, split, True) == voc.average_precisions(apart, split, False)
