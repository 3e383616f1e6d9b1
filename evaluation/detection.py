"""Average precision of detections by the rules of the VOC challenge, any overlap asked for.

A detection belongs to the object of its class and image that it overlaps most. If that overlap is reached and
no better detection has the object, it is a hit; if another one has, or the overlap is not reached, a miss; of
a 'difficult' object it does not count at all. Everingham et al., 'The PASCAL Visual Object Classes (VOC)
Challenge', 2010, section 4.2.2.
"""

from typing import Any, NamedTuple

import numpy as np

from evaluation.objects import ObjectSplit
from evaluation.voc import eleven_point_of, mean

OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's: 0.5, 0.55 ... 0.95


class Detections(NamedTuple):
    """n detections: index of the image (n,) int64, label (n,) int64, score (n,), box (n, 4) float32."""

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    box: np.ndarray

    @classmethod
    def joined(cls, parts: list["Detections"]) -> "Detections":
        """Those of all parts, in their order."""
        none = cls(
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros(0, np.float32),
            np.zeros((0, 4), np.float32),
        )
        return cls(*(np.concatenate(arrays) for arrays in zip(none, *parts)))


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of box (4,) with boxes (n, 4): (n,) float64."""
    box, boxes = box.astype(np.float64), boxes.astype(np.float64)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = np.clip(sides, 0, None).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


class Judged:
    """The detections of one class, the best first (equal scores in the order given), beside the objects.

    positives: objects that are not difficult. best: (n,) the largest overlap of a detection with an object of
    its image; object: (n,) which, of all objects of the class, -1 where there is none; difficult: (n,) bool.
    """

    def __init__(self, found: Detections, split: ObjectSplit, label: int) -> None:
        chosen = np.flatnonzero(found.label == label)
        chosen = chosen[np.argsort(-found.score[chosen], kind="stable")]
        masks = [objects.labels == label for objects in split.objects]
        starts = np.cumsum([0, *(mask.sum() for mask in masks)])
        hard = np.concatenate([o.difficult[mask] for o, mask in zip(split.objects, masks)])
        self.positives = int((~hard).sum())
        self.best = np.zeros(len(chosen))
        self.object = np.full(len(chosen), -1)
        for n, d in enumerate(chosen):
            i = found.image[d]
            boxes = split.objects[i].boxes[masks[i]]
            if len(boxes):
                values = overlaps(found.box[d], boxes)
                self.best[n], self.object[n] = values.max(), starts[i] + values.argmax()
        self.difficult = np.append(hard, False)[self.object]

    def hits(self, overlap: float) -> np.ndarray:
        """(m,) bool of the detections that count, the best first: hits or misses."""
        reached = self.best >= overlap
        hits = np.zeros(len(self.best), bool)
        candidates = np.flatnonzero(reached)
        _, first = np.unique(self.object[candidates], return_index=True)
        hits[candidates[first]] = True
        return hits[~(reached & self.difficult)]

    def area(self, overlap: float) -> float | None:
        """The area under precision by recall, of VOC 2010 and later; None where there is nothing to find."""
        return area_under(self.hits(overlap), self.positives) if self.positives else None

    def eleven_point(self, overlap: float) -> float | None:
        """The metric of VOC 2007; None where there is nothing to find."""
        return eleven_point_of(self.hits(overlap), self.positives) if self.positives else None


def area_under(hits: np.ndarray, positives: int) -> float:
    """Area under the precision at each recall, made to fall by taking the best from there on.

    hits (m,) bool, the best first.
    """
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(found) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits].sum() / positives)


def average_precisions(found: Detections, split: ObjectSplit) -> dict[str, Any]:
    """AP of each class and the means, in percent.

    AP50: at an overlap of 0.5, as area and by the eleven points of VOC 2007; AP75: of 0.75; AP: the mean over
    OVERLAPS, as COCO's. A class without any object that counts has none (None) and is left out of the means.
    """
    judged = {name: Judged(found, split, label) for label, name in enumerate(split.class_names)}
    by_class = {
        "AP50": {name: percent(each.area(0.5)) for name, each in judged.items()},
        "AP50_11point": {name: percent(each.eleven_point(0.5)) for name, each in judged.items()},
        "AP75": {name: percent(each.area(0.75)) for name, each in judged.items()},
        "AP": {
            name: mean({overlap: percent(each.area(overlap)) for overlap in OVERLAPS})
            for name, each in judged.items()
        },
    }
    means = {metric: mean(values) for metric, values in by_class.items()}
    return {"unit": "percent", **means, "by class": by_class}


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
