"""Short runs of eval_voc_detection.py and eval_voc_segmentation.py."""

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint
import distributed
import eval_voc_detection
import eval_voc_segmentation
import models
from evaluation.detector import Detector
from training import steps

OWN = {
    eval_voc_detection: "--image-size 48 --max-size 72 --warmup 0 --lr 0.01",
    eval_voc_segmentation: "--image-size 32 --lr 0.05",
}


def arguments(script: ModuleType, vocdir: Path, exp: Path, *flags: str) -> argparse.Namespace:
    base = f"--model random:tiny --workers 0 --device cpu --epochs 2 --batch 3 {OWN[script]}".split()
    return script.get_parser().parse_args([*base, "--vocdir", str(vocdir), "--exp", str(exp), *flags])


def run(script: ModuleType, vocdir: Path, exp: Path, *flags: str) -> dict[str, Any]:
    return script.main(arguments(script, vocdir, exp, *flags))


def parts(script: ModuleType, exp: Path) -> dict[str, Any]:
    """What the checkpoint holds of the model and its optimiser."""
    saved = checkpoint.read(exp / script.CHECKPOINT)
    return {"parts": saved["parts"], "optimizer": saved["optimizer"], "iteration": saved["iteration"]}


def few_regions(monkeypatch) -> None:
    """Detectors of fewer regions: as quick as the tiny network itself."""
    build = Detector.__init__

    def smaller(self, *args, **options):
        build(self, *args, **options)
        self.rcnn.rpn._post_nms_top_n = {"training": 40, "testing": 40}
        self.rcnn.roi_heads.fg_bg_sampler.batch_size_per_image = 16

    monkeypatch.setattr(Detector, "__init__", smaller)


def on_a_rank(vocdir: Path, finished: Path, exp: Path) -> dict[str, Any]:
    """What one of several ranks gets: finished runs evaluated again, and both trained for an epoch."""
    from tests import tiny

    tiny.register()
    distributed.shutdown = lambda: None  # several runs in one group
    found = {}
    for script in OWN:
        own = finished / script.METHOD
        found[script.METHOD] = run(script, vocdir, own, "--resume", "auto")
        found[f"{script.METHOD} trained"] = run(script, vocdir, exp / script.METHOD, "--epochs", "1")
    return found


def with_colours(path: Path) -> Path:
    """A checkpoint of the tiny network that was trained with a mean and std of its own."""
    inputs = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 0.2]}
    state = models.build("tiny", seed=1).state_dict()
    checkpoint.save(path, {"arch": "tiny", "state_dict": state, "args": {}, "inputs": inputs})
    return path


def record_colours(script: ModuleType, monkeypatch) -> list[tuple]:
    """(mean, std) of every batch that is normalised, in training and in the test."""
    seen = []
    for module in (script, steps):
        call = module.to_input
        monkeypatch.setattr(module, "to_input", lambda *args, call=call: seen.append(args[2:]) or call(*args))
    return seen
