"""Small data sets in the shape of Oxford5k, cut from the demo photographs, and their ground truth."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.ground_truth import Query

PICTURES = Path(__file__).resolve().parent.parent / "demo" / "pictures"
CROPS = 5  # of each picture


def make_city(root: Path, pictures: list[str], seed: int) -> Path:
    """A folder in the shape of Oxford5k: jpg/ with overlapping crops, lab/ with one query a picture.

    The first crop is the query's image and 'good', the last one 'ok'; 'junk' is the fourth.
    """
    rng = np.random.default_rng(seed)
    (root / "jpg").mkdir(parents=True)
    (root / "lab").mkdir()
    for picture in pictures:
        image = Image.open(PICTURES / f"{picture}.jpg").convert("RGB")
        width, height = image.size
        w, h = int(0.75 * width), int(0.75 * height)
        names = [f"{picture}_{i:06d}" for i in range(CROPS)]
        for name in names:
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            image.crop((x, y, x + w, y + h)).resize((w // 2, h // 2)).save(
                root / f"jpg/{name}.jpg", quality=90
            )
        box = f"{0.05 * w:.1f} {0.05 * h:.1f} {0.45 * w:.1f} {0.45 * h:.1f}"
        lists = {"query": [f"oxc1_{names[0]} {box}"], "ok": names[4:], "good": names[:3], "junk": names[3:4]}
        for kind, lines in lists.items():
            (root / f"lab/{picture}_1_{kind}.txt").write_text("".join(line + "\n" for line in lines))
    return root


def truth_of(queries: list[Query], names: list[str], wrap: Callable) -> dict:
    """The content of a gnd pickle: hard is what was 'ok', easy what was 'good'."""
    images = [query.image for query in queries]
    database = [name for name in names if name not in images]  # as published: queries are no answers
    place = {name: i for i, name in enumerate(database)}

    def indexes(query: Query, kind: str):
        return wrap([place[name] for name in query.lists[kind] if name in place])

    gnd = [
        {"bbx": list(q.box), "easy": indexes(q, "good"), "hard": indexes(q, "ok"), "junk": indexes(q, "junk")}
        for q in queries
    ]
    return {"gnd": gnd, "imlist": database, "qimlist": images}
