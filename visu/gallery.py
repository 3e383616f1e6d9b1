"""The gallery of an assignment: one HTML page that needs nothing but itself.

The page holds thumbnails, file names and numbers as JSON; gallery.html, its template, and gallery.js draw
them. Below 20 MB by sampling: of each cluster the images nearest to the centroid and a random sample.
"""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data import ImageList
from util import Log, Progress, UserError, atomic_write
from visu import thumbnails
from visu.pages import fill, printable
from visu.thumbnails import Cluster, Room, add_thumbnails, choose_side

TEMPLATE = Path(__file__).with_name("gallery.html")
SCRIPT = Path(__file__).with_name("gallery.js")
NAMES_SHARE = 0.3  # the names of all images are in the page if they take at most this share of it


def write_gallery(
    images: ImageList,
    labels: np.ndarray,
    distances: np.ndarray | None,
    out: str | Path,
    *,
    num_clusters: int | None = None,
    fine: int | None = None,
    thumb: int | None = None,
    max_mb: float = 20,
    seed: int = 31,
    name: str = "",
    log: Log | None = None,
) -> Path:
    """Write the gallery of an assignment to `out` and return its path.

    labels (N,) int64 in the order of the images; distances (N,) squared L2 to the centroid, or None: then
    "nearest" is "first" and there is no compactness. num_clusters counts the empty ones too (default: up to
    the largest label). fine: clusters in a super-cluster, by which the page then orders them. thumb: longer
    side of the thumbnails in pixels, by default as large as fits. The file has at most max_mb * 10**6 bytes:
    what was left out is said on the page. About THUMBNAILS_PER_MB * max_mb images are decoded at most; those
    that cannot be are counted. Raises UserError where not even the numbers fit.
    """
    if len(labels) != len(images) or (distances is not None and len(distances) != len(images)):
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    clusters = measure_clusters(labels, distances, images.classes)
    num_clusters = max(num_clusters or 0, clusters[-1].id + 1 if clusters else 0)
    side = thumb or choose_side(len(images), len(clusters), max_mb * 1e6)
    page = empty_page(name, side, images.class_names, distances is not None) | {"fine": fine}
    all_names = names_fit(images, max_mb * 1e6)
    room = room_for_pictures(page, clusters, images, distances, all_names, max_mb)
    broken = fill_clusters(images, clusters, side, room, seed, log)
    page["base"] = base_address(images, clusters, Path(out))
    page["notes"] = notes(images, clusters, num_clusters, broken, side, max_mb, all_names)
    page["clusters"] = [cluster_entry(c, images, distances, all_names) for c in clusters]
    with atomic_write(out, "wb") as file:
        file.write(fill_template(page))
    return Path(out)


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


def fill_clusters(
    images: ImageList, clusters: list[Cluster], side: int, room: Room, seed: int, log: Log | None
) -> int:
    """Choose the images to show and make their thumbnails; returns how many could not be decoded."""
    progress = Progress(min(len(images), room.images), "gallery", log=log)
    broken = add_thumbnails(images, clusters, side, room, seed, progress)
    progress.total = progress.done
    progress.close()
    return broken


# ---------------------------------------------------------------------------------------- the page


def empty_page(name: str, side: int, classes: list[str] | None, has_distances: bool) -> dict[str, Any]:
    """What the page's script takes, without clusters."""
    return {
        "name": printable(name),
        "side": side,
        "mime": "image/webp",
        "base": None,
        "classes": classes,
        "hasDistances": has_distances,
        "notes": [],
        "clusters": [],
    }


def room_for_pictures(
    page: dict[str, Any],
    clusters: list[Cluster],
    images: ImageList,
    distances: np.ndarray | None,
    all_names: bool,
    max_mb: float,
) -> Room:
    """What everything but the thumbnails leaves of the page; UserError where that is less than nothing."""
    frame = len(fill_template(page)) + 2000 + len(os.fsencode(images.root)) * 3  # room for notes and base
    frame += sum(len(encode(cluster_entry(c, images, distances, all_names))) + 1 for c in clusters)
    if frame > max_mb * 1e6:
        raise UserError(
            f"--max-mb {max_mb:g}: {len(clusters)} clusters take {frame / 1e6:.1f} MB without any picture; "
            "give more"
        )
    cap = max(1, int(thumbnails.THUMBNAILS_PER_MB * max_mb))
    return Room(max_mb * 1e6 - frame, cap, names=not all_names)


def names_fit(images: ImageList, max_bytes: float) -> bool:
    """Whether the names of all images leave most of the page to the pictures."""
    room = NAMES_SHARE * max_bytes
    if len(images) * 16 > room:
        return False
    return sum(len(json.dumps(path)) + 12 for path in images.paths) <= room


def cluster_entry(
    cluster: Cluster, images: ImageList, distances: np.ndarray | None, all_names: bool
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
    images: ImageList,
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


def base_address(images: ImageList, clusters: Sequence[Cluster], out: Path) -> str | None:
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
    parts = {
        "title": html.escape(title),
        "data": encode(page).decode("ascii"),
        "script": SCRIPT.read_text(encoding="utf-8"),
    }
    return fill(TEMPLATE, parts).encode()
