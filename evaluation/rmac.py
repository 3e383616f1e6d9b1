"""R-MAC: the regions of a map of activations, their maxima, whitening, and the sum that describes an image.

Tolias, Sicre, Jegou, 'Particular object retrieval with integral max-pooling of CNN activations', ICLR 2016.
Maps and rows in, rows out; knows nothing of images or networks. In order: `region_descriptors` makes the rows
of an image, `fit_whitening` learns from those of many, `rmac` turns them into one descriptor.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from util import UserError, atomic_write

OVERLAP = 0.4  # of neighbouring regions on the longer side, Tolias et al., section 3.2
PCA_DIM = 512
EIGENVALUE_FLOOR = 1e-5  # of the largest one


def grids(width: int, height: int, levels: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The R-MAC regions of a map of width x height cells: for each level (side, xs, ys), int64.

    Level l = 1..levels is a grid of squares of side floor(2 min(width, height) / (l + 1)), at least 1: l of
    them along the shorter side and l + extra along the longer, where extra brings the overlap of two
    neighbours of level 1 nearest to OVERLAP (Tolias et al., section 3.2). Computed in float64 with the usual
    formulas: where exact arithmetic would tie or meet a whole number, rounding decides as it always did.
    """
    shorter, longer = sorted((width, height))
    steps = np.arange(2, 8)
    shift = (longer - shorter) / (steps - 1)
    overlap = (shorter * shorter - shorter * shift) / (shorter * shorter)
    extra = 0 if width == height else 1 + int(np.argmin(np.abs(overlap - OVERLAP)))
    extra_x, extra_y = (extra, 0) if width > height else (0, extra)
    found = []
    for level in range(1, levels + 1):
        side = max(2 * shorter // (level + 1), 1)
        found.append((side, _starts(width, side, level + extra_x), _starts(height, side, level + extra_y)))
    return found


def _starts(length: int, side: int, count: int) -> np.ndarray:
    """Where `count` regions of `side` cells start along `length` cells: evenly spread, inside."""
    centre = np.floor(side / 2 - 1)
    shift = (length - side) / (count - 1) if count > 1 else 0.0
    starts = np.floor(centre + shift * np.arange(count)) - centre
    return np.clip(np.round(starts), 0, length - side).astype(np.int64)


def regions(width: int, height: int, levels: int = 3) -> np.ndarray:
    """The same as (R, 4) int64, rows [x, y, w, h], level by level, row by row."""
    boxes = [(x, y, side, side) for side, xs, ys in grids(width, height, levels) for y in ys for x in xs]
    return np.array(boxes, dtype=np.int64)


def pool_regions(activation: torch.Tensor, levels: int) -> torch.Tensor:
    """Maximum over each region of a map (C, H, W): (R, C), in the order of `regions(W, H, levels)`.

    A level at a time: the maximum over a strip of rows serves all regions of that strip, and the channels lie
    side by side, as the network hands them out. benchmarks/regions.py has the ratio to a loop over regions.
    """
    channels, height, width = activation.shape
    cells = activation.permute(1, 2, 0).contiguous()  # (H, W, C); no copy in channels_last memory
    pooled = []
    for side, xs, ys in grids(width, height, levels):
        strips = torch.stack([cells[y : y + side].amax(dim=0) for y in ys])  # (rows, W, C)
        grid = torch.stack([strips[:, x : x + side].amax(dim=1) for x in xs], dim=1)
        pooled.append(grid.view(-1, channels))
    return torch.cat(pooled)


# ---------------------------------------------------------------------------------------- descriptor


@dataclass
class Whitening:
    """x -> (x - mean) @ matrix; mean (D,), matrix (D, d), float32 tensors."""

    mean: torch.Tensor
    matrix: torch.Tensor

    def to(self, device: torch.device) -> "Whitening":
        return Whitening(self.mean.to(device), self.matrix.to(device))


def fit_whitening(descriptors: np.ndarray, dim: int = PCA_DIM) -> tuple[np.ndarray, np.ndarray]:
    """PCA-whitening of (N, D) rows, in float64: mean (D,) and matrix (D, min(dim, D)).

    Eigenvalues below EIGENVALUE_FLOOR times the largest are raised to it, so that a direction without
    variance stays finite. Raises UserError when all rows are equal or one is not finite.
    """
    rows = len(descriptors)
    slices = [slice(start, start + 8192) for start in range(0, rows, 8192)]
    mean = sum(descriptors[part].sum(axis=0, dtype=np.float64) for part in slices) / rows
    covariance = np.zeros((len(mean), len(mean)))
    for part in slices:
        centred = descriptors[part] - mean
        covariance += centred.T @ centred
    if not np.isfinite(covariance).all():
        raise UserError("the region descriptors are not finite, so no PCA can be learnt: is the model sound?")
    values, vectors = np.linalg.eigh(covariance / rows)
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    if values[0] <= 0:
        raise UserError("all region descriptors are equal, so no PCA can be learnt: is the model dead?")
    return mean, vectors / np.sqrt(np.maximum(values, values[0] * EIGENVALUE_FLOOR))


def write_whitening(path: Path, mean: np.ndarray, matrix: np.ndarray, settings: dict[str, Any]) -> None:
    """Put what `fit_whitening` found into a .npz file, with the settings of the rows that it learnt from."""
    with atomic_write(path, "wb") as file:
        np.savez(file, mean=mean, matrix=matrix, settings=np.array(json.dumps(settings)))


def read_whitening(path: Path) -> tuple[Whitening, dict[str, Any]]:
    """What `write_whitening` wrote, on the CPU. Raises UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: run --stage train_pca first")
    try:
        with np.load(path, allow_pickle=False) as saved:  # a zip file, which checks its CRC32
            mean, matrix = (torch.from_numpy(saved[name]).float() for name in ("mean", "matrix"))
            return Whitening(mean, matrix), json.loads(str(saved["settings"]))
    except Exception as error:  # numpy meets damaged bytes with nearly any of them
        raise UserError(f"{path}: damaged; remove it and run --stage train_pca") from error


def region_descriptors(activation: torch.Tensor, levels: int) -> torch.Tensor:
    """Map (C, H, W) -> one row of norm 1 per region, (R, C)."""
    return F.normalize(pool_regions(activation, levels), dim=1)


def rmac(region_rows: torch.Tensor, whitening: Whitening) -> torch.Tensor:
    """Region rows (R, C) -> R-MAC descriptor (d,): whiten, L2, sum over regions, L2."""
    whitened = (region_rows - whitening.mean) @ whitening.matrix
    return F.normalize(F.normalize(whitened, dim=1).sum(dim=0), dim=0)
