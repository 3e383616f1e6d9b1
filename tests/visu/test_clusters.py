"""The gallery's script: runs, CSV files, folders, lists and shards; mistakes."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoint
from tests.helpers import ROOT, refuses
from tests.visu.test_gallery import make_folder, page_of
from tools import make_shards
from training import logs
from util import UserError
from visu import clusters


def arguments(**changes):
    defaults = {
        "exp": None,
        "csv": None,
        "data": None,
        "shards": None,
        "out": None,
        "thumb": None,
        "max_mb": 20,
        "seed": 31,
    }
    return SimpleNamespace(**defaults | changes)


def make_run(tmp_path, names=("u/0.png", "u/1.png", "v/2.png")):
    images, exp = make_folder(tmp_path / "images", list(names)), tmp_path / "exp"
    exp.mkdir()
    labels, distances = np.arange(len(names)) % 2, np.linspace(0.9, 0.1, len(names))
    logs.write_assignments(exp / "assignments.csv", list(names), (labels, distances))
    (exp / "config.json").write_text(json.dumps({"args": {"dir": str(tmp_path / "images"), "shards": None}}))
    logs.append_line(exp / "log.jsonl", {"epoch": 0, "clusters": {"number": 7}})
    logs.append_line(exp / "log.jsonl", {"epoch": 1, "clusters": {"number": 5}})
    return exp, images


def test_gallery_of_a_run_and_of_its_csv_file_are_the_same(tmp_path):
    exp, images = make_run(tmp_path)
    of_run = page_of(clusters.main(arguments(exp=str(exp))))
    assert (exp / "clusters.html").is_file()
    assert of_run["clusters"][0]["names"] == ["v/2.png", "u/0.png"]
    assert "3 more clusters are empty" in " ".join(of_run["notes"])  # k is 5
    csv = tmp_path / "bare.csv"
    lines = (exp / "assignments.csv").read_text().splitlines()[1:]  # no header
    csv.write_text("\n".join(lines))
    of_csv = page_of(clusters.main(arguments(csv=str(csv), data=str(images.root))))
    assert (tmp_path / "bare.html").is_file() and of_csv["clusters"] == of_run["clusters"]


def test_text_file_of_paths_may_name_the_images_in_another_order(tmp_path):
    exp, images = make_run(tmp_path)
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{images.path(i)}\n" for i in (2, 0, 1)))
    of_list = page_of(clusters.main(arguments(exp=str(exp), data=str(listing))))
    of_folder = page_of(clusters.main(arguments(exp=str(exp))))
    assert of_list["clusters"] == of_folder["clusters"]


def test_a_run_on_shards_is_shown_from_them_whatever_their_name(tmp_path):
    exp, images = make_run(tmp_path)
    shards = [str(images.root), str(tmp_path / "s-%02d.tar")]
    make_shards.main(make_shards.get_parser().parse_args(shards))
    of_folder = page_of(clusters.main(arguments(exp=str(exp))))
    pattern = str(tmp_path / "s-*")
    assert (
        page_of(clusters.main(arguments(exp=str(exp), shards=pattern)))["clusters"] == of_folder["clusters"]
    )
    (exp / "config.json").write_text(json.dumps({"args": {"dir": None, "shards": pattern}}))
    page = page_of(clusters.main(arguments(exp=str(exp))))
    assert page["clusters"] == of_folder["clusters"] and page["base"] is None


def test_number_of_clusters_is_that_of_the_clustering_not_of_the_last_log_line(tmp_path):
    exp, _ = make_run(tmp_path)
    checkpoint.save(exp / checkpoint.CLUSTERING, {"assignment": {"num_clusters": 3}})
    assert "1 more cluster is empty" in " ".join(page_of(clusters.main(arguments(exp=str(exp))))["notes"])


@pytest.mark.parametrize("name", ["kmeans", "pic"])
def test_runs_of_the_first_version_have_their_gallery(tmp_path, name):
    exp = ROOT / "tests" / "files" / "v1" / name
    paths, _, _ = clusters.read_assignments(exp / "assignments.csv")
    make_folder(tmp_path, paths)
    out = clusters.main(arguments(exp=str(exp), data=str(tmp_path), out=str(tmp_path / "g.html")))
    assert sum(cluster["size"] for cluster in page_of(out)["clusters"]) == len(paths)


def test_gallery_of_a_real_run(finished, photos, tmp_path):
    page = page_of(clusters.main(arguments(exp=str(finished), out=str(tmp_path / "g.html"))))
    assert page["name"] == "exp" and sum(cluster["size"] for cluster in page["clusters"]) == 60
    assert all(all(cluster["thumbs"]) for cluster in page["clusters"])
    assert len(page["classes"]) == 6 and page["hasDistances"]


def test_of_several_heads_the_first_is_shown(tmp_path):
    (tmp_path / "a.csv").write_text(
        "path,cluster,distance,cluster1,distance1\nx.png,4,0.5,9,0.1\ny.png,0,1,8,2\n"
    )
    paths, labels, distances = clusters.read_assignments(tmp_path / "a.csv")
    assert (paths, labels.tolist(), distances.tolist()) == (["x.png", "y.png"], [4, 0], [0.5, 1.0])
    (tmp_path / "b.csv").write_text("path,cluster,cluster1\nx.png,4,9\n")
    paths, labels, distances = clusters.read_assignments(tmp_path / "b.csv")
    assert (labels.tolist(), distances) == ([4], None)


def test_csv_of_two_columns_and_names_with_line_breaks(tmp_path):
    names = ["line\nbreak.png", 'q"uote,.png', "写真.png"]
    logs.write_assignments(tmp_path / "three.csv", names, (np.array([2, 0, 1]), np.array([0.25, 0.5, 1])))
    paths, labels, distances = clusters.read_assignments(tmp_path / "three.csv")
    assert paths == names and labels.tolist() == [2, 0, 1] and distances.tolist() == [0.25, 0.5, 1]
    (tmp_path / "two.csv").write_bytes(b"path,cluster\r\ncaf\xe9.png,7\r\n")
    paths, labels, distances = clusters.read_assignments(tmp_path / "two.csv")
    assert (os.fsencode(paths[0]), labels.tolist(), distances) == (b"caf\xe9.png", [7], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line"),
        ("path,cluster\n", "no line"),
        ("path,cluster\na.png,1\nb.png\n", "line 3: expected path,cluster"),
        ("a.png,1,0.5\nb.png,2,x\n", "line 2: expected path,cluster,distance"),
        ("a.png,-1\n", "line 1"),
        ("a.png,1\nb.png,1e3\n", "line 2"),
    ],
)
def test_bad_csv_files_are_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        clusters.read_assignments(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "either --exp"),
        ("--exp a --csv b", "either --exp"),
        ("--csv b", "--data"),
        ("--csv b --data c --shards d", "--data and --shards"),
        ("--csv b.html --data c --out b.html", "--out b.html"),
        ("--exp a --thumb 4", "--thumb: 4"),
        ("--exp a --thumb 4000", "--thumb 4000"),
        ("--exp a --max-mb nan", "--max-mb"),
        ("--exp a --seed -1", "--seed: -1"),
        ("--exp nowhere", "config.json is missing"),
        ("--csv nowhere.csv --data .", "cannot read nowhere.csv"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message):
    with refuses(message):
        clusters.main(clusters.get_parser().parse_args(flags.split()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"args": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "not the settings of a run"),
        (b'{"args": [1]}', "not the settings of a run .args"),
        (b'{"args": {"dir": 5, "shards": null}}', "does not say where"),
        (b"{}", "does not say where"),
    ],
    ids=range(7),
)
def test_settings_of_another_shape_are_refused_in_one_line(tmp_path, config, message):
    exp, _ = make_run(tmp_path)
    (exp / "config.json").write_bytes(config)
    with refuses(message):
        clusters.main(arguments(exp=str(exp)))


def test_images_that_lie_elsewhere_are_told(tmp_path):
    exp, _ = make_run(tmp_path)
    with pytest.raises(UserError, match="say where with --data"):
        clusters.main(arguments(exp=str(exp), data=str(exp)))
    (tmp_path / "images" / "u" / "1.png").unlink()
    listing = tmp_path / "list.txt"
    listing.write_text("images/u/0.png\nimages/v/2.png\n")
    with pytest.raises(UserError, match="1 images are not there"):
        clusters.main(arguments(exp=str(exp), data=str(listing)))
