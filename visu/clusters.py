"""A gallery of a run's clusters: one HTML page that needs nothing but itself.

    python visu/clusters.py --exp exp                                  what main.py does at the end of a run
    python visu/clusters.py --csv assignments.csv --data DIR           any path,cluster[,distance] file

The page holds thumbnails, file names and numbers as JSON; gallery.html, its template, draws them. Below 20 MB
by sampling: of each cluster the images nearest to the centroid and a random sample.
"""

import argparse
import base64
import csv
import html
import io
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from data.shards import list_shards
from util import Log, Progress, UserError, atomic_write, derive_seed, run_main
from visu.pages import printable, read_config

TEMPLATE = Path(__file__).with_name("gallery.html")

# Sides of a thumbnail to choose from, and about how many bytes of the page one takes (photographs, WebP).
THUMB_BYTES = {160: 5500, 128: 3700, 96: 2300, 64: 1200}
PER_CLUSTER = 24  # the side is the largest at which so many images of each cluster fit
THUMBNAILS_PER_MB = 600  # a bound on the time: images may be small and many
WEBP = {"format": "WEBP", "quality": 70, "method": 2}
BLOCK = 256  # images are decoded so many at a time
NAMES_SHARE = 0.3  # the names of all images are in the page if they take at most this share of it


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clusters.py", description="A gallery of clusters as one self-contained HTML page"
    )
    group = parser.add_argument_group("what to show")
    group.add_argument("--exp", metavar="EXP", help="folder of a run: its last clustering")
    group.add_argument("--csv", metavar="FILE", help="instead: a file with path,cluster[,distance] a line")
    group.add_argument(
        "--data",
        metavar="DIR",
        help="where the images of --csv lie, or of --exp if they were moved: folder, .txt file or shards",
    )
    group = parser.add_argument_group("the page")
    group.add_argument("--out", metavar="FILE", help="default: EXP/clusters.html, or beside the --csv file")
    group.add_argument(
        "--thumb",
        type=int,
        metavar="PIXELS",
        help="longer side of the thumbnails (default: 160, less where there are many clusters)",
    )
    group.add_argument(
        "--max-mb", type=float, default=20, metavar="MB", help="largest size of the page (default: 20)"
    )
    group.add_argument("--seed", type=int, default=31, help="of the random samples (default: 31)")
    return parser


