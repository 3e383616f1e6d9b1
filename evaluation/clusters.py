"""The clusters of a run, for images seen or new: where each belongs, and when the run's word stands."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import clustering
from algorithms.pca import RELATIVE_NOISE
from clustering import Assignment
from data import ImageList
from features import ToPoints

# Relative error of a feature by the arithmetic of the convnet (for float32 see RELATIVE_NOISE).
NOISE = {"fp32": 2e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}
# Squared distances of unit vectors, 0 to 4, that differ by less may be equal. Between batches, threads and
# fused batch norms they differ by 1e-6 to 1e-5 (AlexNet, 256 dimensions).
SMALLEST_TOLERANCE = 1e-3


@dataclass
class Clusters:
    """The clusters of a run, and where each of its images went.

    points: (N, d) float32, the run's images, where the nearest of them decides; noise: relative error of
    features; row: path relative to root -> row of the image in the run; root: the folder of the run's images,
    None where it is not known.
    """

    to_points: ToPoints
    stored: Assignment
    points: np.ndarray | None
    row: dict[str, int]
    root: str | None
    noise: float
    device: torch.device

    @classmethod
    def from_state(cls, state: dict[str, Any], precision: str, device: torch.device) -> "Clusters":
        """state: the content of a clustering.pth.tar; precision: that of the features to come."""
        points, to_points = state.get("points"), ToPoints.from_state_dict(state["transform"])
        noise = max(NOISE[precision], NOISE.get(state["args"].get("precision"), 0.0))
        return cls(
            to_points,
            Assignment.from_state_dict(state["assignment"]),
            None if points is None else points.numpy(),
            {path: i for i, path in enumerate(numbered(state["paths"]))},
            state["root"],
            max(noise, RELATIVE_NOISE[np.dtype(to_points.dtype)]),
            device,
        )

    def known(self, images: ImageList) -> np.ndarray:
        """Which image of the run each of these is, (N,) int64; -1 for a new one.

        One that lies in the folder of the run's images is known by where it lies, any other one (of a copy of
        the folder, of shards) by its relative path.
        """
        names: Iterable[str] = images.paths
        if self.root is not None and images.folder is not None:
            inside = self.root.rstrip("/") + "/"
            full = (os.path.join(images.folder, path) for path in images.paths)
            names = (
                path[len(inside) :] if path.startswith(inside) else name
                for path, name in zip(full, images.paths)
            )
        return np.array([self.row.get(name, -1) for name in numbered(names)], dtype=np.int64)

    def place(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Activations (n, ...) -> the points (n, d) that are compared, and their tolerances (n,) float64."""
        features = features.flatten(1).cpu().numpy()
        points, norms = self.to_points(features, self.device)
        return points, self.tolerance(features, norms)

    def tolerance(self, features: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """By how much squared distances from the points of these features may be off, (n,) float64.

        features: (n, D); norms: (n,) of what they are whitened to. An error of e = noise * RMS of the feature
        in each of its values becomes one of about e * |PCA matrix| after whitening (|identity| = sqrt(D)
        without), and of r = e * |PCA matrix| / norm after normalisation. It changes the difference between
        the squared distances to two centroids by at most 2 r |c1 - c2| <= 4 r s, and one squared distance by
        as much, where s is the largest norm of points and centroids: 1 after normalisation.
        """
        pca, scale = self.to_points.pca, 1.0
        rms = np.sqrt(np.square(features, dtype=np.float64).mean(1))
        moved = self.noise * rms * (np.sqrt(features.shape[1]) if pca is None else np.linalg.norm(pca.matrix))
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.to_points.l2:
                moved = moved / norms  # 0 / 0: features that are all the same
            else:
                scale = np.maximum(norms, np.linalg.norm(self.stored.centroids, axis=1).max())
            return np.fmax(SMALLEST_TOLERANCE * scale**2, 4 * moved * scale)

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For points x (n, d): labels (n,), squared distances to the centroid, and those that decided.

        The latter are the same for k-means, for PIC they are those to the nearest image of the run. Where
        clusters have two levels, the nearest super-cluster comes first, then the nearest cluster in it.
        """
        if self.stored.coarse is not None:
            super_clusters, _ = clustering.nearest_super_clusters(x, self.stored, self.device)
            labels, distances = clustering.nearest_within(x, self.stored, super_clusters, self.device)
            return labels, distances, distances
        if self.points is None:
            labels, distances = clustering.assign(x, self.stored.centroids, self.device)
            return labels, distances, distances
        rows, decided = clustering.assign(x, self.points, self.device)
        labels = self.stored.labels[rows]
        return labels, squared_distances(x, self.stored.centroids[labels]).astype(np.float32), decided

    def assign(self, x: np.ndarray, tolerance: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) int64 and squared distances (n,) float32 of points x (n, d).

        rows (n,): which image of the run each is, -1 for a new one. A known image keeps what the run found if
        its distance to what it was assigned to is, within `tolerance`, still the smallest and still the same.
        """
        labels, distances, decided = self.nearest(x)
        known = np.flatnonzero(rows >= 0)
        off = self.off(x[known], rows[known], decided[known])
        same = off <= tolerance[known]
        labels[known[same]] = self.stored.labels[rows[known[same]]]
        distances[known[same]] = self.stored.distances[rows[known[same]]]
        return labels, distances

    def off(self, x: np.ndarray, rows: np.ndarray, decided: np.ndarray) -> np.ndarray:
        """By how much squared distances speak against what the run found for its images `rows`, (n,).

        x (n, d): the points of these images now, decided (n,): as `nearest` says.
        """
        own = self.stored.labels[rows]
        if self.points is None:
            targets, before = self.stored.centroids[own], self.stored.distances[rows]
        else:
            targets, before = self.points[rows], 0.0
        now, farther = squared_distances(x, targets), 0.0
        if self.stored.coarse is not None and len(x):
            mine = own // self.stored.fine
            _, decided = clustering.nearest_within(x, self.stored, mine, self.device)
            _, least = clustering.nearest_super_clusters(x, self.stored, self.device)
            farther = squared_distances(x, self.stored.coarse[mine]) - least
        return np.maximum(np.maximum(now - decided, np.abs(now - before)), farther)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, (n, d) and (n, d) -> (n,) float64."""
    return np.square(x.astype(np.float64) - y).sum(1)


def numbered(paths: Iterable[str]) -> Iterator[str]:
    """The paths; one that was there before gets a number, so that none comes twice."""
    seen: dict[str, int] = {}
    for path in paths:
        seen[path] = n = seen.get(path, -1) + 1
        yield f"{path}\0{n}" if n else path
