"""The gallery's page: numbers, order, thumbnails, budget, awkward names."""

import base64
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from PIL import Image

import data
from util import UserError
from visu import gallery, thumbnails

# Names that break pages, CSV files and URLs; the last is no UTF-8. "</script>" is a folder "<" with a file.
ODD_NAMES = [
    "a<b>&amp;.png",
    "quote\"'`.png",
    "</script><script>alert(1)/x.png",
    "line\nbreak.png",
    "größe 100%#?.png",
    "写真.png",
    os.fsdecode(b"caf\xe9.png"),
    "a,b;c.png",
]


class Scripts(HTMLParser):
    """The text of every <script>, by id."""

    def __init__(self, page):
        super().__init__()
        self.found, self.current = [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.found.append([dict(attrs).get("id"), ""])
            self.current = tag

    def handle_data(self, text):
        if self.current:
            self.found[-1][1] += text

    def handle_endtag(self, tag):
        self.current = None if tag == "script" else self.current


def page_of(path):
    """What the page's script gets to see."""
    scripts = Scripts(path.read_bytes().decode("utf-8")).found
    assert [name for name, _ in scripts] == ["data", None]
    return json.loads(scripts[0][1])


def colour(i):
    return (i * 37 % 256, i * 91 % 256, i * 151 % 256)


def make_folder(root, names, side=(24, 12)):
    """An image of colour(i) for each name."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", side, colour(i)).save(os.fsencode(root / name), format="png")
    return data.ImageList(root, names, *data.classes_of(names))


def pixels(page, thumb):
    return Image.open(io.BytesIO(base64.b64decode(thumb))).convert("RGB")


class Noise(data.ImageList):
    """Images that exist nowhere and compress badly; counts how many were decoded."""

    def __init__(self, names, side=64):
        super().__init__(Path("nowhere"), names, *data.classes_of(names))
        self.side, self.decoded = side, 0

    def decode(self, i):
        self.decoded += 1
        rng = np.random.default_rng(i)
        return torch.from_numpy(rng.integers(0, 256, (3, self.side, self.side), dtype=np.uint8))


# ---------------------------------------------------------------------------------------- numbers and order


def test_sizes_order_spread_and_purity_by_hand(tmp_path):
    names = ["cat/0.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png", "dog/5.png"]
    images = make_folder(tmp_path / "images", names)
    labels = np.array([4, 4, 1, 4, 1, 4])
    distances = np.array([0.5, 0.1, 0.3, 0.9, 0.2, 0.7], np.float32)
    page = page_of(gallery.write_gallery(images, labels, distances, tmp_path / "g.html", num_clusters=7))
    first, second = page["clusters"]
    assert (first["id"], first["size"], second["id"], second["size"]) == (1, 2, 4, 4)
    assert first["names"] == ["dog/4.png", "cat/2.png"]
    assert second["names"] == ["cat/1.png", "cat/0.png", "dog/5.png", "dog/3.png"]  # nearest first
    assert second["distances"] == [0.1, 0.5, 0.7, 0.9]
    assert second["spread"] == pytest.approx((0.1 + 0.5 + 0.7 + 0.9) / 4)
    assert first["purity"] == second["purity"] == 0.5
    assert page["classes"][first["majority"]] == "cat"  # of equal ones the first
    assert second["classes"] == [0, 0, 1, 1]
    assert second["near"] == [0, 1, 2, 3] and sorted(second["random"]) == [0, 1, 2, 3]
    notes = " ".join(page["notes"])
    assert "6 images in 2 clusters" in notes and "5 more clusters are empty" in notes and "50.0%" in notes


def test_thumbnails_show_the_right_images_in_the_right_size(tmp_path):
    images = make_folder(tmp_path / "images", [f"{i}.png" for i in range(9)], side=(96, 48))
    labels = np.array([0, 1, 2] * 3)
    page = page_of(gallery.write_gallery(images, labels, np.arange(9.0)[::-1], tmp_path / "g.html", thumb=32))
    for cluster in page["clusters"]:
        assert len(cluster["thumbs"]) == 3
        for name, thumb in zip(cluster["names"], cluster["thumbs"]):
            picture = pixels(page, thumb)
            assert picture.size == (32, 16)
            expected = colour(int(name.removesuffix(".png")))
            assert np.abs(np.subtract(picture.getpixel((16, 8)), expected)).max() <= 12
    assert page["clusters"][1]["names"] == ["7.png", "4.png", "1.png"]


def test_random_images_are_a_sample_fixed_by_the_seed(tmp_path):
    images, labels = Noise([f"{i}.jpg" for i in range(2000)]), np.zeros(2000, np.int64)
    distances = np.arange(2000.0)

    def random(seed):
        gallery.write_gallery(images, labels, distances, tmp_path / "g.html", max_mb=1, seed=seed)
        (cluster,) = page_of(tmp_path / "g.html")["clusters"]
        assert cluster["near"] == list(range(len(cluster["near"])))  # without a gap from the nearest on
        return cluster["random"]

    sample = random(1)
    assert sample == random(1) != random(2)
    assert len(set(sample)) == len(sample) > 30
    assert 700 < np.mean(sample) < 1300  # of the whole cluster, not of its near half


def test_without_distances_the_order_of_the_images_stands(tmp_path):
    images = make_folder(tmp_path / "images", ["b.png", "a.png", "c.png"])
    page = page_of(gallery.write_gallery(images, np.array([0, 0, 0]), None, tmp_path / "g.html"))
    (cluster,) = page["clusters"]
    assert cluster["names"] == ["b.png", "a.png", "c.png"]
    assert cluster["spread"] is None and cluster["distances"] is None and not page["hasDistances"]
    assert page["classes"] is None and cluster["purity"] is None


# ---------------------------------------------------------------------------------------- size


def test_page_of_ten_thousand_images_keeps_its_budget(tmp_path):
    n, k = 10_000, 150
    images = Noise([f"class{i % 10}/picture {i:05d}.jpg" for i in range(n)])
    rng = np.random.default_rng(0)
    labels = rng.integers(0, k, n)
    out = gallery.write_gallery(images, labels, rng.random(n), tmp_path / "g.html", max_mb=5)
    assert 4.5e6 < out.stat().st_size <= 5e6  # used, and not exceeded
    page = page_of(out)
    assert sorted(name for c in page["clusters"] for name in c["names"]) == sorted(images.paths)
    shown = [sum(map(bool, c["thumbs"])) for c in page["clusters"]]
    assert min(shown) >= max(shown) - 2 > 1  # shared evenly
    assert all(c["thumbs"][0] for c in page["clusters"])  # the nearest of every cluster
    assert images.decoded < sum(shown) + 2 * thumbnails.BLOCK
    assert f"{sum(shown):,} of them are shown" in " ".join(page["notes"])


def test_names_of_a_large_run_are_left_out_when_they_do_not_fit(tmp_path):
    n = 20_000
    images = Noise([f"n{i % 100:08d}/n{i % 100:08d}_{i:06d}.JPEG" for i in range(n)])
    out = gallery.write_gallery(
        images, np.arange(n) % 500, np.arange(n) / n, tmp_path / "g.html", max_mb=2, thumb=24
    )
    assert out.stat().st_size <= 2e6
    page = page_of(out)
    assert len(page["clusters"]) == 500 and all(c["size"] == 40 for c in page["clusters"])
    assert all(all(c["thumbs"]) for c in page["clusters"])  # names of shown images only
    for c in page["clusters"]:
        assert c["names"][c["near"][0]].endswith(f"_{c['id']:06d}.JPEG")  # still the nearest first
        assert c["distances"] == sorted(c["distances"])
    assert "only their names" in " ".join(page["notes"])


def test_no_more_than_so_many_images_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "THUMBNAILS_PER_MB", 6)
    images = Noise([f"{i}.jpg" for i in range(5000)], side=8)
    page = page_of(
        gallery.write_gallery(images, np.arange(5000) % 7, np.zeros(5000), tmp_path / "g.html", max_mb=50)
    )
    assert sum(bool(t) for c in page["clusters"] for t in c["thumbs"]) == 300
    assert images.decoded < 300 + thumbnails.BLOCK


def test_more_clusters_than_thumbnails(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "THUMBNAILS_PER_MB", 5)
    images = Noise([f"{i}.jpg" for i in range(600)], side=8)
    page = page_of(gallery.write_gallery(images, np.arange(600) % 400, np.zeros(600), tmp_path / "g.html"))
    assert len(page["clusters"]) == 400
    with_picture = [c["id"] for c in page["clusters"] if any(c["thumbs"])]
    assert len(with_picture) == 100 and max(with_picture) < 200  # the largest clusters: those of two images
    assert "300 clusters went without" in " ".join(page["notes"])


def test_too_small_a_budget_is_refused_and_leaves_the_old_page(tmp_path):
    (tmp_path / "g.html").write_text("old")
    images = Noise([f"{i}.jpg" for i in range(50)])
    with pytest.raises(UserError, match="give more"):
        gallery.write_gallery(images, np.arange(50), None, tmp_path / "g.html", max_mb=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["g.html"] and (tmp_path / "g.html").read_text() == "old"


@pytest.mark.parametrize(("n", "k", "side"), [(4000, 100, 160), (10**6, 300, 96), (10**6, 10_000, 64)])
def test_default_side_shrinks_with_the_number_of_clusters(n, k, side):
    assert thumbnails.choose_side(n, k, 20e6) == side


# ---------------------------------------------------------------------------------------- awkward input


def test_odd_file_names_survive_and_break_nothing(tmp_path):
    root = tmp_path / 'im"ages <1>'
    images = make_folder(root, ODD_NAMES)
    out = gallery.write_gallery(
        images, np.zeros(len(ODD_NAMES), np.int64), np.arange(8.0), tmp_path / "g.html", name="<b>run"
    )
    page = page_of(out)  # asserts that there are exactly two scripts
    assert page["clusters"][0]["names"] == ODD_NAMES
    text = out.read_bytes().decode("utf-8")  # and that the page is UTF-8
    assert "<b>" not in text and "&lt;b&gt;run" in text
    assert "</script><script>alert" not in text


def test_links_lead_to_the_originals(tmp_path):
    root = tmp_path / "a b%20#" / "images"
    images = make_folder(root, ["x/1.png", "y/2.png"])
    (tmp_path / "exp").mkdir()
    out = gallery.write_gallery(images, np.array([0, 0]), None, tmp_path / "exp" / "g.html")
    base = page_of(out)["base"]
    assert base.startswith("./") and "#" not in base and " " not in base
    assert os.path.samefile(os.path.join(os.fsencode(out.parent), unquote_to_bytes(base)), root)
    page = page_of(gallery.write_gallery(Noise(["a.jpg"]), np.array([0]), None, tmp_path / "h.html"))
    assert page["base"] is None  # no files (shards, say): no links


def test_undecodable_images_are_skipped_and_counted(tmp_path):
    images = make_folder(tmp_path / "images", [f"{i}.png" for i in range(5)])
    images.path(0).write_bytes(b"no image")
    images.path(3).unlink()
    page = page_of(
        gallery.write_gallery(images, np.array([0, 0, 0, 1, 1]), np.arange(5.0), tmp_path / "g.html")
    )
    first, second = page["clusters"]
    assert (first["size"], first["near"], second["near"]) == (3, [1, 2], [1])
    assert first["thumbs"][0] == 0 and 0 not in first["random"]
    assert "2 images could not be decoded" in " ".join(page["notes"])


def test_nothing_decodable_and_a_single_image(tmp_path):
    images = make_folder(tmp_path / "images", ["only.png"])
    page = page_of(gallery.write_gallery(images, np.array([3]), np.array([0.0]), tmp_path / "g.html"))
    assert page["clusters"][0]["near"] == [0] and page["clusters"][0]["id"] == 3
    assert "1 image in 1 cluster." in page["notes"][0] and "3 more clusters are empty." in page["notes"][1]
    images.path(0).write_bytes(b"")
    page = page_of(gallery.write_gallery(images, np.array([0]), np.array([np.nan]), tmp_path / "g.html"))
    assert page["clusters"][0]["near"] == [] and page["clusters"][0]["distances"] == [None]
