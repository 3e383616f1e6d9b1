"""A folder in the shape of VOC2007, made of crops of the demo's photographs."""

from pathlib import Path

from PIL import Image

import demo

CLASSES = ("coffee", "grass", "retina", "rocket")  # photographs in demo/pictures


def crop(name: str, columns: str, seed: int) -> Image.Image:
    """A 64-pixel crop from the left ("train") or the right ("val") part of a photograph."""
    with Image.open(demo.PICTURES / f"{name}.jpg") as picture:
        return demo.cut_crop(picture, demo.regions(picture.width)[columns], seed).resize((64, 64))


def write_list(voc_folder: Path, name: str, labels: dict[str, int]) -> None:
    """As in the real data set: the image, then a sign or a blank, then the digit."""
    text = "".join(f"{image} {label:2d}\n" for image, label in labels.items())
    (voc_folder / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


def make_voc(folder: Path, number: int = 24) -> Path:
    """A VOC2007 folder: `number` images in each of train, val, test; every third image shows two classes.

    The second class of such an image is sometimes 'difficult' (0). Pixels of test are in no other split.
    """
    root = folder / "VOC2007"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for s, split in enumerate(("train", "val", "test")):
        part = "val" if split == "test" else "train"
        labels[split] = {name: {} for name in CLASSES}
        for i in range(number):
            image = f"{1000 * s + i:06d}"
            first, second = CLASSES[i % 4], CLASSES[(i + 1) % 4]
            picture = crop(first, part, seed=1000 * s + i)
            present = {first: 1}
            if i % 3 == 0:
                picture.paste(crop(second, part, seed=i).crop((0, 0, 24, 64)), (40, 0))
                present[second] = 0 if i % 2 else 1
            picture.save(root / "JPEGImages" / f"{image}.jpg", quality=90)
            for name in CLASSES:
                labels[split][name][image] = present.get(name, -1)
    for name in CLASSES:
        both = labels["train"][name] | labels["val"][name]
        for split, column in {**{s: labels[s][name] for s in labels}, "trainval": both}.items():
            write_list(root, f"{name}_{split}", column)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in column))
    return root
