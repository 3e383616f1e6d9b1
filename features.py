"""Images -> activations: the one pass over images that training, evaluations and pictures share.

    for found, index, broken in activation_batches(net, ["conv5"], images, crop, pass_settings): ...

And what a run leaves behind for other images: the network of its last clustering and how features become the
points that were clustered (EXP/clustering.pth.tar).
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
from algorithms.pca import PCAWhitening, normalise_rows
from commandline import PRECISIONS
from data import PlainView, make_loader, to_input
from data.decode import FULL_BITS
from data.views import Batch
from models.inputs import Inputs, recorded_size, setting
from models.network import Network
from util import Progress, UserError, set_precision

PAPER_BATCH = 256  # for checkpoints that do not tell theirs
# What a clustering.pth.tar has to hold.
NEEDED = {
    "state_dict": dict, "layer": str, "transform": dict, "metric": str, "assignment": dict, "paths": list,
    "args": dict,
}  # fmt: skip
HELD = ("float32", "float16")  # what a run may hold its features in


@dataclass
class Pass:
    """How a pass over images is made: images at a time, data loading workers, device, arithmetic."""

    batch: int
    workers: int
    device: torch.device
    precision: str = "fp32"


@torch.inference_mode()
def activations_of(
    net: Network, layers: list[str], batches: Iterable[Batch], device: torch.device, precision: str = "fp32"
) -> Iterator[tuple[dict[str, torch.Tensor], Batch]]:
    """({layer: (B, ...) float32 on device}, batch) for every batch of a loader, net in eval mode.

    net is on the device. A batch of which no image could be decoded gives no activations: {}.
    """
    folded = net.eval().folded().to(memory_format=torch.channels_last)
    for batch in batches:
        found: dict[str, torch.Tensor] = {}
        if len(batch.index):
            with set_precision(precision, device):
                x = to_input(batch.views, device, net.inputs.mean, net.inputs.std)
                found = {name: value.float() for name, value in folded.activations(x, layers).items()}
        yield found, batch


def activation_batches(
    net: Network, layers: list[str], view: PlainView, how: Pass, rows: range | None = None
) -> Iterator[tuple[dict[str, torch.Tensor], np.ndarray, list[int]]]:
    """One pass over a view, batch by batch: (activations, indexes (B,) of their images, broken images).

    rows: some of the images, by default all, in order. Broken images have no activation; the dict is empty
    where all of a batch are broken.
    """
    rows = range(len(view)) if rows is None else rows
    loader = make_loader(view, how.batch, how.workers, how.device, sampler=rows)
    for found, batch in activations_of(net, layers, loader, how.device, how.precision):
        yield found, batch.index.numpy(), batch.broken


def extract_features(
    net: Network,
    layer: str,
    view: PlainView,
    how: Pass,
    rows: range | None = None,
    dtype: type = np.float32,
    progress: Progress | None = None,
) -> tuple[np.ndarray, list[int]]:
    """Activations of a layer for `rows` of the images: (features (len(rows), D), broken images).

    The row of a broken image is zero. Maps are flattened. The result is held once, in dtype (float32 or
    float16). Leaves net in the mode it was in.
    """
    rows = range(len(view)) if rows is None else rows
    was_training = net.training
    features: np.ndarray | None = None
    broken: list[int] = []
    for found, index, bad in activation_batches(net, [layer], view, how, rows):
        if found:
            values = found[layer].flatten(1).cpu().numpy()
            if features is None:
                features = np.zeros((len(rows), values.shape[1]), dtype=dtype)
            features[index - rows.start] = values
        broken += bad
        if progress is not None:
            progress.update(len(index) + len(bad))
    net.train(was_training)
    if features is None:  # a rank without images
        features = np.zeros((len(rows), net.feature_dim), dtype=dtype)
    return features, sorted(broken)


def without_rows(features: np.ndarray, broken: list[int], rows: range) -> np.ndarray:
    """Features (len(rows), D) of the images `rows` without those of the broken ones, in the same memory."""
    kept = np.setdiff1d(np.arange(rows.start, rows.stop), broken) - rows.start
    for start in range(0, len(kept), 1024):  # kept[i] >= i, so no row is overwritten unread
        block = kept[start : start + 1024]
        features[start : start + len(block)] = features[block]
    return features[: len(kept)]


# ---------------------------------------------------------------------------------------- features -> points


@dataclass
class ToPoints:
    """How features become the points that are clustered: PCA-whitening or none, then L2 or not.

    pca: None leaves features as they are. dtype: in which the run held its features, float32 or float16.
    """

    pca: PCAWhitening | None = None
    l2: bool = True
    dtype: str = "float32"

    def __call__(self, features: np.ndarray, device: torch.device | str) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) -> points (n, d) float32, and their norms (n,) float64 before normalisation."""
        points = features.astype(self.dtype, copy=False)
        points = points.astype(np.float32) if self.pca is None else self.pca.apply(points, device)
        norms = np.linalg.norm(points.astype(np.float64), axis=1)
        return normalise_rows(points) if self.l2 else points, norms

    def dim(self, features: int) -> int:
        """Numbers of a point, of features of so many."""
        return features if self.pca is None else self.pca.dim

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, for a checkpoint."""
        return {"pca": self.pca and self.pca.state_dict(), "l2": self.l2, "dtype": self.dtype}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ToPoints":
        """The inverse of `state_dict`."""
        pca = state["pca"] and PCAWhitening.from_state_dict(state["pca"])
        return cls(pca or None, bool(state["l2"]), str(state["dtype"]))


def read_clustering(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """(path, content) of the clustering.pth.tar of a run; source is the run's folder or that file.

    Files of earlier versions are brought to today's keys: state_dict, arch, layer, transform, metric,
    assignment, points, paths, root, args, epoch. Raises UserError, with the way out, for anything else, such
    as a checkpoint: what is in that was computed from weights that training has changed since.
    """
    path = Path(source)
    if path.is_dir():
        path = path / checkpoint.CLUSTERING
        if not path.is_file():
            raise UserError(
                f"{path} is missing: a run writes it after each clustering; give the folder of such a run, "
                "or continue an older one for an epoch (--resume, --epochs)"
            )
    state = checkpoint.read(path)
    if "whitening" in state and "transform" not in state:  # before there were methods without a PCA
        run = state["args"] if isinstance(state.get("args"), dict) else {}
        state["transform"] = {
            "pca": state["whitening"], "l2": True, "dtype": run.get("feature_dtype", "float32"),
        }  # fmt: skip
        folder = str(run.get("dir") or "")
        root = os.path.realpath(folder) if os.path.isabs(folder) else None
        state |= {"layer": "fc7.pre", "metric": "l2", "root": root}
    whole = all(isinstance(state.get(name), kind) and state[name] for name, kind in NEEDED.items())
    if not whole or "optimizer" in state:
        raise UserError(
            f"{path}: holds no clustering that fits its weights; give the folder of a run, in which "
            f"{checkpoint.CLUSTERING} does"
        )
    state.setdefault("root", None)
    check_clustering(state, path)
    return path, state


def check_clustering(state: dict[str, Any], path: Path) -> None:
    """UserError unless the parts of a clustering fit each other."""
    if state["metric"] != "l2":
        raise UserError(f"{path}: clustered by {state['metric']}, which this version does not know")
    try:
        fits = parts_fit(state)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: damaged, its labels, centroids and transform do not fit each other")


def parts_fit(state: dict[str, Any]) -> bool:
    """Whether types and shapes of a clustering are those of one, and its numbers finite.

    Raises what Python and torch do where something is missing or of another kind.
    """
    to_points, of_pca = ToPoints.from_state_dict(state["transform"]), state["transform"]["pca"]
    labels, centroids = state["assignment"]["labels"], state["assignment"]["centroids"]
    distances, points = state["assignment"]["distances"], state.get("points")
    coarse = state["assignment"].get("coarse")
    objective, bits, epoch = state["assignment"]["objective"], state.get("bits"), state.get("epoch", 0)
    names = [*state["paths"], *(x for x in (state["root"], state["args"].get("precision")) if x is not None)]
    n, k = len(state["paths"]), state["assignment"]["num_clusters"]
    fits = labels.shape == distances.shape == (n,) and len(centroids) == k and type(k) is int
    fits = fits and all(isinstance(name, str) for name in names) and to_points.dtype in HELD
    fits = fits and labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() < k
    fits = fits and type(epoch) is int and math.isfinite(objective)
    fits = fits and (bits is None or (type(bits) is int and 8 <= bits <= FULL_BITS))
    if to_points.pca is not None:
        matrix, mean = of_pca["matrix"], of_pca["mean"]
        fits = fits and mean.shape == matrix.shape[:1] and centroids.shape == (k, matrix.shape[1])
        fits = fits and all(x.dtype == torch.float64 and x.isfinite().all() for x in (matrix, mean))
    if points is not None:
        fits = fits and points.shape == (n, centroids.shape[1])
    if coarse is not None:
        fits = fits and coarse.shape[1:] == centroids.shape[1:] and k % len(coarse) == 0
    numbers = [x for x in (centroids, distances, points, coarse) if x is not None]
    return bool(fits and all(x.dtype == torch.float32 and x.isfinite().all() for x in numbers))


@dataclass
class Settings:
    """What decides a feature's bits besides the weights: as asked for, else as in the run, else the paper's.

    scaled: whether large JPEGs are decoded at a fraction of their size.
    """

    image_size: int
    batch: int
    precision: str
    scaled: bool

    @classmethod
    def choose(
        cls,
        run: dict[str, Any],
        device: torch.device,
        image_size: int | None = None,
        batch: int | None = None,
        precision: str | None = None,
    ) -> "Settings":
        """run: the settings in a checkpoint; the authors' files have none. Of several crops the largest
        counts.

        Raises UserError if the device cannot, and for settings in a file that no run has.
        """
        run = {"batch": run.get("batch_size")} | run
        precision = precision or possible_precision(run.get("precision") or "fp32", device)
        set_precision(precision, device)
        return cls(
            Inputs(recorded_size(run)).size(image_size),
            batch or setting(run, "batch", range(1, 2**16 + 1), PAPER_BATCH),
            precision,
            bool(run.get("scaled_decoding", False)),
        )


def possible_precision(precision: str, device: torch.device) -> str:
    """The run's precision where this device computes in it; fp32, which is more exact, elsewhere."""
    if precision not in PRECISIONS:
        return "fp32"
    try:
        set_precision(precision, device)
    except UserError:
        return "fp32"
    return precision


def bits_of(state: dict[str, Any]) -> int | None:
    """The bits of 16 a sample that the run of this checkpoint took; None where it had none.

    Runs from before that was looked at took all 16.
    """
    parts = state.get("parts")
    for holder in (state, parts.get("images") if isinstance(parts, dict) else None):
        if isinstance(holder, dict) and "bits" in holder:
            bits = holder["bits"]
            return bits if type(bits) is int and 8 <= bits <= FULL_BITS else None
    return FULL_BITS if isinstance(state.get("args"), dict) else None


def layer_shape(net: Network, layer: str, size: int) -> tuple[int, ...]:
    """The shape of one image's activation: (C, H, W) or (D,)."""
    device = next(net.parameters()).device
    with torch.inference_mode():
        blank = to_input(torch.zeros(1, 3, size, size, dtype=torch.uint8), device)
        return tuple(net.eval().activations(blank, [layer])[layer].shape[1:])
