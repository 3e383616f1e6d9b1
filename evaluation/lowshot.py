"""Linear SVMs on frozen features, a class at a time: of a few images of it, or of all.

The protocol of Goyal, Mahajan, Gupta and Misra, 'Scaling and Benchmarking Self-Supervised Visual
Representation Learning', ICCV 2019, on Pascal VOC 2007: features of norm 1; squared hinge loss, weight 2 for
the images that show the class; the cost with the best average precision in 3 folds. Free of torch, for
processes of their own.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from util import UserError, atomic_write, derive_seed

if TYPE_CHECKING:
    from evaluation.voc import VocSplit

COSTS = sorted({*(2.0**power for power in range(-19, -3)), *(10.0**power for power in range(-7, 3))})
ONE_SHOT_COST = 1.0  # where there are no folds to choose by
FOLDS = 3
POSITIVE_WEIGHT = 2.0
ITERATIONS = 2000  # at most, of liblinear
ALL = 0  # as a number of shots: all images

# ---------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Task:
    """One SVM: of a layer's features, of so many images of a class (ALL), of which draw."""

    layer: str
    shots: int
    draw: int
    class_name: str


def tasks_of(layers: list[str], shots: list[int], draws: int, class_names: list[str]) -> list[Task]:
    """All SVMs: for every layer and number of shots all draws (one of ALL), for each all classes."""
    return [
        Task(layer, number, draw, name)
        for layer in layers
        for number in shots
        for draw in range(1 if number == ALL else draws)
        for name in class_names
    ]


def draw_images(labels: np.ndarray, shots: int, negatives: int, seed: int) -> np.ndarray:
    """Sorted rows to train on: `shots` of label 1 and shots * negatives of label -1, or as many as there are.

    labels (N,) int8: 1, -1, 0 for images that are ignored. ALL shots: every image that is not ignored.
    """
    if shots == ALL:
        return np.flatnonzero(labels != 0)
    rng = np.random.default_rng(seed)
    with_it, without = np.flatnonzero(labels == 1), np.flatnonzero(labels == -1)
    chosen = rng.permutation(with_it)[:shots], rng.permutation(without)[: shots * negatives]
    return np.sort(np.concatenate(chosen))


def check_splits(trained: "VocSplit", tested: "VocSplit", shots: list[int]) -> None:
    """UserError where a class has fewer positive images than the most shots, or no negative one.

    And where the images to test on show nothing at all.
    """
    for c, name in enumerate(trained.class_names):
        positives, negatives = ((trained.labels[:, c] == sign).sum() for sign in (1, -1))
        if positives < max(*shots, 1):
            raise UserError(f"--k {max(*shots, 1)}: only {positives} images of {trained.name} show {name}")
        if not negatives:
            raise UserError(f"all images of {trained.name} show {name}: there is nothing to tell it from")
    if not (tested.labels == 1).any():
        raise UserError(f"no image of {tested.name} shows any class")


# ---------------------------------------------------------------------------------------- one SVM


