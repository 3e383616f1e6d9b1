"""eval_voc_classif.py: VOC's lists, ignored labels, what trains, resuming, crops, AP, and the whole way."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models.trunk import FEATURE_DIM, DeepClusterNet, Pool, conv_block
from PIL import Image
from sklearn.metrics import average_precision_score

import checkpoint
import data
import demo
import eval_voc_classif as voc
import models
from util import UserError

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("coffee", "grass", "retina", "rocket")  # photographs in demo/pictures
SIZE = 32


# ---------------------------------------------------------------------------------------- material


def crop(name: str, columns: str, seed: int) -> Image.Image:
    """A 64-pixel crop from the left ("train") or the right ("val") part of a photograph."""
    with Image.open(demo.PICTURES / f"{name}.jpg") as picture:
        return demo.cut_crop(picture, demo.regions(picture.width)[columns], seed).resize((64, 64))


def write_list(voc_folder: Path, name: str, labels: dict[str, int]) -> None:
    """As in the real data set: the image, then a sign or a blank, then the digit."""
    text = "".join(f"{image} {label:2d}\n" for image, label in labels.items())
    (voc_folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


def make_voc(folder: Path, number: int = 24) -> Path:
    """A VOC2007 folder: `number` images in each of train, val, test; every third image shows two classes.

    The second class of such an image is sometimes 'difficult' (0). Pixels of test are in no other split.
    """
    root = folder / "VOC2007"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for s, split in enumerate(("train", "val", "test")):
        part = "val" if split == "test" else "train"
        labels[split] = {name: {} for name in CLASSES}
        for i in range(number):
            image = f"{1000 * s + i:06d}"
            first, second = CLASSES[i % 4], CLASSES[(i + 1) % 4]
            picture = crop(first, part, seed=1000 * s + i)
            present = {first: 1}
            if i % 3 == 0:
                picture.paste(crop(second, part, seed=i).crop((0, 0, 24, 64)), (40, 0))
                present[second] = 0 if i % 2 else 1
            picture.save(root / "JPEGImages" / f"{image}.jpg", quality=90)
            for name in CLASSES:
                labels[split][name][image] = present.get(name, -1)
    for name in CLASSES:
        both = labels["train"][name] | labels["val"][name]
        for split, column in {**{s: labels[s][name] for s in labels}, "trainval": both}.items():
            write_list(root, f"{name}_{split}", column)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in column))
    return root


@pytest.fixture(scope="module")
def vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


def tiny(sobel: bool, num_clusters: int | None = None, seed: int | None = None) -> DeepClusterNet:
    """The project's kind of network, small: 2 convs with batch norm, dropout, one linear layer."""
    features = [
        *conv_block(2 if sobel else 3, 8, kernel=5, stride=2, padding=2),
        Pool(3, 2),
        *conv_block(8, 8, kernel=3, padding=1),
        Pool(3, 2),
    ]
    classifier = [torch.nn.Dropout(0.5), torch.nn.Linear(8 * 4, FEATURE_DIM), torch.nn.ReLU()]
    return DeepClusterNet("tiny", features, classifier, 2, sobel, num_clusters, seed)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A checkpoint of a tiny network as the training leaves it: batch-norm statistics and a head of 7."""
    monkeypatch.setitem(models.ARCHITECTURES, "tiny", tiny)
    net = tiny(False, 7, seed=1)
    for layer in net.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.fill_(0.1)
            layer.running_var.fill_(0.5)
    checkpoint.save(tmp_path / "model.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    return tmp_path / "model.pth.tar"


def arguments(vocdir: Path, model: Path | None, exp: Path, *flags: str) -> argparse.Namespace:
    base = ["--vocdir", str(vocdir), "--exp", str(exp), "--image-size", str(SIZE), "--workers", "0"]
    base += ["--device", "cpu", "--nit", "5", "--batch", "7"]
    return voc.get_parser().parse_args(base + (["--model", str(model)] if model else []) + list(flags))


def small_split(labels: np.ndarray) -> voc.VocSplit:
    images = data.ImageList(Path("nowhere"), [f"{i}.jpg" for i in range(len(labels))])
    names = [f"class{c}" for c in range(labels.shape[1])]
    return voc.VocSplit("test", images, labels.astype(np.int8), names)


# ---------------------------------------------------------------------------------------- lists


def test_defaults_are_the_papers():
    args = voc.get_parser().parse_args([])
    assert (args.nit, args.stepsize, args.lr, args.wd) == (80000, 5000, 0.003, 1e-6)
    assert (args.momentum, args.batch, args.seed, args.image_size) == (0.9, 16, 31, 224)
    assert (args.split, args.fc6_8, args.train_batchnorm, args.eval_random_crops) == ("train", 1, 0, 1)


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
    with pytest.raises(UserError) as error:
        voc.open_voc(root, "train")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_folder_without_voc_in_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="ImageSets/Main is missing"):
        voc.open_voc(tmp_path, "train")
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(UserError, match="no list of a class"):
        voc.open_voc(tmp_path, "train")


@pytest.mark.parametrize("name", ["000003.jpg", "001002.jpg"])
def test_damaged_image_is_named_before_training(tmp_path, model, name):
    root = make_voc(tmp_path, number=4)
    path = root / "JPEGImages" / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=rf"1 of 4 images .*{name}: "):
        voc.main(arguments(root, model, tmp_path / "exp"))
    assert not (tmp_path / "exp" / voc.CHECKPOINT).exists()


@pytest.mark.parametrize(
    "flags",
    [("--nit", "0"), ("--batch", "0"), ("--lr", "nan"), ("--lr", "-1"), ("--wd", "-6"), ("--momentum", "1"),
     ("--checkpoint-every", "0"), ("--workers", "-1"), ("--image-size", "8")],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(vocdir, tmp_path, flags):
    with pytest.raises(UserError, match=f"^{flags[0]} "):
        voc.main(arguments(vocdir, None, tmp_path, *flags))


def test_missing_model_and_folder_are_refused(vocdir, tmp_path):
    with pytest.raises(UserError, match="--model is missing"):
        voc.main(arguments(vocdir, None, tmp_path))
    args = arguments(vocdir, None, tmp_path)
    args.vocdir = None
    with pytest.raises(UserError, match="--vocdir is missing"):
        voc.main(args)


# ---------------------------------------------------------------------------------------- loss


def test_loss_is_summed_over_classes_and_averaged_over_images():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = torch.tensor([[1, -1, 0], [-1, 0, 1]], dtype=torch.int8)
    by_hand = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.0)), math.log(2), math.log1p(math.exp(2.0))]
    assert voc.voc_loss(logits, labels).item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_ignored_labels_give_no_gradient():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(-1, 2, (6, 5), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    voc.voc_loss(logits, labels).backward()
    assert (labels == 0).any() and (labels != 0).any()
    assert torch.all(logits.grad[labels == 0] == 0)
    assert torch.all(logits.grad[labels != 0] != 0)
    assert torch.all(logits.grad[labels == 1] < 0) and torch.all(logits.grad[labels == -1] > 0)


def test_image_with_nothing_but_ignored_labels_still_counts_in_the_mean():
    logits = torch.tensor([[1.0, -2.0], [4.0, 4.0]])
    one = voc.voc_loss(logits[:1], torch.tensor([[1, -1]]))
    assert voc.voc_loss(logits, torch.tensor([[1, -1], [0, 0]])).item() == pytest.approx(one.item() / 2)


# ---------------------------------------------------------------------------------------- the network


def test_classifier_is_drawn_anew_from_the_seed():
    first, second, other = (tiny(False, 7, seed=3) for _ in range(3))
    old = first.classifier[1].weight.clone()
    for net, seed in ((first, 31), (second, 31), (other, 32)):
        voc.renew_classifier(net, 5, seed)
    assert first.top_layer.weight.shape == (5, FEATURE_DIM)
    for layer in (first.classifier[1], first.top_layer):
        assert torch.all(layer.bias == 0.1)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not torch.equal(first.classifier[1].weight, old)
    assert torch.equal(first.classifier[1].weight, second.classifier[1].weight)
    assert torch.equal(first.top_layer.weight, second.top_layer.weight)
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)


ALL_PARTS = {"conv", "norm", "classifier", "head"}


def moved_parts(before: dict[str, torch.Tensor], net: DeepClusterNet) -> set[str]:
    """Which parts of the network differ from an earlier state_dict."""
    norms = {
        f"features.{i}" for i, layer in enumerate(net.features) if isinstance(layer, torch.nn.BatchNorm2d)
    }
    moved = set()
    for name, value in net.state_dict().items():
        if torch.equal(value, before[name]):
            continue
        part = "statistics" if "running" in name or "num_batches" in name else name.rpartition(".")[0]
        part = "norm" if part in norms else part.partition(".")[0]
        moved.add({"features": "conv", "top_layer": "head"}.get(part, part))
    return moved


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize(
    ("fc6_8", "train_batchnorm", "expected"),
    [
        (1, 0, {"classifier", "head"}),
        (1, 1, {"classifier", "head", "norm"}),
        (0, 0, ALL_PARTS),
        (0, 1, ALL_PARTS),
    ],
)
def test_only_what_should_train_moves(vocdir, tmp_path, fc6_8, train_batchnorm, expected, sobel):
    net = tiny(sobel, 7, seed=1)
    voc.renew_classifier(net, 4, seed=31)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = ("--fc6_8", str(fc6_8), "--train_batchnorm", str(train_batchnorm), "--lr", "0.1", "--wd", "0.01")
    args = arguments(vocdir, tmp_path / "model", tmp_path, *flags)
    trained, _ = voc.open_voc(vocdir, "train")
    voc.train(net, trained, args, None, tmp_path, voc.Log(quiet=True))
    assert moved_parts(before, net) == expected  # statistics and Sobel in no case


def test_dropout_is_on_and_batch_norm_uses_global_statistics():
    net = tiny(False, 4, seed=1)
    voc.train_mode(net)
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    alone, together = net.activations(x[:1], ["pool"])["pool"], net.activations(x, ["pool"])["pool"]
    assert torch.allclose(alone[0], together[0], rtol=1e-4, atol=1e-6)  # not by the batch
    assert not torch.allclose(net(x), net(x))


# ---------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("iteration", "lr"), [(0, 0.003), (4999, 0.003), (5000, 0.0015), (9999, 0.0015), (10000, 0.00075)]
)
def test_learning_rate_is_halved_every_stepsize(iteration, lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert voc.set_learning_rate(optimizer, 0.003, iteration, 5000) == pytest.approx(lr)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_gradient_norm_is_clipped_at_ten():
    net = tiny(False, 4, seed=1)
    voc.freeze(net, fc6_8=True, train_batchnorm=False)
    voc.train_mode(net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    x = 1e4 * torch.ones(2, 3, SIZE, SIZE)
    voc.train_step(net, optimizer, x, torch.ones(2, 4, dtype=torch.int8), 0)
    step = math.sqrt(sum(((p - old) ** 2).sum().item() for p, old in zip(net.parameters(), before)))
    assert step == pytest.approx(10.0, rel=1e-3)


def test_loss_that_is_not_finite_stops_and_changes_nothing():
    net = tiny(False, 4, seed=1)
    voc.freeze(net, fc6_8=True, train_batchnorm=False)
    voc.train_mode(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UserError, match=r"nan.* at iteration 1234;"):
        x = torch.full((1, 3, SIZE, SIZE), math.nan)
        voc.train_step(net, optimizer, x, torch.ones(1, 4, dtype=torch.int8), 1234)
    assert moved_parts(before, net) == set()


def visits(split: voc.VocSplit, args: argparse.Namespace, first: int = 0) -> list[tuple]:
    """(iteration, crops, labels) of every batch."""
    return list(voc.batches(split, args, first))


def test_every_epoch_visits_every_image_once_in_another_order(vocdir, tmp_path):
    trained, _ = voc.open_voc(vocdir, "train")
    orders = [voc.epoch_order(len(trained), 31, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    # 24 images in batches of 7: four iterations an epoch, the last of 3 images.
    seen = visits(trained, arguments(vocdir, None, tmp_path, "--nit", "9"))
    assert [iteration for iteration, _, _ in seen] == list(range(9))
    assert [len(images) for _, images, _ in seen] == [7, 7, 7, 3, 7, 7, 7, 3, 7]
    assert np.array_equal(torch.cat([labels for _, _, labels in seen[:4]]), trained.labels[orders[0]])
    assert np.array_equal(torch.cat([labels for _, _, labels in seen[4:8]]), trained.labels[orders[1]])


def test_batches_do_not_depend_on_where_the_run_began_nor_on_workers(vocdir, tmp_path):
    trained, _ = voc.open_voc(vocdir, "train")
    args = arguments(vocdir, None, tmp_path, "--nit", "6")
    whole = visits(trained, args)
    args.workers = 2
    for (i, images, labels), (j, same_images, same_labels) in zip(whole[2:], visits(trained, args, 2)):
        assert i == j and torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_training_sees_the_crops_of_vocs_protocol(vocdir, tmp_path):
    trained, _ = voc.open_voc(vocdir, "train")
    (_, images, _), *_ = visits(trained, arguments(vocdir, None, tmp_path, "--nit", "1"))
    view = data.TrainView(trained.images, SIZE, seed=31, epoch=0, transform=data.voc_train_crop(SIZE))
    order = voc.epoch_order(len(trained), 31, 0)
    assert torch.equal(images, torch.stack([view[position, order[position]][0] for position in range(7)]))


def test_crops_are_squares_of_10_to_50_percent_of_the_area(vocdir, tmp_path):
    """Pixels that tell their own place show which square was taken."""
    height, width, size = 90, 120, 8
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None, :].expand(height, width)
    place = torch.stack([rows, columns, rows])
    torch.manual_seed(0)
    views = torch.cat([voc.random_crops(size)(place) for _ in range(20)]).float()  # (200, 3, 8, 8)
    tall = (views[:, 0, -1, 0] - views[:, 0, 0, 0]) * size / (size - 1)  # pixels between the outer rows
    wide = (views[:, 1, 0, -1] - views[:, 1, 0, 0]) * size / (size - 1)
    assert torch.all((tall - wide.abs()).abs() <= 4)
    share = tall * wide.abs() / (height * width)
    assert 0.08 < share.min() < 0.15 and 0.4 < share.max() < 0.55
    assert 60 < int((wide < 0).sum()) < 140  # mirrored


def state(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)["state_dict"]


@pytest.mark.parametrize("fc6_8", ["0", "1"])
def test_resumed_run_equals_uninterrupted_run(vocdir, tmp_path, model, fc6_8):
    flags = ("--nit", "11", "--stepsize", "4", "--lr", "0.01", "--fc6_8", fc6_8, "--train_batchnorm", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = voc.main(arguments(vocdir, model, whole, *flags))

    class Stop(Exception):
        pass

    def stop_after_seven(net, optimizer, x, labels, iteration, step=voc.train_step):
        if iteration == 7:
            raise Stop
        return step(net, optimizer, x, labels, iteration)

    # Stopped in the second epoch, after the checkpoint of iteration 6, with one more step taken and lost.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(voc, "train_step", stop_after_seven)
        voc.main(arguments(vocdir, model, parts, *flags, "--checkpoint-every", "3"))
    saved = parts / voc.CHECKPOINT
    assert checkpoint.read(saved)["iteration"] == 6
    results = voc.main(arguments(vocdir, None, parts, *flags, "--resume", str(saved)))

    assert results == expected
    final = checkpoint.read(saved)
    for name, value in state(whole / voc.CHECKPOINT).items():
        assert torch.equal(value, final["state_dict"][name]), name
    scores = [np.load(exp / voc.SCORES)["scores"] for exp in (whole, parts)]
    assert np.array_equal(*scores)


def test_checkpoint_goes_on_only_with_the_same_settings(vocdir, tmp_path, model):
    exp = tmp_path / "exp"
    voc.main(arguments(vocdir, model, exp))
    resume = ("--resume", str(exp / voc.CHECKPOINT))
    for flags, words in (
        (("--batch", "8"), "batch 7, not 8"),
        (("--fc6_8", "0"), "fc6_8 1, not 0"),
        (("--train_batchnorm", "1"), "train_batchnorm 0, not 1"),
        (("--split", "trainval"), "split train, not trainval"),
        (("--seed", "1"), "seed 31, not 1"),
        (("--nit", "4"), "more than --nit 4"),
        (("--model", str(exp / "other.pth.tar")), "other.pth.tar"),
    ):
        with pytest.raises(UserError, match=words):
            voc.main(arguments(vocdir, None, exp, *resume, *flags))
    with pytest.raises(UserError, match="other images or labels"):
        voc.main(arguments(make_voc(tmp_path, number=4), None, exp, *resume))
    with pytest.raises(UserError, match=r"not a voc_classif\.pth\.tar"):
        voc.main(arguments(vocdir, None, exp, "--resume", str(model)))
    voc.main(arguments(vocdir, model, exp, *resume, "--lr", "0.002", "--nit", "6"))
    assert "lr was 0.003 and is 0.002" in (exp / voc.LOG).read_text()


def test_unfinished_run_is_not_overwritten_and_a_finished_one_is(vocdir, tmp_path, model):
    voc.main(arguments(vocdir, model, tmp_path / "exp"))
    voc.main(arguments(vocdir, model, tmp_path / "exp", "--nit", "2"))
    unfinished = checkpoint.read(tmp_path / "exp" / voc.CHECKPOINT) | {"iteration": 1}
    checkpoint.save(tmp_path / "exp" / voc.CHECKPOINT, unfinished)
    with pytest.raises(UserError, match=r"unfinished run, 1 of 2 iterations; go on with --resume"):
        voc.main(arguments(vocdir, model, tmp_path / "exp"))


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


def test_class_without_positives_is_left_out_of_the_mean(capsys):
    labels = np.array([[1, -1], [-1, 0], [1, -1]])
    split = small_split(labels)
    results = voc.average_precisions(np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]]), split)
    assert results["AP"]["class1"] is None and results["AP_11point"]["class1"] is None
    assert results["mAP"] == results["AP"]["class0"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    voc.print_table(results, split, voc.Log())
    assert "left out of the means: class1" in capsys.readouterr().out


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


# ---------------------------------------------------------------------------------------- evaluation


def test_fixed_crops_are_scored_one_by_one_and_summed(vocdir, tmp_path):
    _, tested = voc.open_voc(vocdir, "train")
    net = tiny(False, 4, seed=1).eval()
    args = arguments(vocdir, None, tmp_path, "--eval_random_crops", "0")
    scores = voc.predict(net, tested, args, voc.Log(quiet=True))
    for i in (0, 23):
        views = data.ten_crops(SIZE)(data.decode(tested.images.path(i)))
        with torch.no_grad():
            expected = sum(net(data.normalise(view[None]))[0] for view in views)
        assert np.allclose(scores[i], expected, rtol=1e-4, atol=1e-5)


def test_random_crops_depend_on_seed_and_image_alone(vocdir, tmp_path):
    _, tested = voc.open_voc(vocdir, "train")
    net = tiny(False, 4, seed=1)

    def predict(*flags: str) -> np.ndarray:
        return voc.predict(net, tested, arguments(vocdir, None, tmp_path, *flags), voc.Log(quiet=True))

    scores = predict()
    torch.manual_seed(1)
    assert np.array_equal(predict(), scores)
    assert np.allclose(predict("--batch", "5", "--workers", "1"), scores, rtol=1e-4, atol=1e-5)
    assert not np.allclose(predict("--seed", "1"), scores, rtol=1e-3)
    assert not np.allclose(predict("--eval_random_crops", "0"), scores, rtol=1e-3)


# ---------------------------------------------------------------------------------------- end to end


def test_trained_classifier_beats_shuffled_labels_by_far(tmp_path, model, capsys):
    """The whole way; pixels of the tested part of each photograph are in no training image."""
    root, exp = make_voc(tmp_path, number=32), tmp_path / "exp"
    flags = ("--split", "trainval", "--nit", "120", "--batch", "16", "--lr", "0.01", "--stepsize", "60")
    results = voc.main(arguments(root, model, exp, *flags, "--fc6_8", "0"))
    out = capsys.readouterr().out
    stored = json.loads((exp / "results.json").read_text())["eval_voc_classif"]
    assert stored["results"] == json.loads(json.dumps(results))
    protocol = stored["protocol"]
    assert protocol["split"] == "trainval -> test" and protocol["images"] == "64 -> 32"
    assert protocol["layers"].startswith("all layers") and protocol["iterations"] == 120
    assert "10 random" in protocol["crops"]
    for words in ("eval_voc_classif protocol: ", "11-point AP", "72.0 mAP", "70.4 mAP", "published"):
        assert words in out

    saved = np.load(exp / voc.SCORES)
    assert list(saved["classes"]) == sorted(CLASSES) and saved["images"][0] == "002000"
    tested = voc.open_voc(root, "trainval")[1]
    assert voc.average_precisions(saved["scores"], tested)["mAP"] == pytest.approx(results["mAP"])
    rng = np.random.default_rng(0)
    shuffled = [voc.average_precisions(rng.permutation(saved["scores"]), tested)["mAP"] for _ in range(20)]
    assert results["mAP"] > np.mean(shuffled) + 30
    assert results["mAP"] > max(shuffled) + 10


@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("eval_voc_classif.sh", "--fc6_8 1 {} --nit 80000 --stepsize 5000 --lr 0.003 --batch 16"),
        ("eval_voc_classif_fc6_8.sh", "--fc6_8 1 {} --nit 150000 --stepsize 5000 --lr 0.003 --batch 16"),
        ("eval_voc_classif_all.sh", "--fc6_8 0 {} --nit 150000 --stepsize 20000 --lr 0.001 --batch 16"),
    ],
)
def test_shell_scripts_pass_the_papers_settings(vocdir, tmp_path, model, script, own):
    recorder = tmp_path / "recorder"
    recorder.write_text('#!/bin/sh\necho "$*" >"$0.calls"\n')
    recorder.chmod(0o755)
    settings = {"VOC": str(vocdir), "MODEL": str(model), "PYTHON": str(recorder), "WORKERS": "3"}
    own = own.format("--train_batchnorm 1 --eval_random_crops 1")
    base = {"PATH": os.environ["PATH"]}
    subprocess.run([ROOT / script, "--seed", "5"], env=base | settings, cwd=tmp_path, check=True)
    call = (tmp_path / "recorder.calls").read_text().strip()
    assert call == (
        f"{ROOT}/eval_voc_classif.py --vocdir {vocdir} --model {model} --split trainval {own} "
        "--exp exp --workers 3 --seed 5"
    )
    del settings["VOC"], settings["MODEL"]
    subprocess.run(
        [ROOT / script, vocdir, model], env=base | settings | {"LR": "1"}, cwd=tmp_path, check=True
    )
    assert "--lr 1 " in (tmp_path / "recorder.calls").read_text()
    result = subprocess.run([ROOT / script, vocdir], env=base | settings, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "MODEL=" in result.stderr
    help_text = subprocess.run([ROOT / script, "--help"], env=base, capture_output=True, text=True).stdout
    assert "TRAIN_BATCHNORM=1" in help_text and "set -euo" not in help_text


def test_script_runs_an_alexnet_from_its_shell_script(vocdir, tmp_path):
    """As a user would: a Sobel AlexNet in the authors' form (DataParallel names), image size 64."""
    net = models.build("alexnet", sobel=True, num_clusters=3, seed=0)
    names = {name.replace("features.", "features.module."): value for name, value in net.state_dict().items()}
    torch.save({"epoch": 1, "arch": "alexnet", "state_dict": names}, tmp_path / "authors.pth.tar")
    settings = {
        "VOC": vocdir,
        "MODEL": tmp_path / "authors.pth.tar",
        "EXP": tmp_path,
        "PYTHON": sys.executable,
    }
    settings |= {"NIT": "3", "WORKERS": "2", "BATCH": "8"}
    result = subprocess.run(
        [ROOT / "eval_voc_classif_fc6_8.sh", "--image-size", "64", "--device", "cpu"],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "results.json").read_text())["eval_voc_classif"]
    assert stored["protocol"]["sobel"] is True and stored["protocol"]["arch"] == "alexnet"
    assert stored["protocol"]["layers"] == "fc6-8 trained, batch norm scale and shift trained too"
    assert set(stored["results"]["AP"]) == set(CLASSES)


def test_user_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "eval_voc_classif.py", "--vocdir", tmp_path, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("eval_voc_classif.py: ") and result.stderr.count("\n") == 1
