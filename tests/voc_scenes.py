"""A folder in the shape of VOC2007 and VOC2012: photographs of objects on grass, with boxes and masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.voc_folder import crop

OBJECTS = ("cat", "coffee", "rocket")  # photographs in demo/pictures
LABELS = {"cat": 8, "coffee": 5, "rocket": 1}  # in masks: VOC's cat, bottle, aeroplane
ANNOTATION = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>
"""
OBJECT = """
<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def make_scenes(folder: Path, number: int = 8, width: int = 96, height: int = 64) -> Path:
    """`number` images in each of train, val and test: one or two objects each, some of the second difficult.

    Masks have a border of void around each object. Every fourth image stands upright.
    """
    root = folder / "VOC"
    for name in (
        "ImageSets/Main",
        "ImageSets/Segmentation",
        "JPEGImages",
        "Annotations",
        "SegmentationClass",
    ):
        (root / name).mkdir(parents=True)
    names: dict[str, list[str]] = {}
    for s, split in enumerate(("train", "val", "test")):
        names[split] = [f"{1000 * s + i:06d}" for i in range(number)]
        for i, name in enumerate(names[split]):
            size = (height, width) if i % 4 == 3 else (width, height)
            make_scene(root, name, np.random.default_rng([s, i]), OBJECTS[i % 3 :] + OBJECTS[: i % 3], size)
    names["trainval"] = names["train"] + names["val"]
    for split, images in names.items():
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    return root


def make_scene(
    root: Path, name: str, rng: np.random.Generator, objects: tuple, size: tuple[int, int]
) -> None:
    """One image: the first of objects in its left half, in every second image another one in its right."""
    picture = crop("grass", "train", int(rng.integers(1000))).resize(size)
    mask = np.zeros(size[::-1], np.uint8)
    entries = []
    for place, what in enumerate(objects[: 1 + int(name) % 2]):
        side = int(rng.integers(24, 31))
        left, top = place * size[0] // 2 + int(rng.integers(2)), int(rng.integers(2, size[1] - 32))
        picture.paste(crop(what, "train", int(rng.integers(1000))).resize((side, side)), (left, top))
        mask[top : top + side, left : left + side] = 255
        mask[top + 1 : top + side - 1, left + 1 : left + side - 1] = LABELS[what]
        box = (left + 1, top + 1, left + side, top + side)
        entries.append(OBJECT.format(name=what, difficult=int(place == 1 and int(name) % 4 == 1), box=box))
    picture.save(root / "JPEGImages" / f"{name}.jpg", quality=90)
    text = ANNOTATION.format(name=name, width=size[0], height=size[1], objects="".join(entries))
    (root / "Annotations" / f"{name}.xml").write_text(text)
    image = Image.fromarray(mask, "L").convert("P")
    image.putdata(list(mask.flatten()))
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(root / "SegmentationClass" / f"{name}.png")
