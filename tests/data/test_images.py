"""Lists of images: folders, text files, classes, digests."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

import data
from tests.data.pictures import touch_images
from tests.helpers import refuses


def test_order_and_classes_are_those_of_imagefolder(tmp_path):
    names = [
        "b/z.png",
        "b/a.png",
        "a b/1.png",
        "a/2.png",
        "a/x/0.png",
        "a/x y/0.png",
        "a/x/y/0.png",
        "B/q.png",
    ]
    touch_images(tmp_path, *names, "a-b/10.png", "a-b/9.png")
    reference = datasets.ImageFolder(tmp_path)
    images = data.list_images(tmp_path)
    assert [str(images.path(i)) for i in range(len(images))] == [path for path, _ in reference.samples]
    assert images.classes.tolist() == [label for _, label in reference.samples]
    assert images.classes.dtype == np.int64
    assert images.class_names == reference.classes


@pytest.mark.parametrize(
    "names, expected",
    [
        (["b.png", "a.png"], ["a.png", "b.png"]),  # flat
        (["one/b.png", "one/a/c.png"], ["one/b.png", "one/a/c.png"]),  # a single sub-folder
        (["top.png", "a/1.png", "b/2.png"], ["top.png", "a/1.png", "b/2.png"]),  # an image beside sub-folders
    ],
)
def test_folder_without_classes(tmp_path, names, expected):
    images = data.list_images(str(touch_images(tmp_path, *names)))
    assert list(images.paths) == expected
    assert images.classes is None and images.class_names is None


def test_sub_folders_without_images_are_no_classes(tmp_path):
    touch_images(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("nothing")
    assert data.list_images(tmp_path).classes is None


def test_endings_in_any_case_count_and_hidden_and_other_files_do_not(tmp_path):
    touch_images(
        tmp_path, "A.PNG", "b.JpEg", "c.webp", ".hidden.png", ".git/x.png", "d.txt", "e.pdf", "f.eps"
    )
    os.mkdir(tmp_path / "folder.png")
    assert list(data.list_images(tmp_path).paths) == ["A.PNG", "b.JpEg", "c.webp"]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    touch_images(tmp_path, "elsewhere/1.png", "root/a/2.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    images = data.list_images(tmp_path / "root")
    assert list(images.paths) == ["a/2.png", "b/1.png"]
    assert images.class_names == ["a", "b"]


def test_text_file_keeps_its_order_and_finds_classes(tmp_path):
    touch_images(tmp_path, "set/dog/2.png", "set/cat/1.png", "set/cat/no_ending")
    source = tmp_path / "list.txt"
    absolute = tmp_path / "set" / "cat" / "1.png"
    source.write_text(f"# a comment\n\nset/dog/2.png\r\n{absolute}\n  ./set/cat/no_ending\nset/dog/2.png\n")
    images = data.list_images(source)
    assert list(images.paths) == ["dog/2.png", "cat/1.png", "cat/no_ending", "dog/2.png"]
    assert images.root == tmp_path / "set"
    assert images.path(1) == absolute
    assert images.class_names == ["cat", "dog"]
    assert images.classes.tolist() == [1, 0, 0, 1]


def test_text_file_of_one_folder_has_no_classes(tmp_path):
    touch_images(tmp_path, "a/2.png", "a/1.png")
    (tmp_path / "list.txt").write_text("a/2.png\na/1.png")
    images = data.list_images(tmp_path / "list.txt")
    assert list(images.paths) == ["2.png", "1.png"]
    assert images.classes is None


def test_missing_or_empty_sources_are_refused_in_plain_words(tmp_path):
    with refuses(r"nowhere does not exist \(expected a folder of images or a text file"):
        data.list_images(tmp_path / "nowhere")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with refuses(r"no image found in .*empty.*\.jpg, \.png"):
        data.list_images(tmp_path / "empty")
    (tmp_path / "list.txt").write_text("# only a comment\n")
    with refuses(r"list\.txt names no image"):
        data.list_images(tmp_path / "list.txt")
    touch_images(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text("a.png\n\ngone/x.png\na.png\ngone/y.png\n")
    with refuses(r"names 2 file\(s\) that do not exist, the first is gone/x.png \(line 3\)"):
        data.list_images(tmp_path / "list.txt")
    with refuses(r"a.png is neither a folder nor a text file"):
        data.list_images(tmp_path / "a.png")


def test_keep_selects_paths_and_classes(tmp_path):
    images = data.list_images(touch_images(tmp_path, "a/1.png", "b/1.png", "b/2.png"))
    kept = images.keep(np.array([False, False, True]))
    assert list(kept.paths) == ["b/2.png"]
    assert kept.classes.tolist() == [1] and kept.class_names == ["a", "b"]
    assert kept.path(0) == tmp_path / "b" / "2.png"
    flat = data.ImageList(tmp_path, ["x", "y"]).keep([True, False])
    assert list(flat.paths) == ["x"] and flat.classes is None


def test_digest_follows_names_and_order_but_not_the_place():
    lists = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""]]
    digests = {data.ImageList(Path("/x"), paths).digest() for paths in lists}
    assert len(digests) == len(lists)
    assert data.ImageList(Path("/elsewhere"), ["ab", "c"]).digest() in digests


def test_packed_paths_are_a_small_sequence_of_strings():
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20000)]
    paths = data.PackedPaths(names)
    assert list(paths) == names and paths[-1] == names[-1] and paths[np.int64(7)] == names[7]
    assert paths[3:9:2] == names[3:9:2]
    with pytest.raises(IndexError):
        paths[20000]
    assert len(pickle.dumps(paths)) < sum(map(len, names)) + 9 * len(names)
    undecodable = os.fsdecode(b"caf\xe9.png")
    assert data.PackedPaths(["é.png", "", undecodable])[0:3] == ["é.png", "", undecodable]


def test_stamps_tell_files_that_change(tmp_path):
    images = data.list_images(touch_images(tmp_path, "a.png", "b.png", "c.png"))
    before = images.stamps()
    assert before[:, 0].tolist() == [images.path(i).stat().st_size for i in range(3)]
    images.path(1).write_bytes(b"shorter")
    images.path(2).unlink()
    changed = (images.stamps() != before).any(axis=1)
    assert changed.tolist() == [False, True, True] and images.stamps()[2].tolist() == [-1, -1, -1]
