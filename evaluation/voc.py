"""Pascal VOC 2007 classification: images and labels of a split, what trains, the loss, average precisions.

Several classes may be in one image, so each class is a yes or no of its own; 'difficult' images count neither
in its loss nor in its average precision.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

import data
from data import ImageError, ImageList
from models.network import Network, renew_linears
from util import UserError, derive_seed

SPLITS = {"train": ("train", "val"), "trainval": ("trainval", "test")}  # --split -> trained on, tested on
TIE = 1e-5  # DeeperCluster takes it off the positives' scores
INIT_BIAS = 0.1  # of the head and of the linear layers that are renewed
LABELS = {"1": 1, "+1": 1, "-1": -1, "0": 0}  # present, absent, 'difficult', which is ignored

# ---------------------------------------------------------------------------------------- the data set


@dataclass
class VocSplit:
    """The images of one split in the order of its lists, with labels (N, C) int8: 1 yes, -1 no, 0 ignored.

    A part of a run: its state tells whether a run that goes on finds the same images and labels.
    """

    name: str
    images: ImageList
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def state_dict(self) -> dict[str, Any]:
        """A digest of file names, class names and labels; the classes, for whoever reads the checkpoint."""
        text = "\n".join([self.images.digest(), *self.class_names])
        digest = hashlib.sha256(text.encode() + self.labels.tobytes()).hexdigest()
        return {"digest": digest, "class_names": self.class_names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError unless the images and labels are those of the state."""
        if state["digest"] != self.state_dict()["digest"]:
            raise UserError(f"the run had other images or labels than {self.name} in {self.images.name} has")


def open_voc(vocdir: str | Path, split: str) -> tuple[VocSplit, VocSplit]:
    """The split to train on and the one to test on, with the same classes in the same (sorted) order.

    The classes are those with a list ImageSets/Main/<class>_<split>.txt. Raises UserError for a missing
    folder or list, a list that is empty or wrong, and images that are listed but absent.
    """
    vocdir = Path(vocdir)
    lists = vocdir / "ImageSets" / "Main"
    for folder in (lists, vocdir / "JPEGImages"):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing (expected VOC2007/ImageSets/Main and VOC2007/JPEGImages)")
    names = SPLITS[split]
    found = [
        {path.name.removesuffix(f"_{name}.txt") for path in lists.glob(f"*_{name}.txt")} for name in names
    ]
    class_names = sorted(set.union(*found))
    if not class_names:
        raise UserError(f"{lists}: no list of a class there (expected files such as cat_{names[0]}.txt)")
    for name, classes in zip(names, found):
        missing = [class_name for class_name in class_names if class_name not in classes]
        if missing:
            raise UserError(f"{lists / f'{missing[0]}_{name}.txt'} is missing (--split {split} needs it)")
    trained, tested = (open_split(vocdir, name, class_names) for name in names)
    return trained, tested


def open_split(vocdir: Path, name: str, class_names: list[str]) -> VocSplit:
    """Images and labels of the lists <class>_<name>.txt, which must all name the same images."""
    first: dict[str, int] = {}
    columns = []
    for class_name in class_names:
        path = vocdir / "ImageSets" / "Main" / f"{class_name}_{name}.txt"
        labels = read_list(path)
        first = first or labels
        odd = sorted(set(first) ^ set(labels))
        if odd:
            pair = (path.name, f"{class_names[0]}_{name}.txt")
            lists, lacks = pair if odd[0] in labels else pair[::-1]
            raise UserError(
                f"{path.parent}: {lists} lists {odd[0]} and {lacks} does not; both need the same images"
            )
        columns.append([labels[image] for image in first])
    images = ImageList(vocdir / "JPEGImages", [f"{image}.jpg" for image in first])
    images.name = str(vocdir)
    absent = [i for i in range(len(images)) if not images.path(i).is_file()]
    if absent:
        raise UserError(
            f"{images.path(absent[0])} does not exist but is listed in {class_names[0]}_{name}.txt "
            f"({len(absent)} of {len(images)} images of {name} are absent)"
        )
    return VocSplit(name, images, np.array(columns, dtype=np.int8).T.copy(), class_names)


def read_list(path: Path) -> dict[str, int]:
    """Image name -> 1, -1 or 0 from a list of lines `000012 -1`, in its order; UserError if it is not one."""
    labels: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in LABELS:
            raise UserError(f"{path} line {number}: {line.strip()!r} is not an image name and 1, -1 or 0")
        image, label = fields
        if "/" in image or "\0" in image:
            raise UserError(f"{path} line {number}: {image!r} is no name of an image in JPEGImages")
        if image in labels:
            raise UserError(f"{path} line {number}: {image} is listed twice")
        labels[image] = LABELS[label]
    if not labels:
        raise UserError(f"{path} lists no image (expected a line `<image name> <1, -1 or 0>` for each)")
    return labels


def read_names(path: Path) -> list[str]:
    """The image names of a list such as ImageSets/Main/trainval.txt; UserError if it is not one."""
    names: dict[str, None] = {}
    for number, line in enumerate(read_lines(path), start=1):
        name = line.strip()
        if not name:
            continue
        if "/" in name or "\0" in name or len(name.split()) > 1:
            raise UserError(f"{path} line {number}: {name!r} is no name of an image in JPEGImages")
        if name in names:
            raise UserError(f"{path} line {number}: {name} is listed twice")
        names[name] = None
    if not names:
        raise UserError(f"{path} lists no image (expected a name on each line)")
    return list(names)


