"""What lies below a folder besides images: told, left out or refused, never taken for images."""

import os

import pytest
from PIL import Image

import data
from data import decode, scan
from tests import small_run
from tests.data.pictures import array, pixels, touch_images
from tests.helpers import refuses
from training.folder import Folder
from visu import activ_retrieval, filters


def test_a_run_below_the_folder_is_no_source_of_images(finished, tmp_path):
    images = touch_images(tmp_path, "a/1.png", "b/2.png")
    before = data.list_images(images)
    (images / "exp").symlink_to(finished)
    found = data.list_images(images)
    assert found.digest() == before.digest() and found.class_names == ["a", "b"]
    assert found.notes == [
        "left out 1 folder(s) of runs of this repository, or of pictures that it drew: exp"
    ]


@pytest.mark.slow
def test_a_run_in_its_own_images_can_go_on(tmp_path):
    """The pages that a run writes into EXP must not become images of DIR."""
    photos = small_run.write_crops(tmp_path / "photos", pictures=3, each=8)
    exp = small_run.train(photos, photos / "exp")
    touch_images(exp, "report/gallery.png", "1.png")
    small_run.train(photos, exp, "--epochs", 3, "--resume")
    assert "left out 1 folder(s) of runs" in (exp / "train.log").read_text()


def test_the_mark_that_an_evaluation_leaves_is_known(photos, tmp_path):
    exp = tmp_path / "voc"
    folder = Folder(exp, "voc.pth.tar", keep=False)
    folder.open()
    folder.close()
    assert not scan.is_run(os.listdir(exp))
    folder.last.touch()
    assert scan.is_run(os.listdir(exp))


