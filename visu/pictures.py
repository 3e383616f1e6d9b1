"""What a run shows at its end: where its files lie, its report, the gallery of its clusters."""

from pathlib import Path

import distributed
from data import ImageList
from training.labels import PseudoLabels
from training.run import Run
from util import Log, UserError
from visu import gallery, report


def finish(run: Run, images: ImageList, labels: PseudoLabels) -> None:
    """Say where the weights are and, without --no-report, write the pictures."""
    run.log(f"done: {run.epoch} epochs. Weights: {run.folder.last}  log: {run.lines}")
    if distributed.is_main() and not run.args.no_report:
        write_pictures(run.exp, images, labels, run.args.seed, run.log)


def write_pictures(exp: Path, images: ImageList, labels: PseudoLabels, seed: int, log: Log) -> None:
    """EXP/clusters.html, EXP/report.html and EXP/report.png; a failure there does not undo the training."""
    found = labels.assignments[0]
    try:
        gallery.write_gallery(
            images, found.labels, found.distances, exp / "clusters.html", num_clusters=found.num_clusters,
            fine=None if found.coarse is None else found.fine, seed=seed, name=exp.resolve().name, log=log,
        )  # fmt: skip
        log(f"gallery of the clusters: {exp}/clusters.html")
        png, page = report.write_report(exp)
        log(f"report: {page}, {png}")
    except (UserError, OSError) as error:
        log(f"no report: {error}")
