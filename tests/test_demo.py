"""The demo's image folder: train and val share no pixel, same bytes every time, complete or made again."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
import util
from tests.helpers import refuses


def make(folder: Path, train: int = 4, val: int = 2, seed: int = 31) -> None:
    demo.main(
        demo.get_parser().parse_args([str(folder), f"--train={train}", f"--val={val}", f"--seed={seed}"])
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in demo.files_below(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "images"
    make(path)
    return path


def test_every_picture_gives_its_crops_to_both_splits(folder):
    names = {path.stem for path in demo.PICTURES.glob("*.jpg")}
    counts = Counter(name.rsplit("/", 1)[0] for name in demo.files_below(folder) if name.endswith(".jpg"))
    assert counts == {f"train/{name}": 4 for name in names} | {f"val/{name}": 2 for name in names}


def test_default_counts_are_4000_and_1000():
    args = demo.get_parser().parse_args(["x"])
    pictures = len(list(demo.PICTURES.glob("*.jpg")))
    assert (pictures * args.train, pictures * args.val) == (4000, 1000)


def test_crops_are_square_images_of_64_to_96_pixels(folder):
    sizes = set()
    for path in folder.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            sizes.add(image.size)
    assert all(width == height and 64 <= width <= 96 for width, height in sizes)
    assert len(sizes) > 5


def test_second_run_gives_the_same_bytes(folder, tmp_path):
    make(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_another_seed_gives_other_crops(folder, tmp_path):
    make(tmp_path / "other", seed=32)
    before, after = contents(folder), contents(tmp_path / "other")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize("split, allowed", [("train", range(150)), ("val", range(150, 200))])
def test_boxes_fill_their_part_of_the_picture_and_never_leave_it(split, allowed):
    width, height = 200, 160
    seen, sides = set(), set()
    for i in range(500):
        left, top, right, bottom = demo.draw_box(
            (width, height), demo.regions(width)[split], np.random.default_rng(i)
        )
        assert right - left == bottom - top and 0 <= top < bottom <= height
        seen |= set(range(left, right))
        sides.add(right - left)
    assert seen == set(allowed)
    assert min(sides) == 32 and max(sides) == min(72, len(allowed))  # 20 and 45 % of 160, if there is room


@pytest.mark.parametrize("split, forbidden", [("train", slice(150, 200)), ("val", slice(0, 150))])
def test_no_pixel_of_the_other_split_changes_a_crop(split, forbidden):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (160, 200), dtype=np.uint8)
    changed = pixels.copy()
    changed[:, forbidden] = 255 - changed[:, forbidden]
    columns = demo.regions(200)[split]
    for seed in range(50):
        one = demo.cut_crop(Image.fromarray(pixels), columns, seed)
        two = demo.cut_crop(Image.fromarray(changed), columns, seed)
        assert np.array_equal(np.asarray(one), np.asarray(two))


def test_half_of_the_crops_are_mirrored():
    ramp = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8), (160, 200)).copy())
    crops = [np.asarray(demo.cut_crop(ramp, (0, 150), seed), dtype=int) for seed in range(200)]
    mirrored = sum(crop[0, 0] > crop[0, -1] for crop in crops)
    assert 70 <= mirrored <= 130


def test_flat_squares_are_drawn_again():
    """A picture that is plain but for one textured corner gives crops that touch the texture."""
    pixels = np.full((160, 200), 90, dtype=np.uint8)
    pixels[80:, :75] = np.random.default_rng(0).integers(0, 256, (80, 75), dtype=np.uint8)
    deviations = [
        np.asarray(demo.cut_crop(Image.fromarray(pixels), (0, 150), seed)).std() for seed in range(40)
    ]
    assert min(deviations) > 1


def test_complete_folder_is_reused(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make(folder)
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_incomplete_folder_is_made_again(folder, tmp_path, capsys):
    target = tmp_path / "images"
    make(target)
    (target / "val" / "cat" / "001.jpg").unlink()
    make(target)
    assert "wrote" in capsys.readouterr().out
    assert contents(target) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_other_counts_replace_the_folder(tmp_path):
    target = tmp_path / "images"
    make(target, train=2, val=1)
    make(target, train=1, val=1)
    assert len(list(target.glob("train/*/*.jpg"))) == len(list(demo.PICTURES.glob("*.jpg")))


def test_interrupted_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_crops", fail)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", ["notes.txt", "train/cat/000.jpg", "demo.json"])
def test_folder_with_somebody_elses_files_is_refused_and_kept(tmp_path, existing):
    path = tmp_path / existing
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(util.UserError, match="other files"):
        make(tmp_path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "words"), [({"train": 0}, "--train: 0"), ({"val": 0}, "--val: 0"), ({"seed": -1}, "--seed: -1")]
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    with refuses(words):
        make(tmp_path / "images", **flags)
    assert not (tmp_path / "images").exists()


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "images").write_text("mine")
    with pytest.raises(util.UserError, match="images"):
        make(tmp_path / "images")


def test_every_picture_has_a_line_in_the_licence_table():
    table = (demo.PICTURES / "LICENSES.md").read_text(encoding="utf-8")
    listed = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")}
    assert listed - {"file", "---"} == {path.name for path in demo.PICTURES.glob("*.jpg")}