def read_lines(path: Path) -> list[str]:
    """The lines of a list; UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read") from error


def check_folders(vocdir: Path, *folders: str) -> None:
    """UserError where one of the folders of a VOC folder is missing."""
    for folder in folders:
        if not (vocdir / folder).is_dir():
            raise UserError(f"{vocdir / folder} is missing (expected {' and '.join(folders)} in {vocdir})")


def check_files(paths: list[Path], listed_in: str | Path) -> None:
    """UserError, naming the first, where some of the files that a list names are absent."""
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise UserError(
            f"{absent[0]} does not exist but is listed in {listed_in} ({len(absent)} of {len(paths)} are "
            "absent)"
        )


def check_images(split: VocSplit, workers: int) -> None:
    """Decode every image once: better a list of the broken ones now than one of them hours later."""
    decoded_sizes(split.images, split.name, workers)


def decoded_sizes(images: ImageList, split: str, workers: int) -> np.ndarray:
    """Decode every image of a split: their heights and widths, (N, 2) int64. UserError if that fails."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        sizes = list(pool.map(partial(_size, images), range(len(images))))
    bad = data.reasons(images, [i for i, size in enumerate(sizes) if size is None])
    if bad:
        broken = [f"{images.path(i)}: {reason}" for i, reason in bad[:10]]
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(
            f"{len(bad)} of {len(images)} images of {split} cannot be decoded "
            f"({'; '.join(broken)}{more}); fetch them again"
        )
    return np.array(sizes, dtype=np.int64)


def _size(images: ImageList, i: int) -> tuple[int, int] | None:
    """Height and width of image i; None where it cannot be decoded."""
    try:
        return tuple(images.decode(i).shape[1:])
    except ImageError:
        return None


# ---------------------------------------------------------------------------------------- network and loss


def renew(net: Network, num_classes: int, seed: int) -> None:
    """A fresh head for num_classes and, on the convolutions, fresh linears: N(0, 0.01), bias 0.1."""
    net.set_head(num_classes, derive_seed(seed, "voc head"))
    net.top_layer.bias.data.fill_(INIT_BIAS)
    renew_linears(net.parts()[1], INIT_BIAS, derive_seed(seed, "voc classifier"))


def freeze(net: Network, fc6_8: bool, train_batchnorm: bool) -> None:
    """Set what trains: fc6_8 leaves out the convolutions, and their batch norms unless train_batchnorm."""
    convolutions, _ = net.parts()
    convolutions.requires_grad_(not fc6_8)
    for layer in convolutions.modules():
        if isinstance(layer, nn.BatchNorm2d) and train_batchnorm:
            layer.requires_grad_(True)


class GlobalStatistics(nn.Module):
    """net, whose convolutions stay in eval mode while it trains.

    Their batch norms use, and leave alone, the global statistics; dropout behind them is on.
    """

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def train(self, mode: bool = True) -> "GlobalStatistics":
        super().train(mode)
        self.net.parts()[0].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def voc_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits (B, C), summed over classes and images, () float32.

    labels (B, C): 1 present, -1 absent, 0 ignored, which adds nothing to loss and gradient.
    """
    present, counts = (labels > 0).to(logits.dtype), (labels != 0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, present, weight=counts, reduction="sum")


# ---------------------------------------------------------------------------------------- average precision


def average_precisions(scores: np.ndarray, split: VocSplit, pessimistic_ties: bool = False) -> dict[str, Any]:
    """AP of each class over the images that are not ignored, and the means, in percent.

    scores (N, C). A class without any positive has no AP (None) and is left out of the means.
    pessimistic_ties: 1e-5 is taken off the positives' scores first, so that they come behind what is near.
    """
    ap: dict[str, float | None] = {}
    ap_11: dict[str, float | None] = {}
    for c, name in enumerate(split.class_names):
        counts = split.labels[:, c] != 0
        present, score = split.labels[counts, c] > 0, scores[counts, c]
        score = score.astype(np.float64) - TIE * present if pessimistic_ties else score
        defined = present.any()
        ap[name] = 100 * float(average_precision_score(present, score)) if defined else None
        ap_11[name] = 100 * eleven_point(present, score) if defined else None
    return {
        "unit": "percent",
        "mAP": mean(ap),
        "mAP_11point": mean(ap_11),
        "AP": ap,
        "AP_11point": ap_11,
    }


def mean(values: dict[str, float | None]) -> float | None:
    """Mean of the values that are there; None where there is none."""
    there = [value for value in values.values() if value is not None]
    return float(np.mean(there)) if there else None


def eleven_point(present: np.ndarray, scores: np.ndarray) -> float:
    """The VOC 2007 challenge's metric: mean over recalls 0, 0.1 ... 1 of the best precision from there on.

    present (N,) bool with at least one True, scores (N,); equal scores rank in the order given.
    Everingham et al., 'The PASCAL Visual Object Classes (VOC) Challenge', 2010, section 3.4.1.
    """
    return eleven_point_of(present[np.argsort(-scores, kind="stable")], int(present.sum()))


def eleven_point_of(hits: np.ndarray, positives: int) -> float:
    """The same of a ranking, hits (n,) bool the best first, that may not have found all of the positives."""
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(found) + 1)
    # In whole numbers, found * 10 >= tenths * positives: 3 of 10 positives is a recall of 0.3 and not less.
    reached = [precision[found * 10 >= tenths * positives] for tenths in range(11)]
    return float(np.mean([values.max(initial=0.0) for values in reached]))
