"""How well the clusters of a run agree with classes, by every figure of the field.

    python eval_clusters.py exp
    python eval_clusters.py exp --labels labels.csv
    python assign.py DIR/val --run exp --out val.csv && python eval_clusters.py exp --val val.csv

Read are the clusters in EXP/assignments.csv, of every head, and the classes of the images: their first-level
sub-folders, or --labels. With other images (--val, or a column split in the labels) each cluster also stands
for its most frequent class in train, and the others are judged by that: the way to compare runs with many
more clusters than classes. No network and no image is opened.
"""

import argparse

from commandline import Parser, add_seed
from evaluation.flags import add_bootstrap, add_labels


def get_parser() -> Parser:
    """The flags of eval_clusters.py; those that evaluations share are in evaluation/flags.py."""
    parser = Parser(__doc__)
    parser.add_argument(
        "run", metavar="EXP", help="folder of a run, results go there too; or a file that assign.py wrote"
    )
    parser.add_argument(
        "--val", metavar="FILE", help="clusters of other images by the same run, as assign.py writes them"
    )
    add_labels(parser, splits=False)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="where paths in --labels are absolute: the folder that EXP's paths start from (default: that of "
        "the run)",
    )
    add_bootstrap(parser)
    add_seed(parser)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from pathlib import Path
from typing import Any

import numpy as np

from algorithms.agreement import Contingency
from evaluation import results
from evaluation.assignments import Clustered, by_file, by_folder, read_heads
from evaluation.cluster_quality import MEANING, judge, table_lines
from evaluation.labelled import Labels, read_labels
from util import Log, Progress, UserError, run_main
from visu.pages import read_config


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Judge the clusters; returns a dict for each head and split, as in results.json."""
    log, source = Log(), Path(args.run)
    exp = source if source.is_dir() else source.parent
    file = source / "assignments.csv" if source.is_dir() else source
    results.read(exp)
    labels = read_labels(args.labels, args.data or folder_of(exp)) if args.labels else None
    splits = open_clusters(str(file), "train", labels, log)
    if args.val:
        if "val" in splits:
            raise UserError(f"--val {args.val}: there are images of val in {file} already")
        of_val = open_clusters(args.val, "val", labels, log)
        if "val" not in of_val:
            raise UserError(f"--val {args.val}: {args.labels} says that all its images are of train")
        splits["val"] = of_val["val"]

    names = np.unique(np.concatenate([found.classes for found in splits.values()]))
    heads = [len(found.labels) for found in splits.values()]
    progress = Progress(args.bootstrap * sum(heads), "intervals", "draws", log)
    rows = []
    for head in range(max(heads)):
        map_of_train = None
        for split, found in splits.items():
            if head >= len(found.labels):  # assign.py gives those of the first head
                continue
            table = Contingency.of(found.labels[head], np.searchsorted(names, found.classes))
            figures = judge(table, map_of_train, args.bootstrap, args.seed, progress.update)
            map_of_train = table.most_frequent_class()
            rows.append({"head": head, "split": split, **numbers(found, head), **figures})
    if args.bootstrap:
        progress.close()

    names_of_rows = [f"{row['split']}, head {row['head']}, k {row['clusters']}" for row in rows]
    for line in table_lines(names_of_rows, rows):
        log(line)
    results.report(exp, "clusters", describe(args, str(file), rows), rows)
    return rows


def folder_of(exp: Path) -> str:
    """The folder that the run's paths start from, as far as its config.json tells; else the one here."""
    folder = (read_config(exp) or {}).get("args", {}).get("dir")
    return folder if isinstance(folder, str) else "."


def open_clusters(file: str, split: str, labels: Labels | None, log: Log) -> dict[str, Clustered]:
    """{split: images} of a file of clusters; says how many have no class."""
    paths, ids = read_heads(file)
    found = by_folder(file, paths, ids, split) if labels is None else by_file(file, paths, ids, split, labels)
    without = sum(part.without for part in found.values())
    if without:
        log(f"left out {without} of the {len(paths)} images in {file}, not in {labels.file}")
    return {name: found[name] for name in ("train", "val") if name in found}


def numbers(found: Clustered, head: int) -> dict[str, int]:
    """How many images, filled clusters and classes a split has."""
    clusters, classes = (len(np.unique(ids)) for ids in (found.labels[head], found.classes))
    return {"images": len(found), "clusters": clusters, "classes": classes}


def describe(args: argparse.Namespace, file: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the figures depend on."""
    sizes = []
    for first in (row for row in rows if row["head"] == 0):
        counts = [str(row["clusters"]) for row in rows if row["split"] == first["split"]]
        into = f"{' and '.join(counts)} clusters and {first['classes']} classes"
        sizes.append(f"{first['images']} of {first['split']} in {into}")
    return {
        "clusters of": file,
        **({"val": args.val} if args.val else {}),
        "classes by": args.labels or "sub-folders",
        "images": "; ".join(sizes),
        "figures": MEANING,
        "intervals": f"95 %, {args.bootstrap} draws of the images" if args.bootstrap else "none",
        "seed": args.seed,
    }


if __name__ == "__main__":
    run_main(main, ARGS)
