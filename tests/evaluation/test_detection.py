"""evaluation/detection.py: average precision of boxes, by hand and against pycocotools."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from data import ImageList
from evaluation.detection import OVERLAPS, Detections, Judged, average_precisions, overlaps
from evaluation.objects import Objects, ObjectSplit

BOX = (0, 0, 10, 10)
FAR = (50, 50, 60, 60)


def split_of(*images: list[tuple], classes: int = 2) -> ObjectSplit:
    """Images with objects (label, box) or (label, box, difficult)."""
    objects = []
    for entries in images:
        boxes = np.array([entry[1] for entry in entries], np.float32).reshape(-1, 4)
        hard = np.array([len(entry) > 2 and entry[2] for entry in entries], bool)
        objects.append(Objects(boxes, np.array([entry[0] for entry in entries], np.int64), hard))
    names = ImageList(Path("nowhere"), [f"{i}.jpg" for i in range(len(images))])
    return ObjectSplit("test", names, objects, [f"class{c}" for c in range(classes)])


def found_of(*entries: tuple) -> Detections:
    """Detections (image, label, score, box)."""
    image, label, score, box = zip(*entries) if entries else ([], [], [], [])
    box = np.array(box, np.float32).reshape(-1, 4)
    return Detections(np.array(image, np.int64), np.array(label, np.int64), np.array(score, np.float32), box)


def shifted(box: tuple, by: float) -> tuple:
    return box[0] + by, box[1], box[2] + by, box[3]


def test_overlap_by_hand():
    boxes = np.array([BOX, (5, 0, 15, 10), (0, 0, 5, 5), (10, 0, 20, 10), FAR])
    assert overlaps(np.array(BOX), boxes) == pytest.approx([1, 50 / 150, 25 / 100, 0, 0])
    assert len(overlaps(np.array(BOX), np.zeros((0, 4)))) == 0


@pytest.mark.parametrize(
    ("images", "found", "area", "points"),
    [
        ([[(0, BOX)]], [(0, 0, 0.9, BOX)], 1, 1),
        ([[(0, BOX)]], [], 0, 0),  # nothing found
        ([[(0, BOX)]], [(0, 1, 0.9, BOX)], 0, 0),  # another class
        ([[(0, BOX)], []], [(1, 0, 0.9, BOX)], 0, 0),  # another image
        ([[(0, BOX)]], [(0, 0, 0.9, BOX), (0, 0, 0.8, BOX)], 1, 1),  # a duplicate behind the hit
        # Two objects: a hit, its duplicate, a hit: precision 1 to recall 1/2, then 2/3.
        (
            [[(0, BOX), (0, FAR)]],
            [(0, 0, 0.9, BOX), (0, 0, 0.8, BOX), (0, 0, 0.7, FAR)],
            (1 + 2 / 3) / 2,
            (6 + 5 * 2 / 3) / 11,
        ),
        # The best detection of an object that does not reach it is a miss, though it came first.
        ([[(0, BOX)]], [(0, 0, 0.9, shifted(BOX, 4)), (0, 0, 0.8, BOX)], 1 / 2, 1 / 2),
        # An overlap of exactly one half is reached: 10 x 10 in 10 x 20.
        ([[(0, (0, 0, 10, 20))]], [(0, 0, 0.9, BOX)], 1, 1),
        # Difficult objects are neither to be found, nor a miss where found, however often.
        (
            [[(0, BOX, True), (0, FAR)]],
            [(0, 0, 0.9, BOX), (0, 0, 0.85, BOX), (0, 0, 0.8, FAR)],
            1,
            1,
        ),
        # A detection belongs to what it overlaps most, here the difficult one: it is not a hit of the other.
        ([[(0, BOX, True), (0, shifted(BOX, 2))]], [(0, 0, 0.9, BOX)], 0, 0),
        # Equal scores rank in the order given.
        ([[(0, BOX)]], [(0, 0, 0.5, FAR), (0, 0, 0.5, BOX)], 1 / 2, 1 / 2),
        ([[(0, BOX)]], [(0, 0, 0.5, BOX), (0, 0, 0.5, FAR)], 1, 1),
        # Half of the objects are never found: recalls above 0.5 have precision 0.
        ([[(0, BOX)], [(0, BOX)]], [(1, 0, 0.9, BOX)], 1 / 2, 6 / 11),
    ],
)
def test_ap_by_hand(images, found, area, points):
    results = average_precisions(found_of(*found), split_of(*images))
    assert results["by class"]["AP50"]["class0"] == pytest.approx(100 * area)
    assert results["by class"]["AP50_11point"]["class0"] == pytest.approx(100 * points)


def test_class_without_objects_that_count_is_left_out_of_the_means():
    split = split_of([(0, BOX), (1, FAR, True)])
    results = average_precisions(found_of((0, 0, 0.9, BOX), (0, 1, 0.8, BOX)), split)
    assert results["by class"]["AP50"] == {"class0": 100.0, "class1": None}
    assert results["AP50"] == results["AP"] == 100.0


def test_ap_is_the_mean_over_ten_overlaps():
    found = found_of((0, 0, 0.9, (0, 0, 10, 7.7)))  # reaches 0.5 to 0.75: 6 of 10
    results = average_precisions(found, split_of([(0, BOX)]))
    assert OVERLAPS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert (results["AP50"], results["AP75"]) == (100, 100) and results["AP"] == pytest.approx(60)


def test_joined_detections_keep_their_order_and_may_be_none():
    parts = [found_of((0, 0, 0.9, BOX)), found_of(), found_of((1, 1, 0.8, FAR), (2, 0, 0.7, BOX))]
    joined = Detections.joined(parts)
    assert joined.image.tolist() == [0, 1, 2] and joined.box.shape == (3, 4)
    assert Detections.joined([]).box.shape == (0, 4)


# ---------------------------------------------------------------------------------------- pycocotools

CELLS = [
    (30 * i, 30 * j) for i in range(3) for j in range(3)
]  # objects in cells: each overlaps its own alone


def random_scenes(rng: np.random.Generator) -> tuple[ObjectSplit, Detections]:
    """20 images of up to 9 objects of 3 classes, detections of most of them, duplicates, and false ones."""
    images, found = [], []
    for i in range(20):
        entries = []
        for x, y in CELLS:
            if rng.random() < 0.5:
                continue
            label, hard = int(rng.integers(3)), bool(rng.random() < 0.2)
            box = np.array([x, y, x + 20, y + 20])
            entries.append((label, box, hard))
            for _ in range(1 if hard else int(rng.integers(0, 3))):
                found.append((i, label, rng.random(), box + rng.uniform(-3, 3, 4)))
            if rng.random() < 0.3:
                found.append((i, int(rng.integers(3)), rng.random(), [x + 22, y, x + 28, y + 9]))
        images.append(entries)
    return split_of(*images, classes=3), found_of(*found)


def coco_precisions(split: ObjectSplit, found: Detections) -> np.ndarray:
    """pycocotools' precision at 101 recalls: (10 overlaps, 101, classes). Difficult: of ignored areas."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth = [
        {"image_id": i, "category_id": int(label), "bbox": as_width(box), "area": 1e11 if hard else 400,
         "iscrowd": 0, "id": 1000 * i + n + 1}
        for i, objects in enumerate(split.objects)
        for n, (box, label, hard) in enumerate(zip(*objects))
    ]  # fmt: skip
    results = [
        {"image_id": int(i), "category_id": int(label), "bbox": as_width(box), "score": float(score)}
        for i, label, score, box in zip(*found)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        ours = coco.COCO()
        ours.dataset = {
            "images": [{"id": i} for i in range(len(split))],
            "annotations": truth,
            "categories": [{"id": c} for c in range(len(split.class_names))],
            "info": {},
        }
        ours.createIndex()
        judge = evaluation.COCOeval(ours, ours.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
    return judge.eval["precision"][:, :, :, 0, 2]


def as_width(box: np.ndarray) -> list[float]:
    return [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]


@pytest.mark.parametrize("seed", [0, 1])
def test_hits_and_misses_are_pycocotools(seed):
    split, found = random_scenes(np.random.default_rng(seed))
    precisions = coco_precisions(split, found)
    for label in range(3):
        judged = Judged(found, split, label)
        for t, overlap in enumerate(OVERLAPS):
            hits = judged.hits(overlap)
            recall = np.cumsum(hits) / judged.positives
            falling = np.maximum.accumulate((np.cumsum(hits) / np.arange(1, len(hits) + 1))[::-1])[::-1]
            at = np.searchsorted(recall, np.linspace(0, 1, 101))
            expected = [falling[i] if i < len(falling) else 0 for i in at]
            assert precisions[t, :, label] == pytest.approx(expected, abs=1e-6)
        assert judged.hits(0.5).sum() > 10 > judged.hits(0.95).sum()
