"""eval_voc_detection.py: what it trains on, what it finds, the whole way."""

import json

import numpy as np
import pytest
import torch

import eval_voc_detection as script
import models
from data import IMAGENET_MEAN, IMAGENET_STD
from evaluation.detection import Detections, average_precisions
from evaluation.detector import Detector
from evaluation.objects import check, open_objects
from features import Pass
from tests.helpers import equal, refuses
from tests.transfer_runs import arguments, few_regions, parts, record_colours, run, with_colours
from tests.voc_scenes import OBJECTS, make_scenes
from training.steps import Steps
from util import Log

CPU, COLOURS = torch.device("cpu"), (IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    few_regions(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """5 images in each of train, val, test; one of them upright."""
    return make_scenes(tmp_path_factory.mktemp("scenes"), number=5)


@pytest.fixture(scope="module")
def split(scenes):
    trained, _ = open_objects(scenes, "trainval")
    check(trained, 1)
    return trained


def test_defaults_are_torchvisions_reference():
    args = script.get_parser().parse_args(["--vocdir", "VOC2007", "--model", "x.pth.tar"])
    assert (args.epochs, args.batch, args.lr, args.lr_steps, args.warmup) == (26, 16, 0.02, [16, 22], 1000)
    assert (args.momentum, args.wd, args.image_size, args.max_size) == (0.9, 1e-4, 800, 1333)
    assert (args.split, args.head, args.freeze) == ("trainval", None, False)
    for flags, freeze in (("--freeze", True), ("--finetune", False)):
        assert script.get_parser().parse_args(["--vocdir", "v", "--model", "m", flags]).freeze is freeze
    with refuses("not allowed with"):
        script.get_parser().parse_args(["--vocdir", "v", "--model", "m", "--freeze", "--finetune"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-size", "40"), "--max-size 40: is below --image-size 48"),
        (("--head", "fpn"), "--head fpn: is for ResNets"),
        (("--model", "nowhere.pth.tar"), "nowhere.pth.tar: no such checkpoint file"),
        (("--vocdir", "nowhere"), "nowhere/ImageSets/Main is missing"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(scenes, tmp_path, flags, words):
    with refuses(words):
        run(script, scenes, tmp_path / "exp", *flags)
    assert not (tmp_path / "exp").exists()


def test_damaged_image_is_named_before_training(tmp_path):
    root = make_scenes(tmp_path, number=2)
    path = root / "JPEGImages" / "002001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with refuses(r"1 of 2 images of test .*002001.jpg: "):
        run(script, root, tmp_path / "exp")


def test_targets_are_resized_and_flipped_and_lack_what_is_difficult(split):
    i = next(i for i, o in enumerate(split.objects) if o.difficult.any())
    easy = split.objects[i].boxes[0]  # the second one is difficult
    height, width = split.sizes[i]
    target = script.target(split, i, (height // 2, width // 4), False, CPU)
    assert target["labels"].tolist() == [split.objects[i].labels[0] + 1]
    assert target["boxes"][0].tolist() == pytest.approx([easy[0] / 4, easy[1] / 2, easy[2] / 4, easy[3] / 2])
    target = script.target(split, i, (height, width), True, CPU)
    assert target["boxes"].tolist() == [[width - easy[2], easy[1], width - easy[0], easy[3]]]


def test_training_sees_whole_images_flipped_by_seed_epoch_and_item(scenes, split, tmp_path, monkeypatch):
    batches = []
    step = Steps.step

    def recorded(steps, batch, *args):
        batches.append(batch)
        return step(steps, batch, *args)

    monkeypatch.setattr(Steps, "step", recorded)
    run(script, scenes, tmp_path / "exp")
    flips = {}
    for b, batch in enumerate(batches):
        for view, i, flip in zip(batch.views, batch.index.tolist(), batch.more[0].tolist()):
            to = script.fitted(*split.sizes[i], 48, 72)
            whole = script.whole_image(48, 72)(split.images.decode(i))
            assert torch.equal(view[:, : to[0], : to[1]], whole.flip(-1) if flip else whole)
            flips[(b // 3, i)] = flip  # ten images in batches of three, the last one of four
    assert len(flips) == 20 and 4 < sum(flips.values()) < 16
    assert any(flips[0, i] != flips[1, i] for i in range(10))


class Right(torch.nn.Module):
    """A detector that finds what is there, in the pixels of the image that it is given."""

    def __init__(self, split):
        super().__init__()
        self.split, self.next = split, 0

    def forward(self, x, sizes):
        objects = self.split.objects[self.next]
        boxes = torch.from_numpy(objects.boxes * script.scale_of(self.split, self.next, sizes[0]))
        self.next += 1
        return [
            {"boxes": boxes, "labels": torch.from_numpy(objects.labels + 1), "scores": torch.ones(len(boxes))}
        ]


def test_boxes_come_back_in_the_pixels_of_the_image(split):
    found = script.detect(Right(split), split, (40, 500), Pass(1, 0, CPU), COLOURS, Log(quiet=True))
    assert len(found.score) == sum(len(o.labels) for o in split.objects)
    assert np.allclose(found.box, np.concatenate([o.boxes for o in split.objects]), atol=1e-4)
    results = average_precisions(found, split)
    assert results["AP"] == results["AP50_11point"] == 100


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """EXP and results of a whole run. To be read only."""
    exp = tmp_path_factory.mktemp("finished") / "exp"
    with pytest.MonkeyPatch.context() as patch:
        few_regions(patch)
        return exp, run(script, scenes, exp)


def test_results_stand_beside_their_protocol_and_follow_from_what_was_found(scenes, finished):
    exp, results = finished
    stored = json.loads((exp / "results.json").read_text())["eval_voc_detection"]
    assert stored["results"] == json.loads(json.dumps(results))
    protocol = stored["protocol"]
    assert (protocol["split"], protocol["images"], protocol["epochs"]) == ("trainval -> test", "10 -> 5", 2)
    assert protocol["detector"] == "Faster R-CNN, head fc" and protocol["layers"].startswith("all layers")
    assert results["by class"]["AP50"].keys() == set(OBJECTS)
    saved = np.load(exp / script.FOUND)
    _, tested = open_objects(scenes, "trainval")
    found = Detections(*(saved[name] for name in Detections._fields))
    assert saved["images"][0] == "002000" and average_precisions(found, tested) == results
    log = (exp / script.LOG).read_text()
    assert "AP50_11point" in log and "loss " in log


def test_resumed_run_is_the_same_bit_for_bit(scenes, finished, tmp_path):
    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(steps, batch, total, iteration, stop, step=Steps.step):
        if iteration == 5:
            raise Stop
        return step(steps, batch, total, iteration, stop)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Steps, "step", stop_in_the_second_epoch)
        run(script, scenes, tmp_path, "--checkpoint-every", "2")
    assert parts(script, tmp_path)["iteration"] == 4
    torch.manual_seed(77)
    results = run(script, scenes, tmp_path, "--resume", "auto", "--checkpoint-every", "2")
    exp, expected = finished
    assert results == expected and equal(parts(script, tmp_path), parts(script, exp))


def test_checkpoint_goes_on_only_with_the_same_settings(scenes, finished):
    exp, _ = finished
    for flags, words in (
        (("--freeze",), "freeze False, not True"),
        (("--batch", "4"), "batch 3, not 4"),
        (("--max-size", "80"), "max_size 72, not 80"),
        (("--split", "train"), "split trainval, not train"),
    ):
        with refuses(words):
            run(script, scenes, exp, "--resume", str(exp / script.CHECKPOINT), *flags)


def test_frozen_trunk_does_not_move(scenes, tmp_path):
    run(script, scenes, tmp_path, "--freeze", "--lr", "0.1", "--wd", "0.01", "--epochs", "1")
    trained = parts(script, tmp_path)["parts"]["detector"]
    start = Detector(models.weights.random_network("random:tiny", 31), "fc", 3, True, 0).state_dict()
    trunk = {name for name in start if name.startswith("rcnn.backbone.net.features")}
    assert trunk and all(torch.equal(trained[name], start[name]) for name in trunk)
    fc6 = "rcnn.roi_heads.box_head.2.1.weight"
    assert not torch.equal(trained[fc6], start[fc6])


def test_other_arithmetic_and_sobel_networks_work(scenes, tmp_path):
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("no bfloat16 on this processor")
    arguments(script, scenes, tmp_path)
    flags = ("--model", "random:toy:sobel", "--epochs", "1", "--precision", "bf16")
    try:
        results = run(script, scenes, tmp_path, *flags)
    except script.UserError as error:
        pytest.skip(str(error))
    assert 0 <= results["AP50"] <= 100


def test_images_are_normalised_by_the_checkpoints_mean_and_std(scenes, tmp_path, monkeypatch):
    model, seen = with_colours(tmp_path / "model.pth.tar"), record_colours(script, monkeypatch)
    run(script, scenes, tmp_path / "exp", "--model", str(model), "--epochs", "1")
    assert len(seen) == 3 + 5 and set(seen) == {((0.5, 0.4, 0.3), (0.25, 0.5, 0.2))}
    stored = json.loads((tmp_path / "exp" / "results.json").read_text())["eval_" + script.METHOD]
    assert stored["protocol"]["mean, std"] == "0.5 0.4 0.3, 0.25 0.5 0.2"