def test_exp_that_holds_images_of_the_set_is_refused_before_it_is_touched(tmp_path):
    images = touch_images(tmp_path / "photos", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    for exp in (images, images / "a"):
        before = sorted(images.rglob("*"))
        with refuses(r"--exp .*: holds images of DIR.*another folder"):
            small_run.train(images, exp)
        assert sorted(images.rglob("*")) == before
    (images / "empty").mkdir()
    small_run.train(images, images / "empty", "--epochs", 1)


def test_pictures_that_are_drawn_below_the_folder_are_no_images_of_it(finished, tmp_path):
    images = touch_images(tmp_path / "photos", "a/1.png", "b/2.png")
    model = str(finished / "checkpoint.pth.tar")
    filters.main(filters.get_parser().parse_args(["--model", model, "--exp", str(images / "new")]))
    assert (images / "new" / "filters.png").is_file()
    flags = ["--model", model, "--exp", str(images / "a"), "--data", str(images), "--count", "1"]
    activ_retrieval.main(
        activ_retrieval.get_parser().parse_args([*flags, "--image-size", "32", "--workers", "0"])
    )
    assert len(list((images / "a").rglob("*.png"))) > 2
    assert list(data.list_images(images).paths) == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize(
    "names, is_one",
    [
        (["config.json", "log.jsonl"], True),  # of versions without a lock too
        ([".checkpoint.pth.tar.lock", "checkpoint.pth.tar"], True),
        ([".voc.pth.tar.lock", "voc.jsonl", "voc.log"], True),
        ([".voc.pth.tar.lock", "1.jpg"], False),
        ([".drawn", "1.jpg"], True),
        (["config.json", "1.jpg"], False),
        (["alexnet.pth.tar", "1.jpg"], False),
    ],
)
def test_the_mark_of_a_run(tmp_path, names, is_one):
    touch_images(tmp_path, "other/0.png", "maybe/1.png")
    for name in names:
        (tmp_path / "maybe" / name).touch()
    assert scan.is_run(names) == is_one
    assert ("maybe/1.png" in list(data.list_images(tmp_path).paths)) == (not is_one)


def test_the_folder_of_a_run_itself_is_refused(finished):
    with refuses(r"is the folder of a run, not of images: .*another one as --exp"):
        data.list_images(finished)


@pytest.mark.parametrize("other", ["val", "valid", "test"])
def test_the_parent_of_train_and_val_is_refused_unless_asked_for(tmp_path, other):
    touch_images(tmp_path, "train/a/1.png", f"{other}/a/2.png", "extra/3.png")
    with refuses(rf"holds train/ and {other}/.*: give \S*/train, or .*--all-splits"):
        data.list_images(tmp_path)
    whole = data.list_images(tmp_path, all_splits=True)
    assert len(whole) == 3 and whole.class_names == ["extra", *sorted(["train", other])]
    assert len(data.list_images(tmp_path / "train")) == 1


def test_train_alone_or_beside_an_empty_val_is_an_ordinary_folder(tmp_path):
    touch_images(tmp_path, "train/1.png", "tram/2.png")
    (tmp_path / "val").mkdir()
    assert data.list_images(tmp_path).class_names == ["train", "tram"]


def test_all_splits_is_a_flag(tmp_path):
    touch_images(tmp_path, *(f"{split}/{i}.png" for split in ("train", "val") for i in range(10)))
    with refuses("--all-splits"):
        small_run.train(tmp_path, tmp_path / "exp")
    small_run.train(tmp_path, tmp_path / "exp", "--all-splits", "--epochs", 1)


@pytest.fixture
def unreadable(tmp_path, monkeypatch):
    """A folder of two images beside one that cannot be read and a link to itself; tests may run as root."""
    touch_images(tmp_path, "a/1.png", "b/2.png", "closed/3.png")
    (tmp_path / "loop").symlink_to("loop")
    listed = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(scan.os, "scandir", refuse)
    return tmp_path


def test_folders_that_cannot_be_read_are_named(unreadable):
    with refuses(r"2 folder\(s\) below .*closed: permission denied; loop: .*--skip-bad-images"):
        data.list_images(unreadable)
    with refuses(r"cannot read the folder .*closed: permission denied"):
        data.list_images(unreadable / "closed", skip_unread=True)


def test_folders_that_cannot_be_read_are_left_out_with_the_flag(unreadable):
    lines = []
    images = data.open_images(
        str(unreadable), bad_list=unreadable / "bad.txt", skip_bad=True, log=lines.append
    )
    assert list(images.paths) == ["a/1.png", "b/2.png"]
    assert len(lines) == 1 and "warning: left out, 2 folder(s)" in lines[0] and "closed" in lines[0]


def test_an_image_that_links_to_itself_is_a_broken_image(tmp_path):
    touch_images(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to("2.png")
    images = data.list_images(tmp_path)
    assert list(images.paths) == ["1.png", "2.png"]
    assert data.check_headers(images, 1) == [(1, "too many levels of symbolic links")]


def test_folders_of_systems_are_left_out_and_said_once(tmp_path):
    names = ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", ".thumbnails"]
    touch_images(tmp_path, "a/1.png", "b/2.png", *(f"a/{name}/1.png/small.png" for name in names))
    images = data.list_images(tmp_path)
    assert list(images.paths) == ["a/1.png", "b/2.png"]
    (note,) = images.notes
    assert note.startswith("left out 5 folder(s) of thumbnails, metadata or deleted files: ")
    assert all(f"a/{name}" in note for name in names[:5])


def test_other_files_are_counted_by_their_ending_in_one_line(tmp_path):
    touch_images(tmp_path, "a/1.png", "b/2.jpg")
    for name in ("a/1.HEIC", "b/2.heic", "b/3.heic", "a/x.CR2", "b/notes", ".hidden.dng"):
        (tmp_path / name).touch()
    assert data.list_images(tmp_path).notes == [
        "passed over 5 files by their ending: 3 .heic, 1 .cr2, 1 without one"
    ]
    for i in range(20):
        (tmp_path / f"x.e{i}").touch()
    assert data.list_images(tmp_path).notes[0].endswith("and 17 more")


def test_where_nothing_is_left_the_error_says_what_was_passed_over(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.heic").touch()
    with refuses(r"no image found in .*; passed over 3 files by their ending: 3 \.heic"):
        data.list_images(tmp_path)


@pytest.mark.parametrize("ending", ["mpo", "MPO", "jfif", "jif", "pjpeg", "jps"])
def test_all_endings_that_pillow_opens_are_taken(tmp_path, photo, monkeypatch, ending):
    path = tmp_path / f"x.{ending}"
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if ending.lower() == "mpo":
        photo.save(path, "MPO", save_all=True, append_images=[other])
    else:
        photo.save(path, "JPEG")
    images = data.list_images(tmp_path)
    assert list(images.paths) == [path.name] and data.check_headers(images, 1) == []
    with Image.open(path) as first:
        expected = pixels(first.convert("RGB"))
    for decoder in (decode.simplejpeg, None):
        monkeypatch.setattr(decode, "simplejpeg", decoder)
        assert (array(images.decode(0)) == expected).all()
