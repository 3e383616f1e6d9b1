"""What probes are judged on: folds, VOC's loss and mAP through a probe's pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from data import ImageList
from evaluation.probe_data import VocProbeSplit, divide, fold_of, mean_of_folds
from evaluation.voc import VocSplit
from tests.helpers import refuses


def voc_split(labels: np.ndarray) -> VocProbeSplit:
    images = ImageList(Path("nowhere"), [f"{i}.jpg" for i in range(len(labels))])
    return VocProbeSplit(VocSplit("test", images, labels.astype(np.int8), ["a", "b"]))


@pytest.mark.parametrize("images, folds", [(20, 3), (7, 7), (100, 2)])
def test_folds_are_random_disjoint_and_complete(images, folds):
    numbers = fold_of(images, folds, seed=1)
    parts = [np.flatnonzero(numbers == fold) for fold in range(folds)]
    assert sorted(np.concatenate(parts)) == list(range(images))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert np.array_equal(numbers, fold_of(images, folds, seed=1))
    if images > 10:
        assert not np.array_equal(numbers, fold_of(images, folds, seed=2))
        assert any(np.any(np.diff(part) > folds) for part in parts)  # no blocks, no stripes
    with refuses("--kfold 8: more than the 7 images"):
        fold_of(7, 8, seed=1)


def test_a_fold_is_judged_by_what_trains_on_the_others():
    labels = np.random.default_rng(0).integers(-1, 2, (10, 2))
    split = voc_split(labels)
    seen = []
    for fold in range(3):
        train, judged = divide(split, split, seed=4, folds=3, fold=fold)
        names, held = list(train.images.paths), list(judged["val"].images.paths)
        assert list(judged) == ["val"] and sorted(names + held) == sorted(split.images.paths)
        rows = [int(name.removesuffix(".jpg")) for name in held]
        assert torch.equal(judged["val"].targets, torch.from_numpy(labels[rows].astype(np.int8)))
        assert train.kept is split.split  # the run keeps all of them
        seen += held
    assert sorted(seen) == sorted(split.images.paths)


def test_voc_is_judged_by_summed_losses_and_map_without_the_difficult():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (12, 2))
    labels[0] = 1
    split, logits = voc_split(labels), torch.from_numpy(rng.standard_normal((12, 2))).float()
    meter = split.meter(2)
    for rows in (range(5), range(5, 12)):
        index = torch.tensor(list(rows))
        meter.add([logits[index], -logits[index]], index)
    first, second = meter.records()
    counts = torch.from_numpy(labels != 0)
    each = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels > 0).float(), reduction="none")
    assert first["loss"] == pytest.approx((each * counts).sum().item() / 12, rel=1e-5)
    aps = [
        average_precision_score(labels[kept, c] > 0, logits[kept, c])
        for c, kept in enumerate((labels != 0).T)
    ]
    assert first["mAP"] == pytest.approx(100 * np.mean(aps)) and first["mAP"] != second["mAP"]
    loss = split.loss(logits, split.targets)
    assert loss.item() == pytest.approx((each * counts).sum().item(), rel=1e-5)
    assert split.count(loss, logits, split.targets).tolist() == pytest.approx([loss.item(), 0, 0, 12])


def test_the_mean_of_folds_is_a_layers():
    def result(last, best):
        return {"layer": "conv1", "values": 4, "last": {"val": {"mAP": last}}, "best": {"val": {"mAP": best}}}

    (row,) = mean_of_folds([[result(10.0, 20.0)], [result(30.0, 40.0)]], "mAP")
    assert row["last"] == {"mAP": 20.0, "folds": [10.0, 30.0]} and row["best"]["mAP"] == 30.0