def train_svm(x: np.ndarray, present: np.ndarray, cost: float, seed: int) -> LinearSVC:
    """A linear SVM of rows x (n, D) float64 with present (n,) bool."""
    svm = LinearSVC(
        C=cost,
        class_weight={True: POSITIVE_WEIGHT, False: 1.0},
        loss="squared_hinge",
        penalty="l2",
        dual=True,
        max_iter=ITERATIONS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # large costs; the folds judge what comes of it
        return svm.fit(x, present)


def choose_cost(x: np.ndarray, present: np.ndarray, costs: list[float], seed: int) -> tuple[float, int]:
    """(the cost with the best mean average precision over folds, of equals the smallest; number of folds).

    As many folds as FOLDS, or as there are positives or negatives; of one positive ONE_SHOT_COST, 0 folds.
    """
    number = min(FOLDS, int(present.sum()), int((~present).sum()))
    if number < 2 or len(costs) == 1:
        return (costs[0] if len(costs) == 1 else ONE_SHOT_COST), 0
    folds = list(StratifiedKFold(number).split(x, present))
    means = []
    for cost in costs:
        found = []
        for fit, judge in folds:
            scores = train_svm(x[fit], present[fit], cost, seed).decision_function(x[judge])
            found.append(average_precision_score(present[judge], scores))
        means.append(np.mean(found))
    return costs[int(np.argmax(means))], number


def judge_class(
    x: np.ndarray,
    labels: np.ndarray,
    test_x: np.ndarray,
    test_labels: np.ndarray,
    rows: np.ndarray,
    costs: list[float],
    seed: int,
) -> dict[str, Any]:
    """Train on some rows of x and test: {"cost", "folds", "ap"}; ap in percent, None: no positive to find.

    x (N, D), test_x (M, D) float32; labels (N,), test_labels (M,) of the class: 1, -1, 0 ignored.
    """
    mine = x[rows].astype(np.float64)
    present = labels[rows] == 1
    cost, folds = choose_cost(mine, present, costs, seed)
    svm = train_svm(mine, present, cost, seed)
    counts = test_labels != 0
    there = test_labels[counts] == 1
    ap = None
    if there.any():
        ap = 100 * float(average_precision_score(there, svm.decision_function(test_x)[counts]))
    return {"cost": cost, "folds": folds, "ap": ap}


# ---------------------------------------------------------------------------------------- all of them


class Journal:
    """A file with a line for each SVM that is done, so that the same command goes on where it was stopped.

    Its first line tells the settings that decide the figures; UserError for those of another evaluation.
    """

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool) -> None:
        self.path = path
        self.done: dict[Task, dict[str, Any]] = {}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        lines = [] if restart or not path.is_file() else read_lines(path)
        if lines and lines[0] != {"settings": key}:
            raise UserError(
                f"{path}: of another network, other images or other settings; give what it was made with, "
                "another --exp, or begin anew with --restart"
            )
        for line in lines[1:]:
            self.done[Task(**line["svm"])] = line["found"]
        with atomic_write(path) as file:  # without a last line that a kill has cut
            for line in [{"settings": key}, *lines[1:]]:
                file.write(json.dumps(line) + "\n")

    def add(self, task: Task, found: dict[str, Any]) -> None:
        self.done[task] = found
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"svm": asdict(task), "found": found}) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, up to the first one that is none."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines or [{}]


def run_tasks(
    tasks: Iterable[Task],
    journal: Journal,
    features: tuple[np.ndarray, np.ndarray],
    labels: tuple[np.ndarray, np.ndarray],
    class_names: list[str],
    costs: list[float],
    seed: int,
    processes: int,
    tick: Callable[[], None],
) -> None:
    """Train and test the SVMs of one layer that the journal lacks; each depends on its task alone.

    features: (N, D), (M, D) float32 of unit rows, labels: (N, C), (M, C), of the images to train and to test
    on. The images that are drawn are the same for every layer.
    """
    (x, test_x), (y, test_y) = features, labels
    left = [task for task in tasks if task not in journal.done]
    calls = []
    for task in left:
        c = class_names.index(task.class_name)
        drawn = derive_seed(seed, "low shot", task.shots, task.draw, c)
        rows = draw_images(y[:, c], task.shots, len(class_names) - 1, drawn)
        calls.append(delayed(judge_class)(x, y[:, c], test_x, test_y[:, c], rows, costs, drawn % 2**31))
    number = max(1, min(processes, len(calls), os.cpu_count() or 1))
    for task, found in zip(left, Parallel(number, return_as="generator")(calls)):
        journal.add(task, found)
        tick()


def summarise(journal: Journal, layer: str, shots: list[int], draws: int, names: list[str]) -> dict[str, Any]:
    """What results.json says of a layer: {"1": {"mAP": mean, "std", "draws": [...]}, ..., "all": {...}}.

    mAP in percent over the classes that have one; std over the draws, of a sample (n - 1), None of one draw.
    """
    found: dict[str, Any] = {}
    for number in shots:
        by_draw = []
        for draw in range(1 if number == ALL else draws):
            aps = {name: journal.done[Task(layer, number, draw, name)] for name in names}
            by_draw.append(aps)
        maps = [mean([of["ap"] for of in aps.values()]) for aps in by_draw]
        if number == ALL:
            found["all"] = {"mAP": maps[0], "classes": by_draw[0]}
        else:
            std = float(np.std(maps, ddof=1)) if len(maps) > 1 else None
            found[str(number)] = {"mAP": float(np.mean(maps)), "std": std, "draws": maps}
    return found


def mean(values: list[float | None]) -> float:
    """Mean of the values that are there; NaN where there is none."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else float("nan")
