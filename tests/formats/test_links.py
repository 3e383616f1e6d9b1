"""formats/links.py: names of links, and where they lead."""

import os

import numpy as np

import data
from formats.links import write_links


def test_links_of_one_name_and_of_long_names(tmp_path):
    long = "é" * 125 + ".jpg"  # 254 bytes
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("same.jpg", long):
            (tmp_path / folder / name).write_text(folder)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "far" / "away").mkdir(parents=True)
    images = data.ImageList(tmp_path, ["a/same.jpg", "b/same.jpg", f"a/{long}", f"b/{long}"])
    out = tmp_path / "link" / "out"  # relative links must count from where the folder really is
    labels, distances = np.array([3, 3, 3, 3]), np.array([4, 1, 2, 3], np.float32)
    write_links(images, labels, distances, out, 1000, relative=True)
    found = sorted((out / "003").iterdir())
    assert [path.read_text() for path in found] == ["b", "a", "b", "a"]
    assert [path.name[:4] for path in found] == ["0_sa", "1_éé", "2_éé", "3_sa"]
    assert all(len(os.fsencode(path.name)) <= 255 and path.suffix == ".jpg" for path in found)
