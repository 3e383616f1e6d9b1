"""Images, seen or new -> cluster ids, by a run's own network, PCA and centroids.

    python assign.py --run exp DIR --out assignments.csv                  # path,cluster,distance
    python assign.py --run exp DIR --format pickle --out clusters.pickle  # [(path, cluster), ...]
    python assign.py --run exp DIR --format links --out clusters          # clusters/0042/003_cat.jpg -> ...

EXP/clustering.pth.tar holds what this takes, of the moment of the last clustering. Images are looked at as in
the run unless told otherwise. Those that the run clustered keep the cluster that it gave them.

Features of an image differ in their last bits between devices, numbers of threads and batches, so that one
between two centroids could go to either. The run's word stands for an image that it knows by relative path
and that looks the same within that noise (`Clusters.tolerance`); a changed one goes where it belongs now.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import logbook
import numpy as np
import released
import torch

import checkpoint
import clustering
import data
from extract import (
    Settings,
    add_image_arguments,
    add_machine_arguments,
    check_image_arguments,
    feature_batches,
    open_images,
    read_clustering,
    reason_of,
    refuse_bad,
    whiten,
)
from models import FEATURE
from util import Log, Progress, UserError, choose_device, make_folder, run_main

FORMATS = ("csv", "pickle", "links")
CHUNK = 8192  # points that are searched for together: the search has a fixed cost, on GPUs above all

# Relative error of a feature by the arithmetic of the convnet (for float32 see clustering.RELATIVE_NOISE).
NOISE = {"fp32": 2e-6, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}
# Squared distances of unit vectors, 0 to 4, that differ by less may be equal. Between batches, threads and
# fused batch norms they differ by 1e-6 to 1e-5 (AlexNet, 256 dimensions).
SMALLEST_TOLERANCE = 1e-3
LONGEST_NAME = 255  # bytes of a file name

# ---------------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="assign.py", description="Put images into the clusters of a run")
    add_image_arguments(parser)
    parser.add_argument(
        "--run",
        required=True,
        metavar="EXP",
        help=f"folder of a run of main.py, with {checkpoint.CLUSTERING} (or that file)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="OUT", help="file to write, or folder for links")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="csv",
        help="csv: path,cluster,distance (squared, to the centroid); pickle: a list of (path, cluster), as "
        "the authors released; links: OUT/<cluster>/<rank>_<name>, nearest first (default: %(default)s)",
    )
    group.add_argument("--relative", action="store_true", help="links relative to OUT (default: absolute)")
    group.add_argument("--copy", action="store_true", help="copies of the images instead of links")
    add_machine_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, in one line each."""
    check_image_arguments(args)
    out = Path(args.out)
    if args.format != "links":
        if args.copy or args.relative:
            raise UserError(f"--{'copy' if args.copy else 'relative'}: only with --format links")
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder; give the file to write, e.g. {out}/assignments.csv")
        return
    if args.copy and args.relative:
        raise UserError("--copy and --relative: copies are no links; give one of them")
    if args.shards and not args.copy:
        raise UserError("--format links: images in shards cannot be linked; give --copy")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists; give a folder that is new or empty")


# ---------------------------------------------------------------------------------------- the run's clusters


