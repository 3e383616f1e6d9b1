"""Images, seen or new -> cluster ids, by a run's own network, transform and centroids.

    python assign.py --run exp DIR --out assignments.csv                  # path,cluster,distance
    python assign.py --run exp DIR --format pickle --out clusters.pickle  # [(path, cluster), ...]
    python assign.py --run exp DIR --format links --out clusters          # clusters/0042/003_cat.jpg -> ...

EXP/clustering.pth.tar holds what this takes, of the moment of the last clustering. Images are looked at as in
the run unless told otherwise. Those that the run clustered keep the cluster that it gave them.

Features of an image differ in their last bits between devices, numbers of threads and batches, so that one
between two centroids could go to either. The run's word stands for an image that it knows by its path and
that looks the same within that noise (evaluation/clusters.py); a changed one goes where it belongs now. So
does every image of a DeepCluster-v2 run, which clusters random crops of the epoch before and not the central
ones that are looked at here: what that run trained on is in EXP/assignments.csv.
"""

import argparse

from commandline import OWN_SIZE, Parser, add_data, add_image_size, add_machine, at_least


def get_parser() -> Parser:
    """The flags of assign.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_data(parser)
    parser.add_argument(
        "--run", required=True, metavar="EXP", help="folder of a run, with clustering.pth.tar (or that file)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="OUT", help="file to write, or folder for links")
    group.add_argument(
        "--format",
        choices=("csv", "pickle", "links"),
        default="csv",
        help="csv: path,cluster,distance (squared, to the centroid); pickle: a list of (path, cluster), as "
        "the authors released; links: OUT/<cluster>/<rank>_<name>, nearest first",
    )
    group.add_argument("--relative", action="store_true", help="links relative to OUT, instead of absolute")
    group.add_argument("--copy", action="store_true", help="copies of the images instead of links")
    group = parser.add_argument_group("machine")
    add_image_size(group, None, OWN_SIZE)
    group.add_argument("--batch", type=at_least(1), help="images at a time (default: as in the run)")
    add_machine(group, precision=None)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from data import ImageList
from evaluation.clusters import Clusters
from features import Pass, Settings, activation_batches, bits_of, read_clustering
from formats.links import write_links
from formats.released import write_assignments_pickle
from models import weights
from models.network import Network
from training.logs import write_assignments
from util import Log, Progress, UserError, choose_device, make_folder, run_main

CHUNK = 8192  # points that are searched for together: the search has a fixed cost, on GPUs above all
Batches = Iterator[tuple[torch.Tensor | None, np.ndarray, list[int]]]  # (activations, indexes, broken images)


def main(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Write the output; returns labels (n,) int64 and squared distances (n,) of the images in it."""
    check(args)
    device, log = choose_device(args.device), Log()
    path, state = read_clustering(args.run)
    settings = Settings.choose(state["args"], device, args.image_size, args.batch, args.precision)
    out = Path(args.out)
    make_folder(out.absolute().parent)
    clusters = Clusters.from_state(state, settings.precision, device)
    layer, bits = state["layer"], bits_of(state)
    del state  # its weights are read into the network
    net = weights.load(path, [layer]).to(device)
    log(net.inputs.tell(args.image_size))
    bad_list = Path(f"{out}.bad_images.txt")
    inputs = [path, *path.parent.glob("*.pth.tar")]
    images = data.open_images(
        args.dir, args.shards, bad_list=bad_list, skip_bad=args.skip_bad_images, log=log,
        all_splits=args.all_splits,
        scaled=settings.scaled, bits=bits, workers=args.workers,
        enough=partial(check_images, form=args.format, out=out, outputs=[out, bad_list], inputs=inputs),
    )  # fmt: skip
    log(
        f"{len(images)} images in {images.name}, {clusters.stored.num_clusters} clusters in {path}; {layer} "
        f"of {net.arch} at {settings.image_size} px, batches of {settings.batch}, on {device} "
        f"({settings.precision})"
    )
    known = clusters.known(images)
    view = data.PlainView(images, data.central_crop(settings.image_size))
    how = Pass(settings.batch, args.workers, device, settings.precision)
    batches = layer_batches(net, layer, view, how, log)
    labels, distances, broken = assign_images(clusters, known, batches)
    data.leave_out(images, data.reasons(images, broken), bad_list, args.skip_bad_images, log)
    check_some(images)
    labels, distances, known = (np.delete(values, broken) for values in (labels, distances, known))
    if args.format == "links":
        write_links(images, labels, distances, out, clusters.stored.num_clusters, args.relative, args.copy)
    else:
        WRITERS[args.format](images, labels, distances, out)
    log(f"{out}: {tell(clusters, known, labels)}")
    return labels, distances


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and an OUT that cannot be."""
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
    if os.path.realpath(out) == os.getcwd():  # it is replaced, and one would stand in the old one
        raise UserError(f"--out {out}: is where you are; give a new folder, e.g. {out / 'clusters'}")


def check_images(
    images: ImageList, form: str, out: Path, outputs: Sequence[Path], inputs: Sequence[Path]
) -> None:
    """UserError where no image is left, one of the outputs is read, or links would become images of DIR."""
    check_some(images)
    data.refuse_overwriting(images, outputs, inputs)
    is_folder = images.folder is not None and not images.files
    if form == "links" and is_folder and Path(os.path.realpath(out)).is_relative_to(images.folder):
        raise UserError(
            f"--out {out}: lies in {images.name}, where the next call would take the links for images; "
            "choose a folder beside it"
        )


def check_some(images: ImageList) -> None:
    if not len(images):
        raise UserError(f"{images.name}: none of the {len(images.skipped)} images can be decoded")


# ---------------------------------------------------------------------------------------- the pass


def point_chunks(clusters: Clusters, batches: Batches, broken: list[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """(indexes (n,), points (n, d), tolerances (n,)) of about CHUNK images; broken ones go into the list."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for features, index, bad in batches:
        broken += bad
        if features is not None:
            parts.append((index, *clusters.place(features)))
        if sum(len(part[0]) for part in parts) >= CHUNK:
            yield tuple(map(np.concatenate, zip(*parts)))
            parts = []
    if parts:
        yield tuple(map(np.concatenate, zip(*parts)))


