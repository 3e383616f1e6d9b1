"""What linear probes are trained and judged on: one class an image, or a yes or no for each of several.

Both kinds of split answer the same questions: their images, what a classifier is told of them (`targets`),
the loss, and what a pass is judged by (`meter`, whose `figure` chooses the best epoch).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import distributed
from data import ImageList
from evaluation.labelled import hold_out, open_train_val
from evaluation.probe import Counts, count
from evaluation.voc import VocSplit, average_precisions, check_images, open_voc, voc_loss
from util import Log, UserError, derive_seed


class ClassSplit:
    """Images of one class each: cross-entropy, judged by prec@1 and prec@5."""

    figure, figures = "prec@1", "prec@1 / prec@5 in %"

    def __init__(self, images: ImageList) -> None:
        self.images, self.class_names = images, images.class_names
        self.kept = images  # by the run

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> torch.Tensor:
        """(N,) int64; images may have left."""
        return torch.from_numpy(self.images.classes)

    def keep(self, mask: np.ndarray) -> "ClassSplit":
        """Those of the images where mask (N,) bool is true."""
        return ClassSplit(self.images.keep(mask))

    def loss(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of scores (B, classes) for target (B,), summed: ()."""
        return F.cross_entropy(scores, target, reduction="sum")

    def count(self, loss: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """As probe.count."""
        return count(loss, scores, target)

    def trained(self, record: dict[str, float]) -> dict[str, float]:
        """What a record of the training pass says."""
        return record

    def meter(self, classifiers: int) -> Counts:
        """What judges a pass over these images."""
        return Counts(classifiers, self.targets)


class VocProbeSplit:
    """Images with a yes or no for each class: binary cross-entropy summed over classes, judged by mAP."""

    figure, figures = "mAP", "mAP in %"

    def __init__(self, split: VocSplit, kept: VocSplit | None = None) -> None:
        self.split, self.images, self.class_names = split, split.images, split.class_names
        self.kept = kept or split  # by the run: all images, of which these may be a part

    def __len__(self) -> int:
        return len(self.split)

    @property
    def targets(self) -> torch.Tensor:
        """(N, C) int8: 1 yes, -1 no, 0 ignored."""
        return torch.from_numpy(self.split.labels)

    def keep(self, mask: np.ndarray) -> "VocProbeSplit":
        """Those of the images where mask (N,) bool is true."""
        of = self.split
        part = VocSplit(of.name, of.images.keep(mask), of.labels[mask], of.class_names)
        return VocProbeSplit(part, self.kept)

    def loss(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of scores (B, C) for target (B, C), summed over classes and images: ()."""
        return voc_loss(scores, target)

    def count(self, loss: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(summed loss, 0, 0, images): there are no hits to be counted."""
        zero = loss.new_zeros((), dtype=torch.float64)
        return torch.stack([loss.double(), zero, zero, zero + len(target)])

    def trained(self, record: dict[str, float]) -> dict[str, float]:
        """What a record of the training pass says: the loss."""
        return {"loss": record["loss"]}

    def meter(self, classifiers: int) -> "Scores":
        """What judges a pass over these images."""
        return Scores(classifiers, self.split)


class Scores:
    """Scores of classifiers over a pass, one crop of each image, judged when all are there."""

    def __init__(self, classifiers: int, split: VocSplit) -> None:
        self.split, self.classifiers = split, classifiers
        empty = torch.zeros(0, len(split.class_names))
        self.scores: list[list[torch.Tensor]] = [[empty] for _ in range(classifiers)]

    def add(self, logits: list[torch.Tensor], index: torch.Tensor) -> None:
        """Logits (B, C) of each classifier for the images index (B,), which come in order."""
        for rows, scores in zip(self.scores, logits, strict=True):
            rows.append(scores.cpu())

    def records(self) -> list[dict[str, float]]:
        """Of each classifier over all ranks; all of them have to call it together."""
        labels = torch.from_numpy(self.split.labels)
        found = []
        for rows in self.scores:
            scores = distributed.all_gather_rows(torch.cat(rows).numpy())
            loss = voc_loss(torch.from_numpy(scores), labels).item() / len(scores)
            mean = average_precisions(scores, self.split, pessimistic_ties=True)["mAP"]
            if mean is None:
                raise UserError(f"{self.split.name}: no image there is of any class; there is no mAP")
            found.append({"loss": loss, "mAP": mean})
        return found


Split = ClassSplit | VocProbeSplit


def open_classes(
    folder: str | Path, workers: int, bad_list: Path, skip_bad: bool, log: Log, labels: str | None = None
) -> tuple[ClassSplit, ClassSplit]:
    """DATA/train and DATA/val, or what a file of labels says."""
    train, val = open_train_val(folder, workers, bad_list, skip_bad, log, labels)
    return ClassSplit(train), ClassSplit(val)


def open_yes_no(vocdir: str | Path, split: str, workers: int) -> tuple[VocProbeSplit, VocProbeSplit]:
    """The split of VOC2007 to train on and the one to judge on; every image is decoded once to check it."""
    both = open_voc(vocdir, split)
    for part in both:
        check_images(part, workers)
    train, tested = both
    return VocProbeSplit(train), VocProbeSplit(tested)


def divide(
    train: Split, val: Split, seed: int, fraction: float = 0.0, folds: int | None = None, fold: int = 0
) -> tuple[Split, dict[str, Split]]:
    """(what to train on, what to judge on by name; the last of them chooses the best epoch).

    fraction of train held out; or, of so many folds of train, all but one to train on and that in val's
    place. Raises UserError where the images are too few.
    """
    if folds:
        number = fold_of(len(train), folds, seed)
        return train.keep(number != fold), {"val": train.keep(number == fold)}
    if fraction:
        rest, held = hold_out(train.images, fraction, seed)
        return ClassSplit(rest), {"val": val, "held_out": ClassSplit(held)}
    return train, {"val": val}


def fold_of(images: int, folds: int, seed: int) -> np.ndarray:
    """(N,) int64: the fold of each image, drawn at random; sizes differ by one at most.

    Raises UserError for more folds than images.
    """
    if folds > images:
        raise UserError(f"--kfold {folds}: more than the {images} images there are")
    order = np.random.default_rng(derive_seed(seed, "folds")).permutation(images)
    numbers = np.empty(images, dtype=np.int64)
    numbers[order] = np.arange(images) % folds
    return numbers


def mean_of_folds(found: Sequence[list[dict[str, Any]]], figure: str) -> list[dict[str, Any]]:
    """For each layer the figure on each fold, at the last and at the best epoch, and their means."""
    rows = []
    for of_layer in zip(*found, strict=True):
        row: dict[str, Any] = {"layer": of_layer[0]["layer"], "values": of_layer[0]["values"]}
        for which in ("last", "best"):
            each = [one[which]["val"][figure] for one in of_layer]
            row[which] = {figure: float(np.mean(each)), "folds": each}
        rows.append(row)
    return rows
