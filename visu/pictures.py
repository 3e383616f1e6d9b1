"""What a run shows at its end: its report and the gallery of its clusters."""

from pathlib import Path

from data import ImageList
from training.labels import PseudoLabels
from util import Log, UserError
from visu import gallery, report


def write_pictures(exp: Path, images: ImageList, labels: PseudoLabels, seed: int, log: Log) -> None:
    """EXP/clusters.html, EXP/report.html and EXP/report.png; a failure there does not undo the training."""
    found = labels.assignments[0]
    try:
        gallery.write_gallery(
            images, found.labels, found.distances, exp / "clusters.html", num_clusters=found.num_clusters,
            seed=seed, name=exp.resolve().name, log=log,
        )  # fmt: skip
        log(f"gallery of the clusters: {exp}/clusters.html")
        png, page = report.write_report(exp)
        log(f"report: {page}, {png}")
    except (UserError, OSError) as error:
        log(f"no report: {error}")
