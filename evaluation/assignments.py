"""Clusters of images from files, joined with their classes: what eval_clusters.py judges."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import classes_of
from evaluation.labelled import LONGEST_PATH, SPLITS, Labels
from util import UserError

MOST_CLUSTERS = 10**7  # a table has an entry each


@dataclass
class Clustered:
    """Images with the cluster that each head gives them, and with their classes.

    labels: (H, N) int64; classes: (N,) names, as objects, so that a long one takes no room in all rows. Rows
    are in the order of the file, those without a class left out (how many: without).
    """

    labels: np.ndarray
    classes: np.ndarray
    without: int = 0

    def __len__(self) -> int:
        return len(self.classes)


def read_heads(file: str | Path) -> tuple[list[str], np.ndarray]:
    """(paths, labels (H, N) int64) of an assignments.csv of a run, or of what assign.py writes.

    Columns are told by the header: path, then cluster, cluster1 ... whatever stands between. Raises
    UserError, with the number of the line, for a file of another form.
    """
    paths, found = [], []
    line = 1
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines)
            header = next(reader, [])
            heads = [i for i, name in enumerate(header) if name.rstrip("0123456789") == "cluster"]
            if header[:1] != ["path"] or not heads:
                raise UserError(f"{file}: its first line is not path,cluster,distance, as runs write it")
            for row in filter(None, reader):
                line = reader.line_num
                ids = [int(row[i]) for i in heads]
                if min(ids) < 0 or max(ids) >= MOST_CLUSTERS or len(row[0]) > LONGEST_PATH:
                    raise ValueError
                paths.append(row[0])
                found.append(ids)
    except (IndexError, ValueError):
        raise UserError(
            f"{file}, line {line}: expected {','.join(header)[:80]}, clusters from 0 to {MOST_CLUSTERS - 1}"
        ) from None
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if not paths:
        raise UserError(f"{file}: no line with path,cluster in it")
    return paths, np.array(found, dtype=np.int64).T.copy()


def by_folder(file: str, paths: Sequence[str], labels: np.ndarray, split: str) -> dict[str, Clustered]:
    """{split: images} by class sub-folders; paths that begin with train/ and val/ are of both splits.

    Raises UserError where the paths have no class sub-folders.
    """
    first = np.array([path.split("/", 1)[0] for path in paths], dtype=object)
    splits = dict.fromkeys([split], np.ones(len(paths), bool))
    if set(first) <= set(SPLITS):
        splits = {name: first == name for name in SPLITS if name in first}
        paths = [path.split("/", 1)[-1] for path in paths]
    ids, names = classes_of(paths)
    if ids is None and split == "val" and all("/" in path for path in paths):  # a single class
        ids, names = np.zeros(len(paths), np.int64), [paths[0].split("/", 1)[0]]
    if ids is None:
        raise UserError(f"{file}: its paths have no class sub-folders (expected two or more); give --labels")
    classes = np.array(names, dtype=object)[ids]
    return {name: Clustered(labels[:, rows], classes[rows]) for name, rows in splits.items()}


def by_file(
    file: str, paths: Sequence[str], labels: np.ndarray, split: str, told: Labels
) -> dict[str, Clustered]:
    """{split: images} by a file of labels, which tells the splits too where it has that column.

    Paths are those of the file, or those with train/ or val/ in front: of a run on DIR/train. Raises
    UserError where the file names none of them.
    """
    row = {path: i for i, path in enumerate(told.paths)}
    if not any(path in row for path in paths):
        row = {path.removeprefix(f"{split}/"): i for path, i in row.items() if path.startswith(f"{split}/")}
    rows = np.array([row.get(path, -1) for path in paths])
    known = rows >= 0
    if not known.any():
        raise UserError(f"{told.file} names none of the {len(paths)} images in {file}, e.g. {paths[0]}")
    classes = np.array(told.labels, dtype=object)[rows[known]]
    splits = np.array(told.splits)[rows[known]] if told.splits else np.full(known.sum(), split)
    found = {
        name: Clustered(labels[:, known][:, splits == name], classes[splits == name])
        for name in SPLITS
        if name in splits
    }
    next(iter(found.values())).without = int((~known).sum())
    return found