def main(args: argparse.Namespace) -> Path:
    """Write the page; returns its path."""
    check_arguments(args)
    if args.csv:
        file, source, num_clusters, name = Path(args.csv), args.data, None, Path(args.csv).name
        out = Path(args.out) if args.out else file.with_suffix(".html")
    else:
        file, config = Path(args.exp) / "assignments.csv", read_config(args.exp)
        if config is None:
            raise UserError(f"{args.exp}/config.json is missing: not the folder of a run of main.py")
        source = args.data or config["args"].get("shards") or config["args"]["dir"]
        num_clusters = config["args"]["nmb_cluster"] if config["args"]["clustering"] == "Kmeans" else None
        name = Path(args.exp).resolve().name
        out = Path(args.out) if args.out else Path(args.exp) / "clusters.html"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    images, labels, distances = open_images(source, *read_assignments(file))
    log = Log()
    write_gallery(
        images, labels, distances, out, num_clusters=num_clusters, thumb=args.thumb, max_mb=args.max_mb,
        seed=args.seed, name=name, log=log,
    )  # fmt: skip
    log(f"gallery: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def check_arguments(args: argparse.Namespace) -> None:
    if bool(args.exp) == bool(args.csv):
        raise UserError("give either --exp EXP (a run) or --csv FILE with --data DIR")
    if args.csv and not args.data:
        raise UserError(f"--csv {args.csv}: give with --data the folder that its paths start from")
    if args.thumb is not None and not 16 <= args.thumb <= 1024:
        raise UserError(f"--thumb {args.thumb}: must lie between 16 and 1024 pixels")
    if not args.max_mb > 0:
        raise UserError(f"--max-mb {args.max_mb}: must be positive")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be at least 0")


# ---------------------------------------------------------------------------------------- what is shown


def read_assignments(path: str | Path) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Paths, labels (N,) int64 and distances (N,) float64 (None without a third column) of a CSV file.

    A first line whose second field is no number is a header. Raises UserError with the number of the line.
    """
    paths, labels, distances, width = [], array("q"), array("d"), 0
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            for row in filter(None, reader):
                if not paths and not width and len(row) > 1 and not row[1].strip().lstrip("-").isdigit():
                    width = min(len(row), 3)  # the header
                    continue
                width = width or min(len(row), 3)
                paths.append(row[0])
                labels.append(cluster_id(row[1]))
                distances.append(float(row[2]) if width == 3 else 0.0)
    except (IndexError, ValueError, OverflowError):
        expected = "path,cluster,distance" if width == 3 else "path,cluster"
        raise UserError(f"{path}, line {reader.line_num}: expected {expected}, clusters from 0") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not paths:
        raise UserError(f"{path}: no line with path,cluster in it")
    return paths, np.array(labels), np.array(distances) if width == 3 else None


def cluster_id(text: str) -> int:
    """A cluster's number; ValueError if it is none."""
    number = int(text)
    if number < 0:
        raise ValueError(number)
    return number


def open_images(
    source: str | Path, paths: list[str], labels: np.ndarray, distances: np.ndarray | None
) -> tuple[data.ImageList, np.ndarray, np.ndarray | None]:
    """The images that paths name in source, with labels and distances in their order.

    A folder is not listed (it may hold a million files); shards and text files are. Raises UserError if the
    source or one of the images is missing.
    """
    if Path(source).is_dir():
        images = data.ImageList(Path(source), paths, *data.classes_of(paths))
        if not any(images.path(i).exists() for i in range(len(images))):
            raise UserError(
                f"{source}: none of the images lies there, e.g. {paths[0]}; say where with --data"
            )
        return images, labels, distances
    listed = list_shards(source) if str(source).endswith(".tar") else data.list_images(source)
    row = {path: i for i, path in enumerate(paths)}
    images = listed.keep(np.array([path in row for path in listed.paths]))
    order = [row[path] for path in images.paths]
    if len(order) < len(row):
        missing = next(iter(row.keys() - set(images.paths)))
        raise UserError(f"{source}: {len(row) - len(order)} images are not there, e.g. {missing}")
    return images, labels[order], None if distances is None else distances[order]


# ---------------------------------------------------------------------------------------- numbers


@dataclass
class Cluster:
    """What the page says of a cluster. Positions count the members from the nearest to the farthest.

    members: image indexes, nearest first; spread: mean squared distance to the centroid; purity: share of the
    most frequent class (majority). near and random: positions to show; thumbs: position -> base64.
    """

    id: int
    members: np.ndarray
    spread: float | None = None
    purity: float | None = None
    majority: int | None = None
    near: list[int] = field(default_factory=list)
    random: list[int] = field(default_factory=list)
    thumbs: dict[int, str] = field(default_factory=dict)


def measure_clusters(
    labels: np.ndarray, distances: np.ndarray | None, classes: np.ndarray | None
) -> list[Cluster]:
    """The clusters that hold images, in the order of their ids, with their numbers.

    labels (N,) int64 from 0; distances (N,) squared, or None: then members keep the order of the images and
    there is no spread; classes (N,) int64 or None. Of equally frequent classes the first is the majority.
    """
    order = np.argsort(labels, kind="stable") if distances is None else np.lexsort((distances, labels))
    ids, starts = np.unique(labels[order], return_index=True)
    members = np.split(order, starts[1:])
    clusters = [Cluster(int(i), m) for i, m in zip(ids, members)]
    for cluster in clusters:
        if distances is not None:
            cluster.spread = float(distances[cluster.members].mean(dtype=np.float64))
        if classes is not None:
            counts = np.bincount(classes[cluster.members])
            cluster.majority = int(counts.argmax())
            cluster.purity = float(counts.max() / len(cluster.members))
    return clusters


# ---------------------------------------------------------------------------------------- thumbnails


def thumbnail(images: data.ImageList, i: int, side: int) -> str | None:
    """Image i with its longer side reduced to `side` pixels, WebP in base64; None if it cannot be decoded."""
    try:
        picture = Image.fromarray(images.decode(i).permute(1, 2, 0).contiguous().numpy())
    except data.ImageError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, **WEBP)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def choose_side(num_images: int, num_clusters: int, max_bytes: float) -> int:
    """The largest side of which PER_CLUSTER thumbnails of each cluster (or all images) fit the page."""
    wanted = min(num_images, PER_CLUSTER * num_clusters)
    return next((side for side, size in THUMB_BYTES.items() if wanted * size < max_bytes), min(THUMB_BYTES))


