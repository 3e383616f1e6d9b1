"""Which images of each cluster a gallery shows, and their thumbnails, within the bytes that it may take."""

import base64
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image

import data
from data import ImageList
from util import Progress, derive_seed

# Sides of a thumbnail to choose from, and about how many bytes of the page one takes (photographs, WebP).
THUMB_BYTES = {160: 5500, 128: 3700, 96: 2300, 64: 1200}
PER_CLUSTER = 24  # the side is the largest at which so many images of each cluster fit
THUMBNAILS_PER_MB = 600  # a bound on the time: images may be small and many
WEBP = {"format": "WEBP", "quality": 70, "method": 2}
BLOCK = 256  # images are decoded so many at a time


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


@dataclass
class Room:
    """What is left of a page: bytes, and images that may be shown; names: whether a name comes with each."""

    bytes: float
    images: int
    names: bool

    def take(self, cluster: Cluster, position: int, thumb: str, path: str) -> bool:
        """Take the room of showing this image once more; False where it is not there."""
        if position not in cluster.thumbs:
            self.bytes -= len(thumb) + 2
            self.images -= 1
            if self.names:
                self.bytes -= 20 + len(json.dumps(path))
        self.bytes -= len(str(position)) + 1
        return self.bytes >= 0 and self.images >= 0


def thumbnail(images: ImageList, i: int, side: int) -> str | None:
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
    images: ImageList, clusters: list[Cluster], side: int, room: Room, seed: int, progress: Progress
) -> int:
    """Fill near, random and thumbs of the clusters until the room is used; returns how many were broken."""
    stream = candidates(clusters, seed)
    made: dict[int, str] = {}
    broken: set[int] = set()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while block := list(islice(stream, BLOCK)):
            indexes = dict.fromkeys(int(c.members[position]) for c, position, _ in block)
            new = [i for i in indexes if i not in made and i not in broken]
            for i, thumb in zip(new, pool.map(lambda i: thumbnail(images, i, side), new)):
                if thumb is None:
                    broken.add(i)
                else:
                    made[i] = thumb
            progress.update(len(new))
            for cluster, position, is_random in block:
                i = int(cluster.members[position])
                if i in broken:
                    continue
                if not room.take(cluster, position, made[i], images.paths[i]):
                    return len(broken)
                cluster.thumbs[position] = made[i]
                (cluster.random if is_random else cluster.near).append(position)
    return len(broken)
