"""The published figures that a comparison shows: read from the one table of them, in docs/results.md."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
FROM_MEMORY = "mem"

# Which rows belong to an evaluator: how its name in results.json begins, and how they do.
ROWS_OF = {
    "linear": ("ImageNet linear", "Places205 linear"),
    "semisup": ("ImageNet, few labels",),
    "pretrain": ("ImageNet fine-tuned",),
    "eval_voc_classif": ("VOC 2007 classification",),
    "eval_voc_detection": ("VOC 2007 detection", "VOC 2007 + 2012 detection"),
    "eval_voc_segmentation": ("VOC 2012 segmentation",),
    "eval_retrieval": ("Instance retrieval",),
    "lowshot": ("VOC 2007 SVM", "VOC 2007 linear"),
}
# How the table calls architectures (by how their names begin) and methods.
ARCHITECTURES = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
METHODS = {
    "deepcluster": r"\bDeepCluster\b(?!-)",
    "deepclusterv2": r"\bDeepCluster-v2\b",
    "swav": r"\bSwAV\b",
    "deepercluster": r"\bDeeperCluster\b|\bRotNet\b",
}
YARDSTICKS = r"\brandom\b|\blabels\b|\bsupervised\b"  # stand beside any method


@dataclass(frozen=True)
class Published:
    """A row of the table; words that stand for the row above are filled in."""

    evaluation: str
    network: str
    setting: str
    figure: str
    source: str
    architecture: str | None = None

    @property
    def from_memory(self) -> bool:
        """Quoted from memory and unverified: not to be cited."""
        return self.source == FROM_MEMORY


def read_published(path: Path = TABLE) -> list[Published]:
    """The rows of the table; none where the file is missing."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8").partition("## Published")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    rows: list[Published] = []
    for line in lines:
        cells = [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5:
            rows.append(filled(Published(*cells), rows[-1] if rows else None))
    return rows


def filled(row: Published, above: Published | None) -> Published:
    """The row with what it takes from the one above: the evaluation, `the same`, the architecture."""
    if above is None:
        return replace(row, architecture=architecture_in(row))
    evaluation = row.evaluation or above.evaluation
    row = replace(
        row,
        evaluation=evaluation,
        network=re.sub(r"^the same\b", lambda _: above.network, row.network),
        source=above.source if row.source == "the same" else row.source,
    )
    inherited = above.architecture if evaluation == above.evaluation else None
    return replace(row, architecture=architecture_in(row) or inherited)


def architecture_in(row: Published) -> str | None:
    return next((name for name in ARCHITECTURES.values() if name in f"{row.network} {row.setting}"), None)


def published_for(
    evaluator: str, archs: Collection[str], methods: Collection[str], rows: list[Published]
) -> list[Published]:
    """The rows that belong beside an evaluator's figures: of these architectures, by these methods.

    Also those of random networks and of labels. archs, methods: as config.json names them.
    """
    starts = next((s for name, s in ROWS_OF.items() if evaluator.startswith(name)), ())
    wanted = {name for arch in archs for key, name in ARCHITECTURES.items() if arch.startswith(key)}
    pattern = re.compile("|".join([YARDSTICKS, *(METHODS[m] for m in methods if m in METHODS)]))
    return [
        row
        for row in rows
        if row.evaluation.startswith(tuple(starts))
        and row.architecture in wanted
        and pattern.search(f"{row.network} {row.setting}")
    ]