def candidates(clusters: list[Cluster], seed: int) -> Iterator[tuple[Cluster, int, bool]]:
    """(cluster, position, whether drawn at random) in the order in which the page is filled.

    Round by round over all clusters, the largest first: two rounds give the next nearest, the third a random
    member. So every cluster has its nearest image before any has two, until the page is full.
    """

    def of_one(cluster: Cluster) -> Iterator[tuple[Cluster, int, bool]]:
        size = len(cluster.members)
        for step in range(size):
            yield cluster, step, False
            if step == min(1, size - 1):  # not before it is needed: there may be 10,000 clusters
                drawn = np.random.default_rng(derive_seed(seed, "gallery", cluster.id)).permutation(size)
            if step % 2 == 1:
                yield cluster, int(drawn[step // 2]), True
        for position in drawn[size // 2 :]:
            yield cluster, int(position), True

    active = [of_one(cluster) for cluster in sorted(clusters, key=lambda c: -len(c.members))]
    while active:
        still = []
        for stream in active:
            item = next(stream, None)
            if item is not None:
                still.append(stream)
                yield item
        active = still


def add_thumbnails(
    images: data.ImageList,
    clusters: list[Cluster],
    side: int,
    room: float,
    cap: int,
    seed: int,
    item_bytes: int | None,
    progress: Progress,
) -> int:
    """Fill near, random and thumbs until `room` bytes or `cap` images are used; returns how many were broken.

    item_bytes: what a shown image takes beside its thumbnail and its name, where its name is not in the page
    already; None where it is.
    """
    stream, made, broken, shown = candidates(clusters, seed), {}, set(), 0
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while block := list(islice(stream, BLOCK)):
            indexes = dict.fromkeys(int(c.members[position]) for c, position, _ in block)
            new = [i for i in indexes if i not in made and i not in broken]
            for i, thumb in zip(new, pool.map(lambda i: thumbnail(images, i, side), new)):
                broken.add(i) if thumb is None else made.update({i: thumb})
            progress.update(len(new))
            for cluster, position, is_random in block:
                i = int(cluster.members[position])
                if i in broken:
                    continue
                if position not in cluster.thumbs:
                    room -= len(made[i]) + 2
                    shown += 1
                    if item_bytes is not None:
                        room -= item_bytes + len(json.dumps(images.paths[i]))
                room -= len(str(position)) + 1
                if room < 0 or shown > cap:
                    return len(broken)
                cluster.thumbs[position] = made[i]
                (cluster.random if is_random else cluster.near).append(position)
    return len(broken)


# ---------------------------------------------------------------------------------------- the page


def write_gallery(
    images: data.ImageList,
    labels: np.ndarray,
    distances: np.ndarray | None,
    out: str | Path,
    *,
    num_clusters: int | None = None,
    thumb: int | None = None,
    max_mb: float = 20,
    seed: int = 31,
    name: str = "",
    log: Log | None = None,
) -> Path:
    """Write the gallery of an assignment to `out` and return its path.

    labels (N,) int64 in the order of the images; distances (N,) squared L2 to the centroid, or None: then
    "nearest" is "first" and there is no compactness. num_clusters counts the empty ones too (default: up to
    the largest label). thumb: longer side of the thumbnails in pixels, by default as large as fits. The file
    has at most max_mb * 10**6 bytes: what was left out is said on the page. About THUMBNAILS_PER_MB * max_mb
    images are decoded at most; those that cannot be are counted. Raises UserError where not even the numbers
    fit.
    """
    out = Path(out)
    if len(labels) != len(images) or (distances is not None and len(distances) != len(images)):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    clusters = measure_clusters(labels, distances, images.classes)
    num_clusters = max(num_clusters or 0, clusters[-1].id + 1 if clusters else 0)
    max_bytes = max_mb * 1e6
    side = thumb or choose_side(len(images), len(clusters), max_bytes)
    # The bytes of everything but thumbnails: first with all names, then, if those take too much, without.
    page = {
        "name": printable(name),
        "side": side,
        "mime": "image/webp",
        "base": None,
        "classes": images.class_names,
        "hasDistances": distances is not None,
        "notes": [],
        "clusters": [],
    }
    all_names = names_fit(images, max_bytes)
    frame = len(fill_template(page)) + 2000 + len(os.fsencode(images.root)) * 3  # room for notes and base
    frame += sum(len(encode(cluster_entry(c, images, distances, all_names))) + 1 for c in clusters)
    if frame > max_bytes:
        raise UserError(
            f"--max-mb {max_mb}: {len(clusters)} clusters take {frame / 1e6:.1f} MB without any picture; "
            "give more"
        )
    cap = max(1, int(THUMBNAILS_PER_MB * max_mb))
    progress = Progress(min(len(images), cap), "gallery", log=log)
    item_bytes = None if all_names else 20
    broken = add_thumbnails(images, clusters, side, max_bytes - frame, cap, seed, item_bytes, progress)
    progress.total = progress.done
    progress.close()
    page["base"] = base_address(images, clusters, out)
    page["notes"] = notes(images, clusters, num_clusters, broken, side, max_mb, all_names)
    page["clusters"] = [cluster_entry(c, images, distances, all_names) for c in clusters]
    with atomic_write(out, "wb") as file:
        file.write(fill_template(page))
    return out


def names_fit(images: data.ImageList, max_bytes: float) -> bool:
    """Whether the names of all images leave most of the page to the pictures."""
    room = NAMES_SHARE * max_bytes
    if len(images) * 16 > room:
        return False
    return sum(len(json.dumps(path)) + 12 for path in images.paths) <= room


def cluster_entry(
    cluster: Cluster, images: data.ImageList, distances: np.ndarray | None, all_names: bool
) -> dict[str, Any]:
    """A cluster as the page's script takes it: names, distances, classes and thumbs run in parallel.

    They hold every member, nearest first, or with all_names false only those with a thumbnail; near and
    random index into them.
    """
    positions = list(range(len(cluster.members))) if all_names else sorted(cluster.thumbs)
    place = positions if all_names else {position: i for i, position in enumerate(positions)}
    members = cluster.members[positions]
    return {
        "id": cluster.id,
        "size": len(cluster.members),
        "spread": short(cluster.spread),
        "purity": short(cluster.purity),
        "majority": cluster.majority,
        "names": [images.paths[i] for i in members],
        "distances": None if distances is None else [short(d) for d in distances[members].tolist()],
        "classes": None if images.classes is None else images.classes[members].tolist(),
        "thumbs": [cluster.thumbs.get(position, 0) for position in positions],
        "near": [place[position] for position in cluster.near],
        "random": [place[position] for position in cluster.random],
    }


def short(number: float | None) -> float | None:
    """A number with four digits; None where there is none (JSON has no NaN)."""
    return float(f"{number:.4g}") if number is not None and np.isfinite(number) else None


def notes(
    images: data.ImageList,
    clusters: list[Cluster],
    num_clusters: int,
    broken: int,
    side: int,
    max_mb: float,
    all_names: bool,
) -> list[str]:
    """What the page says about itself: how much there is, and what was left out."""
    n, shown = len(images), sum(len(c.thumbs) for c in clusters)
    empty = num_clusters - len(clusters)
    lines = [f"{count(n, 'image')} in {count(len(clusters), 'cluster')}."]
    if empty:
        lines.append(f"{count(empty, 'more cluster')} {'is' if empty == 1 else 'are'} empty.")
    if images.classes is not None and clusters:
        mean = sum(c.purity * len(c.members) for c in clusters) / n
        lines.append(f"Purity over all: {mean:.1%}.")
    if broken:
        lines.append(
            f"{count(broken, 'image')} could not be decoded and {'is' if broken == 1 else 'are'} skipped."
        )
    if shown + broken < n:
        bare = sum(not c.thumbs for c in clusters)
        lines.append(
            f"{shown:,} of them are shown, {side} px small, so that this page stays below {max_mb:g} MB: of "
            "each cluster the nearest to its centroid, and a random sample"
            + (f"; {count(bare, 'cluster')} went without" if bare else "")
            + (
                "; the search knows the names of all."
                if all_names
                else "; the search knows only their names."
            )
        )
    return lines


def count(n: int, what: str) -> str:
    """`1 image`, `4,000 images`."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def base_address(images: data.ImageList, clusters: Sequence[Cluster], out: Path) -> str | None:
    """The images' folder as seen from the page, for links to the originals; None if no file lies there."""
    shown = next((int(c.members[p]) for c in clusters for p in c.near[:1]), None)
    if shown is None or not images.path(shown).is_file():
        return None
    relative = os.path.relpath(images.root, out.parent)
    return "./" + quote(os.fsencode(relative)) + "/"


def encode(value: Any) -> bytes:
    """JSON that may stand inside <script>: ASCII, and no `<`, so that nothing in it ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode("ascii")


def fill_template(page: dict[str, Any]) -> bytes:
    """The whole page in UTF-8."""
    title = f"Clusters of {page['name']}" if page["name"] else "Clusters"
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    before = before.replace("{{title}}", html.escape(title))
    return before.encode() + encode(page) + after.encode()


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