@dataclass
class Clusters:
    """The clusters of a run, and where each of its images went.

    points: (N, d) float32, the run's images, of PIC only; noise: relative error of features;
    row: relative path -> row of the image in the run.
    """

    pca: clustering.PCAWhitening
    stored: clustering.Assignment
    points: np.ndarray | None
    row: dict[str, int]
    feature_dtype: str
    noise: float
    device: torch.device

    @classmethod
    def from_state(cls, state: dict[str, Any], precision: str, device: torch.device) -> "Clusters":
        """state: the content of a clustering.pth.tar; precision: that of the features to come."""
        points, run = state.get("points"), state["args"]
        dtype = run.get("feature_dtype", "float32")
        noise = max(NOISE[precision], NOISE[run.get("precision", "fp32")])
        return cls(
            clustering.PCAWhitening.from_state_dict(state["whitening"]),
            clustering.Assignment.from_state_dict(state["assignment"]),
            None if points is None else points.numpy(),
            {path: i for i, path in enumerate(state["paths"])},
            dtype,
            max(noise, clustering.RELATIVE_NOISE[np.dtype(dtype)]),
            device,
        )

    def place(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, 4096) -> the points (n, d) that are compared, and their tolerances (n,) float64."""
        points, norms = whiten(features, self.pca, self.feature_dtype, self.device)
        return points, self.tolerance(features, norms)

    def tolerance(self, features: torch.Tensor, norms: np.ndarray) -> np.ndarray:
        """By how much squared distances from the points of these features may be off, (n,) float64.

        features: (n, 4096); norms: (n,) of what they are whitened to. An error of e = noise * RMS of the
        feature in each of its values becomes one of about e * |PCA matrix| after whitening, and of
        r = e * |PCA matrix| / norm after normalisation. It changes the difference between the squared
        distances to two centroids by at most 2 r |c1 - c2| <= 4 r, and one squared distance by as much.
        """
        rms = features.double().square().mean(1).sqrt().cpu().numpy()
        moved = self.noise * rms * np.linalg.norm(self.pca.matrix)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.fmax(SMALLEST_TOLERANCE, 4 * moved / norms)  # 0 / 0: features that are all the same

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For points x (n, d): labels (n,), squared distances to the centroid, and those that decided.

        The latter are the same for k-means, for PIC they are those to the nearest image of the run.
        """
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
        rows = rows[known]
        if self.points is None:
            targets, before = self.stored.centroids[self.stored.labels[rows]], self.stored.distances[rows]
        else:
            targets, before = self.points[rows], 0.0
        now = squared_distances(x[known], targets)
        off = np.maximum(now - decided[known], np.abs(now - before))
        same = off <= tolerance[known]
        labels[known[same]] = self.stored.labels[rows[same]]
        distances[known[same]] = self.stored.distances[rows[same]]
        return labels, distances


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, (n, d) and (n, d) -> (n,) float64."""
    return np.square(x.astype(np.float64) - y).sum(1)


# ---------------------------------------------------------------------------------------- the pass


def point_chunks(
    clusters: Clusters, batches: Iterator[tuple[np.ndarray, torch.Tensor, list[int]]], broken: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(indexes (n,), points (n, d), tolerances (n,)) of about CHUNK images; broken ones go into the list."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for index, features, bad in batches:
        broken += bad
        if len(index):
            parts.append((index, *clusters.place(features)))
        if sum(len(part[0]) for part in parts) >= CHUNK:
            yield tuple(map(np.concatenate, zip(*parts)))
            parts = []
    if parts:
        yield tuple(map(np.concatenate, zip(*parts)))


def assign_images(
    clusters: Clusters,
    images: data.ImageList,
    batches: Iterator[tuple[np.ndarray, torch.Tensor, list[int]]],
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Labels (N,) int64 and squared distances (N,) float32 of all images, and which could not be decoded.

    batches: of feature_batches, over all images. Labels of images that could not be decoded are -1.
    """
    labels, distances = np.full(len(images), -1), np.zeros(len(images), np.float32)
    broken: list[int] = []

    def counted() -> Iterator[tuple[np.ndarray, torch.Tensor, list[int]]]:
        for batch in batches:
            yield batch
            progress.update(len(batch[0]) + len(batch[2]))

    for index, x, tolerance in point_chunks(clusters, counted(), broken):
        rows = np.array([clusters.row.get(images.paths[i], -1) for i in index])
        labels[index], distances[index] = clusters.assign(x, tolerance, rows)
    return labels, distances, broken


# ---------------------------------------------------------------------------------------- output


