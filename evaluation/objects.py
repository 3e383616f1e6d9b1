"""The objects of a VOC folder: images of a split and the boxes in their annotations.

Boxes are (x1, y1, x2, y2) in pixels from the upper left corner of the image to the lower right corner of the
box: a file's xmin 1, xmax 10 is x1 0, x2 10. So areas and overlaps are those of the challenge, which counts
pixels from 1 and both ends in.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from data import ImageList
from evaluation.voc import SPLITS, check_files, check_folders, decoded_sizes, read_names
from util import UserError

FOLDERS = ("ImageSets/Main", "JPEGImages", "Annotations")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Objects(NamedTuple):
    """What one image holds: boxes (n, 4) float32, labels (n,) int64 from 0, difficult (n,) bool."""

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


@dataclass
class ObjectSplit:
    """The images of one split in the order of its list, with their objects and (N, 2) heights and widths.

    A part of a run: its state tells whether a run that goes on finds the same images and objects.
    """

    name: str
    images: ImageList
    objects: list[Objects]
    class_names: list[str]
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def state_dict(self) -> dict[str, Any]:
        """A digest of file names, class names and objects; the classes, for whoever reads the checkpoint."""
        found = hashlib.sha256("\n".join([self.images.digest(), *self.class_names]).encode())
        for objects in self.objects:
            for array in objects:
                found.update(str(array.shape).encode() + array.tobytes())
        return {"digest": found.hexdigest(), "class_names": self.class_names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError unless the images and objects are those of the state."""
        if state["digest"] != self.state_dict()["digest"]:
            raise UserError(f"the run had other images or objects than {self.name} in {self.images.name} has")


def open_objects(vocdir: str | Path, split: str) -> tuple[ObjectSplit, ObjectSplit]:
    """The split to train on and the one to test on; their classes are those that annotations name, sorted.

    Raises UserError for a missing folder, list, image or annotation, and for one that is wrong.
    """
    vocdir = Path(vocdir)
    check_folders(vocdir, *FOLDERS)
    found = []
    for name in SPLITS[split]:
        path = vocdir / "ImageSets" / "Main" / f"{name}.txt"
        if not path.is_file():
            raise UserError(f"{path} is missing (--split {split} needs it)")
        names = read_names(path)
        images = ImageList(vocdir / "JPEGImages", [f"{image}.jpg" for image in names])
        images.name = str(vocdir)
        annotations = [vocdir / "Annotations" / f"{image}.xml" for image in names]
        check_files([images.path(i) for i in range(len(images))], path.name)
        check_files(annotations, path.name)
        found.append((name, images, [read_annotation(path) for path in annotations]))
    classes = sorted({entry[0] for _, _, every in found for entries in every for entry in entries})
    if not classes:
        raise UserError(
            f"{vocdir / 'Annotations'}: no object in any annotation of {' or '.join(SPLITS[split])}"
        )
    ids = {name: i for i, name in enumerate(classes)}
    return tuple(
        ObjectSplit(name, images, [as_arrays(entries, ids) for entries in every], classes)
        for name, images, every in found
    )


def read_annotation(path: Path) -> list[tuple[str, list[float], bool]]:
    """(class, [x1, y1, x2, y2], difficult) of each object in an annotation; UserError if it is not one."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: not an XML file that can be read ({str(error).splitlines()[0]})") from error
    found = []
    for number, entry in enumerate(root.findall("object"), start=1):
        name = (entry.findtext("name") or "").strip()
        try:
            box = [float(entry.findtext(f"bndbox/{corner}") or "") for corner in CORNERS]
        except ValueError:
            raise UserError(f"{path}: object {number} has no bndbox of four numbers") from None
        box = [box[0] - 1, box[1] - 1, box[2], box[3]]
        if not name:
            raise UserError(f"{path}: object {number} has no name")
        if not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(f"{path}: object {number}, a {name}, has an empty box")
        found.append((name, box, (entry.findtext("difficult") or "0").strip() == "1"))
    return found


def as_arrays(entries: list[tuple[str, list[float], bool]], ids: dict[str, int]) -> Objects:
    """Entries of an annotation as arrays, classes by their ids."""
    return Objects(
        np.array([box for _, box, _ in entries], np.float32).reshape(-1, 4),
        np.array([ids[name] for name, _, _ in entries], np.int64),
        np.array([difficult for _, _, difficult in entries], bool),
    )


def check(split: ObjectSplit, workers: int) -> None:
    """Decode every image once, which tells its size, and cut the boxes at its border.

    Raises UserError for images that cannot be decoded, and for a box beside its image.
    """
    split.sizes = decoded_sizes(split.images, split.name, workers)
    for i, (objects, (height, width)) in enumerate(zip(split.objects, split.sizes)):
        border = np.array([width, height, width, height], np.float32)
        boxes = np.clip(objects.boxes, 0, border)
        if (boxes[:, :2] >= boxes[:, 2:]).any():
            raise UserError(f"{split.images.path(i)}: has {width} x {height} pixels, and a box beside them")
        split.objects[i] = objects._replace(boxes=boxes)
