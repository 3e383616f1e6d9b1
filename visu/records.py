"""The numbers of a run's log, whatever stands in it: records are the lines of log.jsonl in order."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Records = Sequence[dict[str, Any]]

LARGEST = 1e100  # what is beyond it is no figure of a run, and no axis has room for it
MOST = 1000  # points on an axis, and rows of a table


def value(record: Any, *names: str) -> float | None:
    """The finite number under names, or None where there is none."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, int | float) or abs(record) > LARGEST:
        return None
    return None if math.isnan(record) else record


def column(records: Records, *names: str) -> np.ndarray:
    """The number under names in each record, (E,) float64, NaN where an epoch lacks it."""
    found = (value(record, *names) for record in records)
    return np.array([math.nan if number is None else float(number) for number in found])


def log_k(record: dict[str, Any]) -> float | None:
    """The loss of guessing in an epoch: what the run compared its loss to, else of the number of clusters."""
    loss, over = value(record, "loss"), value(record, "loss_over_log_k")
    if loss and over and loss / over > 0:
        return loss / over
    number = value(record, "clusters", "number")
    return None if number is None else math.log(max(number, 2))


def thinned(records: Sequence[Any]) -> Sequence[Any]:
    """At most MOST of the records, evenly spread, the first and the last among them."""
    if len(records) <= MOST:
        return records
    return [records[i] for i in np.linspace(0, len(records) - 1, MOST).round().astype(int).tolist()]