def write_links(
    images: data.ImageList,
    labels: np.ndarray,
    distances: np.ndarray,
    out: str | Path,
    num_clusters: int,
    relative: bool = False,
    copy: bool = False,
) -> None:
    """OUT/<cluster>/<rank>_<name>: links to the images, or copies, nearest to the centroid first.

    Cluster and rank have leading zeros, so that listings are in order; the rank keeps images of one name
    apart. labels and distances (N,) as images; -1: leave out. OUT, new or empty, appears when it is complete.
    """
    out = Path(os.path.realpath(out))
    beside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    root, width = os.path.realpath(images.root), len(str(num_clusters - 1))
    order = np.lexsort((distances, labels))[(labels < 0).sum() :]
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    try:
        beside.mkdir(parents=True)
        for members in np.split(order, starts):
            folder = beside / f"{labels[members[0]]:0{width}d}"
            folder.mkdir()
            digits = len(str(len(members) - 1))
            for rank, i in enumerate(members.tolist()):
                name = ranked_name(f"{rank:0{digits}d}_", images.paths[i])
                target = os.path.join(root, images.paths[i])
                if copy:
                    (folder / name).write_bytes(images.read(i))
                else:
                    os.symlink(os.path.relpath(target, folder) if relative else target, folder / name)
        os.replace(beside, out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def ranked_name(rank: str, path: str) -> str:
    """The rank and the file's name, which loses the end of its stem if both are too long for a file name."""
    stem, ending = map(os.fsencode, os.path.splitext(os.path.basename(path)))
    return rank + os.fsdecode(stem[: LONGEST_NAME - len(rank) - len(ending)] + ending)


def write_output(
    args: argparse.Namespace,
    images: data.ImageList,
    labels: np.ndarray,
    distances: np.ndarray,
    num_clusters: int,
) -> None:
    """The file, or folder, that was asked for; labels (N,) of -1 are left out."""
    if args.format == "links":
        write_links(images, labels, distances, args.out, num_clusters, args.relative, args.copy)
        return
    found = labels >= 0
    kept = images if found.all() else images.keep(found)
    if args.format == "pickle":
        released.write_assignments_pickle(args.out, zip(kept.paths, labels[found].tolist()))
    else:
        logbook.write_assignments(Path(args.out), list(kept.paths), labels[found], distances[found])


def tell(args: argparse.Namespace, clusters: Clusters, images: data.ImageList, labels: np.ndarray) -> str:
    """What was written, and how much of it the run knew."""
    rows = np.array([clusters.row.get(path, -1) for path in images.paths])
    known = (rows >= 0) & (labels >= 0)
    kept = int((clusters.stored.labels[rows[known]] == labels[known]).sum())
    line = (
        f"{args.out}: {(labels >= 0).sum()} images in {len(np.unique(labels[labels >= 0]))} of "
        f"{clusters.stored.num_clusters} clusters; {known.sum()} are known to the run by their path, {kept} "
        "of them are in the cluster that it gave them"
    )
    if kept < known.sum():
        line += f", {known.sum() - kept} are not: they look different now"
    skipped = int((labels < 0).sum())
    return line + (f"; left out {skipped} that cannot be decoded" if skipped else "")


# ---------------------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Write the output; returns labels (N,) int64, -1 for skipped images, and squared distances (N,)."""
    check_arguments(args)
    device, log = choose_device(args.device), Log()
    path, state = read_clustering(args.run)
    settings = Settings.choose(args, state["args"], device)
    make_folder(Path(args.out).absolute().parent)
    clusters = Clusters.from_state(state, settings.precision, device)
    net = checkpoint.build_from(state, path).to(device)
    del state  # its weights are in the network
    images = open_images(args, settings.scaled)
    log(
        f"{len(images)} images in {args.dir or args.shards}, {clusters.stored.num_clusters} clusters in "
        f"{path}; {net.arch} at {settings.image_size} px, batches of {settings.batch}, on {device} "
        f"({settings.precision})"
    )
    progress = Progress(len(images), "assigning", log=log)
    batches = feature_batches(net, images, FEATURE, settings, args.workers, device)
    labels, distances, broken = assign_images(clusters, images, batches, progress)
    progress.close()
    if broken and not args.skip_bad_images:
        refuse_bad(images, [(i, reason_of(images, i)) for i in broken], args.out)
    if len(broken) == len(images):
        raise UserError(f"{args.dir or args.shards}: none of the {len(images)} images can be decoded")
    write_output(args, images, labels, distances, clusters.stored.num_clusters)
    log(tell(args, clusters, images, labels))
    return labels, distances


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