def layer_batches(net: Network, layer: str, view: data.PlainView, how: Pass, log: Log) -> Batches:
    """One pass over the images, with its progress: (activations, or None, indexes, broken images)."""
    progress = Progress(len(view), "assigning", log=log)
    for found, index, broken in activation_batches(net, [layer], view, how):
        yield found.get(layer), index, broken
        progress.update(len(index) + len(broken))
    progress.close()


def assign_images(
    clusters: Clusters, known: np.ndarray, batches: Batches
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Labels (N,) int64 and squared distances (N,) float32 of all images, and which could not be decoded.

    known: (N,), of Clusters.known. Labels of images that could not be decoded are -1.
    """
    labels, distances = np.full(len(known), -1), np.zeros(len(known), np.float32)
    broken: list[int] = []
    for index, x, tolerance in point_chunks(clusters, batches, broken):
        labels[index], distances[index] = clusters.assign(x, tolerance, known[index])
    return labels, distances, broken


# ---------------------------------------------------------------------------------------- output


def write_csv(images: ImageList, labels: np.ndarray, distances: np.ndarray, out: Path) -> None:
    write_assignments(out, list(images.paths), (labels, distances))


def write_pickle(images: ImageList, labels: np.ndarray, _: np.ndarray, out: Path) -> None:
    write_assignments_pickle(out, zip(images.paths, labels.tolist()))


WRITERS = {"csv": write_csv, "pickle": write_pickle}


def tell(clusters: Clusters, known: np.ndarray, labels: np.ndarray) -> str:
    """How many images went where, and how many of them the run knew: known and labels (n,)."""
    rows = known >= 0
    kept = int((clusters.stored.labels[known[rows]] == labels[rows]).sum())
    line = (
        f"{len(labels)} images in {len(np.unique(labels))} of {clusters.stored.num_clusters} clusters; "
        f"{rows.sum()} are known to the run by their path, {kept} of them are in the cluster that it gave "
        "them"
    )
    why = "they look different now, or the run clustered other crops of them (DeepCluster-v2)"
    return line + (f", {rows.sum() - kept} are not: {why}" if kept < rows.sum() else "")


if __name__ == "__main__":
    run_main(main, ARGS)
