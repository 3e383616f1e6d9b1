"""VOC classification by protocol: what a preset sets is what runs, resumed bit for bit."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)

import json

import pytest

import checkpoint
import data
import eval_voc_classif as script
import models
from tests.helpers import equal, refuses
from tests.voc_runs import SIZE, arguments, model, small_vocdir, state  # noqa: F401

DEEPER = ["--protocol", "deepercluster"]


@pytest.mark.parametrize(
    "flags, decay, halving",
    [([], 1e-6, 5000), (DEEPER, 1e-5, 20_000), ([*DEEPER, "--fc6_8", "0"], 1e-4, 10_000)],
)
def test_what_a_protocol_sets_is_what_runs(small_vocdir, model, tmp_path, monkeypatch, flags, decay, halving):
    seen, inner = {}, script.Run.train_pass

    def train_pass(run, net, optimizers, view, order, loss, *, schedule, clip):
        seen.update(
            decay=optimizers[0].param_groups[0]["weight_decay"], clip=clip, boxes=view.transform.keywords
        )
        seen["rates"] = [schedule(halving - 1), schedule(halving)]
        return inner(run, net, optimizers, view, order, loss, schedule=schedule, clip=clip)

    monkeypatch.setattr(script.Run, "train_pass", train_pass)
    script.main(arguments(small_vocdir, model, tmp_path / "exp", *flags))
    assert (seen["decay"], seen["clip"], seen["rates"]) == (decay, 10.0, [0.003, 0.0015])
    area, squares = ((0.08, 1.0), (3 / 4, 4 / 3)), ((0.1, 0.5), (1.0, 1.0))
    boxes = seen["boxes"]["boxes"]
    assert (tuple(boxes.scale), tuple(boxes.ratio)) == (area if flags else squares)
    protocol = json.loads((tmp_path / "exp/results.json").read_text())["eval_voc_classif"]["protocol"]
    name = "deepcluster" if not flags else "deepercluster" if len(flags) == 2 else "deepercluster, all layers"
    assert protocol["protocol"] == (
        f"{name}, but nit 5 instead of {150000 if flags else 80000}, batch 7 instead of 16"
    )
    assert ("1e-5 off the positives" in protocol["AP"]) == bool(flags)


def test_a_protocols_run_goes_on_bit_for_bit_and_keeps_to_it(small_vocdir, model, tmp_path):
    whole = script.main(arguments(small_vocdir, model, tmp_path / "whole", *DEEPER))
    script.main(arguments(small_vocdir, model, tmp_path / "parts", *DEEPER, "--nit", "3"))
    again = script.main(arguments(small_vocdir, model, tmp_path / "parts", *DEEPER, "--resume"))
    assert again == whole and equal(state(tmp_path / "whole"), state(tmp_path / "parts"))
    with refuses("was run with train_crop area, not squares"):
        script.main(arguments(small_vocdir, model, tmp_path / "parts", "--nit", "9", "--resume"))


def test_random_crops_of_the_test_are_those_of_the_protocol(small_vocdir, model, tmp_path, monkeypatch):
    areas = []
    monkeypatch.setattr(script, "random_crops", lambda crop: areas.append(crop) or data.ten_crops(SIZE))
    script.main(arguments(small_vocdir, model, tmp_path / "exp", *DEEPER, "--nit", "1"))
    assert tuple(areas[0].keywords["boxes"].scale) == (0.08, 1.0)
    flags = ("--eval_random_crops", "false", "--nit", "1")
    script.main(arguments(small_vocdir, model, tmp_path / "other", *DEEPER, *flags))
    assert len(areas) == 1


def test_released_swav_network_is_trained_and_tested_with_its_own_std(small_vocdir, tmp_path):
    net = models.build("tiny", seed=1)
    net.set_embedding(8, 6, 5, seed=2)
    checkpoint.save(tmp_path / "swav.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    script.main(arguments(small_vocdir, tmp_path / "swav.pth.tar", tmp_path / "exp", "--nit", "1"))
    trained = checkpoint.read(tmp_path / "exp" / script.CHECKPOINT)
    assert trained["inputs"]["std"] == [0.228, 0.224, 0.225] and trained["args"]["image_size"] == SIZE
