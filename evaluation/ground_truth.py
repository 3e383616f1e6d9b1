"""Ground truth of Oxford5k and Paris6k: the images, the queries with their boxes, the right answers.

As published with the data sets: `list_database` lists CITY/jpg and `read_queries` reads CITY/lab;
`revisited_truth` takes the content of a pickle of the revisited protocol (Radenovic et al., CVPR 2018).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
from util import UserError

# Truncated files of Paris6k: the benchmark leaves them out, wherever it lists them.
CORRUPT = frozenset(
    f"paris_{name}"
    for name in (
        "louvre_000136", "louvre_000146", "moulinrouge_000422", "museedorsay_001059", "notredame_000188",
        "pantheon_000284", "pantheon_000960", "pantheon_000974", "pompidou_000195", "pompidou_000196",
        "pompidou_000201", "pompidou_000467", "pompidou_000640", "sacrecoeur_000299", "sacrecoeur_000330",
        "sacrecoeur_000353", "triomphe_000662", "triomphe_000833", "triomphe_000863", "triomphe_000867",
    )
)  # fmt: skip


Box = tuple[float, float, float, float]  # x min, y min, x max, y max in pixels of the file


@dataclass(frozen=True)
class Query:
    """image: name of the image the box is cut from; lists: 'ok', 'good', 'junk' (or 'easy', ...) -> names."""

    name: str
    image: str
    box: Box
    lists: dict[str, list[str]]


def list_database(folder: Path) -> dict[str, Path]:
    """Name -> path of every image in FOLDER/jpg (sub-folders too), sorted, without the corrupt ones."""
    if not (folder / "jpg").is_dir():
        raise UserError(f"jpg/ is missing in {folder} (expected the images in {folder}/jpg)")
    images = data.list_images(folder / "jpg")
    found: dict[str, Path] = {}
    for path in map(images.path, range(len(images))):
        if path.stem in found:
            raise UserError(f"{path} and {found[path.stem]} have the same name; keep one of them")
        if path.stem not in CORRUPT:
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder}/jpg holds none but images that the benchmark leaves out")
    return dict(sorted(found.items()))


def read_queries(folder: Path, known: Iterable[str]) -> list[Query]:
    """The queries of FOLDER/lab in order of their names. `known`: the images of the database.

    Corrupt images are dropped from the lists. Raises UserError for a missing lab/, no query at all, a file
    that is missing or malformed, a listed image that is absent, and a query without a right answer.
    """
    lab = folder / "lab"
    if not lab.is_dir():
        raise UserError(f"lab/ is missing in {folder} (expected <query>_query.txt, _ok, _good and _junk.txt)")
    files = sorted(lab.glob("*_query.txt"))
    if not files:
        raise UserError(f"{lab} holds no query (expected files <query>_query.txt)")
    known = set(known)
    return [_read_query(file, known) for file in files]


def _read_query(file: Path, known: set[str]) -> Query:
    name = file.name.removesuffix("_query.txt")
    words = _words(file)
    try:
        image, box = words[0].removeprefix("oxc1_"), _box(words[1:])
    except (IndexError, ValueError):
        raise UserError(f"{file}: expected one line: image name, x min, y min, x max, y max") from None
    lists = {}
    for kind in ("ok", "good", "junk"):
        path = file.with_name(f"{name}_{kind}.txt")
        names = [word for word in _words(path) if word not in CORRUPT]
        check_known(path, names, known)
        lists[kind] = names
    check_known(file, [image], known)
    if not lists["ok"] + lists["good"]:
        raise UserError(f"{file}: no right answer, {name}_ok.txt and {name}_good.txt are empty")
    return Query(name, image, box, lists)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        raise UserError(f"{path} is missing (each query needs _query, _ok, _good and _junk.txt)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def check_known(source: Path, names: Iterable[str], known: set[str]) -> None:
    """Raise UserError, naming the file `source`, for the first of `names` that is not among `known`."""
    for name in names:
        if name not in known:
            raise UserError(f"{source}: lists the image {name}, which is absent from jpg/")


# ---------------------------------------------------------------------------------------- revisited


def revisited_truth(path: str | Path, content: Any, known: Iterable[str]) -> tuple[list[str], list[Query]]:
    """The names of the database, and the queries, of the revisited protocol.

    content: what formats.safe_pickle found in the file `path`. known: the images of the database in jpg/.
    Raises UserError for anything else than such a ground truth, and for a listed image that is absent.
    """
    try:
        names, query_names = (_names(content[key]) for key in ("imlist", "qimlist"))
        queries = [
            _revisited_query(name, truth, names)
            for name, truth in zip(query_names, content["gnd"], strict=True)
        ]
    except Exception as error:  # a foreign file fails in any way
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--gnd {path}: not a ground truth of the revisited protocol ({type(error).__name__}: {reason})"
        ) from error
    if not queries:
        raise UserError(f"--gnd {path}: holds no query")
    check_known(path, names + query_names, set(known))
    return names, queries


def _names(names: Any) -> list[str]:
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError("a name of an image is not printable text")
    return list(names)


def _revisited_query(name: str, truth: dict[str, Any], names: list[str]) -> Query:
    box = _box(_plain(truth["bbx"]))
    lists = {}
    for kind in ("easy", "hard", "junk"):
        indexes = [int(i) for i in _plain(truth[kind])]
        if any(not 0 <= i < len(names) for i in indexes):
            raise ValueError(f"{kind} of {name} reaches beyond the list of images")
        lists[kind] = [names[i] for i in indexes]
    return Query(name, name, box, lists)


def _plain(values: Any) -> Iterable:
    """A list of numbers; or those of an array (formats.safe_pickle.Array) of one dimension."""
    numbers = getattr(values, "numbers", None)
    if numbers is None:
        return values
    if numbers.ndim != 1:
        raise ValueError(f"an array of {numbers.ndim} dimensions, not of one")
    return numbers.tolist()


def _box(values: Iterable[Any]) -> Box:
    """Four finite numbers; ValueError for anything else."""
    box = tuple(float(value) for value in values)
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"a box of {box}, expected four numbers")
    return box
