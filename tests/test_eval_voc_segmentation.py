"""eval_voc_segmentation.py: what it tests, the whole way, several ranks of both transfers."""

import json

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import data
import eval_voc_segmentation as script
import models
from evaluation.segmentation import CLASSES, Segmenter, count_pixels, open_masks
from features import Pass
from tests import ranks
from tests.helpers import equal, refuses
from tests.transfer_runs import OWN, on_a_rank, parts, record_colours, run, with_colours
from tests.voc_scenes import LABELS, make_scenes
from training.steps import Steps
from util import Log

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """5 images in each of train and val; one of them upright."""
    return make_scenes(tmp_path_factory.mktemp("scenes"), number=5)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """EXP and results of a whole run. To be read only."""
    exp = tmp_path_factory.mktemp("finished") / "exp"
    return exp, run(script, scenes, exp)


def test_defaults_are_torchvisions_reference():
    args = script.get_parser().parse_args(["--vocdir", "VOC2012", "--model", "x.pth.tar"])
    assert (args.epochs, args.batch, args.lr, args.momentum, args.wd) == (30, 8, 0.01, 0.9, 1e-4)
    assert (args.image_size, args.freeze) == (480, False)
    assert data.segmentation_side(480) == 520


def test_bad_mask_is_named_before_training(tmp_path):
    root = make_scenes(tmp_path, number=2)
    (root / "SegmentationClass" / "001001.png").write_bytes(b"")
    with refuses(r"1 of 2 images of val cannot be decoded"):
        run(script, root, tmp_path / "exp")
    assert not (tmp_path / "exp" / script.CHECKPOINT).exists()
    with refuses("ImageSets/Segmentation is missing"):
        run(script, tmp_path, tmp_path / "exp")


def test_whole_images_are_tested_at_their_own_size(scenes):
    _, tested = open_masks(scenes)
    segmenter = Segmenter(models.build("tiny", seed=1), True, seed=2).eval()
    segmenter.head[4].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    found = script.test(segmenter, tested, 40, Pass(1, 0, CPU), Log(quiet=True))
    expected = torch.zeros_like(found)
    for i in range(len(tested)):
        image, mask = tested.decode(i)[:3], tested.decode(i)[3]
        x = data.to_input(data.whole_image(40, 640)(image)[None], CPU)
        with torch.no_grad():
            logits = segmenter.head(segmenter.trunk(x)["out"])
        large = F.interpolate(logits, size=mask.shape, mode="bilinear")
        expected += count_pixels(large[0].argmax(0), mask)
    assert torch.equal(found, expected) and (found.sum(0) > 0).sum() > 1


def test_results_stand_beside_their_protocol(finished):
    exp, results = finished
    stored = json.loads((exp / "results.json").read_text())["eval_voc_segmentation"]
    assert stored["results"] == json.loads(json.dumps(results))
    assert (stored["protocol"]["images"], stored["protocol"]["epochs"]) == ("5 -> 5", 2)
    there = {name for name, iou in results["IoU"].items() if iou is not None}
    assert there == {"background", *(CLASSES[label] for label in LABELS.values())}
    text = (exp / script.LOG).read_text()
    assert "left out of the mean: bicycle, bird" in text
    assert f"pixel accuracy {results['pixel accuracy']:.2f}" in text


def test_resumed_run_is_the_same_bit_for_bit(scenes, finished, tmp_path):
    class Stop(Exception):
        pass

    def stop_in_the_second_epoch(steps, batch, total, iteration, stop, step=Steps.step):
        if iteration == 3:
            raise Stop
        return step(steps, batch, total, iteration, stop)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Steps, "step", stop_in_the_second_epoch)
        run(script, scenes, tmp_path, "--checkpoint-every", "3")
    torch.manual_seed(77)
    results = run(script, scenes, tmp_path, "--resume", "auto", "--checkpoint-every", "3")
    exp, expected = finished
    assert results == expected and equal(parts(script, tmp_path), parts(script, exp))
    with refuses("freeze False, not True"):
        run(script, scenes, tmp_path, "--resume", "auto", "--freeze")


def test_frozen_trunk_does_not_move(scenes, tmp_path):
    run(script, scenes, tmp_path, "--freeze", "--epochs", "1", "--wd", "0.1")
    trained = parts(script, tmp_path)["parts"]["segmenter"]
    start = Segmenter(models.weights.random_network("random:tiny", 31), True, 0).state_dict()
    assert all(torch.equal(trained[name], start[name]) for name in start if name.startswith("trunk."))
    assert not torch.equal(trained["head.4.bias"], start["head.4.bias"])


@pytest.mark.slow
def test_two_ranks_do_what_one_does(scenes, tmp_path):
    alone = {s.METHOD: run(s, scenes, tmp_path / "alone" / s.METHOD, "--epochs", "1") for s in OWN}
    whole = {s.METHOD: run(s, scenes, tmp_path / "whole" / s.METHOD) for s in OWN}
    first, second = ranks.spawn(on_a_rank, 2, scenes, tmp_path / "whole", tmp_path / "pair")
    assert first == second
    for name, results in whole.items():  # evaluated by two: the same to the bit
        assert first[name] == results
    assert first["voc_segmentation trained"]["mIoU"] == pytest.approx(
        alone["voc_segmentation"]["mIoU"], abs=0.5
    )
    one, two = (
        checkpoint.read(tmp_path / where / "voc_segmentation" / script.CHECKPOINT)["parts"]["segmenter"]
        for where in ("alone", "pair")
    )
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)


def test_images_are_normalised_by_the_checkpoints_mean_and_std(scenes, tmp_path, monkeypatch):
    model, seen = with_colours(tmp_path / "model.pth.tar"), record_colours(script, monkeypatch)
    run(script, scenes, tmp_path / "exp", "--model", str(model), "--epochs", "1")
    assert len(seen) == 2 + 5 and set(seen) == {((0.5, 0.4, 0.3), (0.25, 0.5, 0.2))}
    stored = json.loads((tmp_path / "exp" / "results.json").read_text())["eval_" + script.METHOD]
    assert stored["protocol"]["mean, std"] == "0.5 0.4 0.3, 0.25 0.5 0.2"
