"""A gallery of clusters as one self-contained HTML page.

    python visu/clusters.py --exp exp                                  what main.py does at the end of a run
    python visu/clusters.py --csv assignments.csv --data DIR           any path,cluster[,distance] file

Of a run with several heads, or of a file with more columns, the first clustering is shown.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commandline import Parser, add_seed, add_shards, at_least, positive


def get_parser() -> Parser:
    """The flags of clusters.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to show")
    group.add_argument("--exp", metavar="EXP", help="folder of a run: its last clustering")
    group.add_argument("--csv", metavar="FILE", help="instead: a file with path,cluster[,distance] a line")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="where the images of --csv lie, or of --exp if they were moved: a folder or a .txt file",
    )
    add_shards(group, "--data")
    group = parser.add_argument_group("the page")
    group.add_argument("--out", metavar="FILE", help="default: EXP/clusters.html, or beside the --csv file")
    group.add_argument(
        "--thumb",
        type=at_least(16),
        metavar="PIXELS",
        help="longer side of the thumbnails, up to 1024 (default: 160, less where there are many clusters)",
    )
    group.add_argument(
        "--max-mb",
        type=positive,
        default=20,
        metavar="MB",
        help="largest size of the page; raise it to see more images",
    )
    add_seed(group)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import csv
from array import array
from typing import Any

import numpy as np

import checkpoint
import data
from data import ImageList
from training import logs
from util import Log, UserError, run_main
from visu.gallery import write_gallery
from visu.pages import read_config

Shown = tuple[ImageList, np.ndarray, np.ndarray | None]  # images, labels (N,) int64, distances (N,) or None


def main(args: argparse.Namespace) -> Path:
    """Write the page; returns its path."""
    check(args)
    if args.csv:
        file, num_clusters, fine, name = Path(args.csv), None, None, Path(args.csv).name
        folder, shards = args.data, args.shards
        out = Path(args.out) if args.out else file.with_suffix(".html")
    else:
        file, name = Path(args.exp) / "assignments.csv", Path(args.exp).resolve().name
        folder, shards = source_of_run(args.exp)
        if args.data or args.shards:
            folder, shards = args.data, args.shards
        num_clusters, fine = clusters_of_run(Path(args.exp))
        out = Path(args.out) if args.out else Path(args.exp) / "clusters.html"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    images, labels, distances = open_images(folder, shards, *read_assignments(file))
    log = Log()
    data.find_bits(images)
    write_gallery(
        images, labels, distances, out, num_clusters=num_clusters, fine=fine, thumb=args.thumb,
        max_mb=args.max_mb, seed=args.seed, name=name, log=log,
    )  # fmt: skip
    log(f"gallery: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if bool(args.exp) == bool(args.csv):
        raise UserError("give either --exp EXP (a run) or --csv FILE with --data DIR")
    if args.data and args.shards:
        raise UserError("--data and --shards: give one of them")
    if args.csv and not (args.data or args.shards):
        raise UserError(f"--csv {args.csv}: give with --data the folder that its paths start from")
    if args.thumb is not None and args.thumb > 1024:
        raise UserError(f"--thumb {args.thumb}: must lie between 16 and 1024 pixels")
    if args.out and args.csv and Path(args.out).resolve() == Path(args.csv).resolve():
        raise UserError(f"--out {args.out}: that is the --csv file; name another")


# ---------------------------------------------------------------------------------------- a run


def source_of_run(exp: str) -> tuple[str | None, str | None]:
    """(DIR, shards) of the images of a run, one of them None, as its config.json says."""
    config = read_config(exp)
    if config is None:
        raise UserError(f"{exp}/config.json is missing: not the folder of a run")
    found = [config.get("args", {}).get(name) for name in ("dir", "shards")]
    folder, shards = (name if isinstance(name, str) else None for name in found)
    if (folder is None) == (shards is None):
        raise UserError(f"{exp}/config.json: does not say where the images lie; give --data")
    return folder, shards


def clusters_of_run(exp: Path) -> tuple[int | None, int | None]:
    """How many clusters the last clustering made, empty ones too, and how many of them a super-cluster has.

    None where nothing tells, or there are no super-clusters.
    """
    if (exp / checkpoint.CLUSTERING).is_file():
        assignment = checkpoint.read(exp / checkpoint.CLUSTERING, peek=True).get("assignment")
        return number_of(assignment, "num_clusters"), number_of(assignment, "fine")
    if (exp / "log.jsonl").is_file():
        records = logs.read_lines(exp / "log.jsonl")
        return number_of(records[-1].get("clusters"), "number") if records else None, None
    return None, None


def number_of(found: Any, name: str) -> int | None:
    """The whole number under name in a dict, if both are what they should be."""
    number = found.get(name) if isinstance(found, dict) else None
    return number if type(number) is int and 0 < number < 2**31 else None


# ---------------------------------------------------------------------------------------- what is shown


def read_assignments(path: str | Path) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Paths, labels (N,) int64 and distances (N,) float64 (None without a third column) of a CSV file.

    A first line whose second field is no number is a header. Columns behind the third are passed over, as is
    a third that a header calls a cluster. Raises UserError with the number of the line.
    """
    paths, labels, distances, width = [], array("q"), array("d"), 0
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            for row in filter(None, reader):
                if not paths and not width and len(row) > 1 and not row[1].strip().lstrip("-").isdigit():
                    width = 2 if len(row) < 3 or row[2].strip().startswith("cluster") else 3  # the header
                    continue
                width = width or min(len(row), 3)
                paths.append(row[0])
                labels.append(cluster_id(row[1]))
                distances.append(float(row[2]) if width == 3 else math.nan)
    except (IndexError, ValueError, OverflowError):
        expected = "path,cluster,distance" if width == 3 else "path,cluster"
        raise UserError(f"{path}, line {reader.line_num}: expected {expected}, clusters from 0") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not paths:
        raise UserError(f"{path}: no line with path,cluster in it")
    return paths, np.array(labels), np.array(distances) if width == 3 else None


def cluster_id(text: str) -> int:
    """A cluster's number; ValueError if it is none."""
    number = int(text)
    if number < 0:
        raise ValueError(number)
    return number


def open_images(
    folder: str | None,
    shards: str | None,
    paths: list[str],
    labels: np.ndarray,
    distances: np.ndarray | None,
) -> Shown:
    """The images that paths name in a folder, a text file or shards; labels and distances in their order.

    A folder is not listed (it may hold a million files); shards and text files are. Raises UserError if the
    source or one of the images is missing.
    """
    if folder is not None and Path(folder).is_dir():
        images = ImageList(Path(folder), paths, *data.classes_of(paths))
        if not any(images.path(i).exists() for i in range(len(images))):
            raise UserError(
                f"{folder}: none of the images lies there, e.g. {paths[0]}; say where with --data"
            )
        return images, labels, distances
    listed = data.list_source(folder, shards)
    row = {path: i for i, path in enumerate(paths)}
    images = listed.keep(np.array([path in row for path in listed.paths]))
    order = [row[path] for path in images.paths]
    if len(order) < len(row):
        missing = next(iter(row.keys() - set(images.paths)))
        raise UserError(f"{listed.name}: {len(row) - len(order)} images are not there, e.g. {missing}")
    return images, labels[order], None if distances is None else distances[order]


if __name__ == "__main__":
    run_main(main, ARGS)
