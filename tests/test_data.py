"""data.py: lists of images, decoding of every kind of file, crops, views, normalisation."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.transforms import v2

import data
from util import UserError, derive_seed

# As in data.py; pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

PHOTOS = [
    *(
        Path(skimage.__file__).parent / "data" / name
        for name in ("astronaut.png", "coffee.png", "chelsea.png")
    ),
    *(Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")),
]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PHOTOS[1]).convert("RGB").crop((40, 30, 231, 173))  # 191 x 143, odd on purpose


def touch_images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (10, 20, 30)).save(root / name, "PNG")
    return root


def array(tensor: torch.Tensor) -> np.ndarray:
    """(3, H, W) tensor -> (H, W, 3) integers that can be subtracted."""
    return tensor.permute(1, 2, 0).numpy().astype(int)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---------------------------------------------------------------------------------------- lists of images


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


def test_dangling_link_is_listed_and_reported(tmp_path):
    touch_images(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    images = data.list_images(tmp_path)
    assert list(images.paths) == ["a.png", "b.png"]
    assert data.check_headers(images, 1) == [(1, "no such file or directory")]


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
    with pytest.raises(
        UserError, match=r"nowhere does not exist \(expected a folder of images or a text file"
    ):
        data.list_images(tmp_path / "nowhere")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no image found in .*empty.*\.jpg, \.png"):
        data.list_images(tmp_path / "empty")
    (tmp_path / "list.txt").write_text("# only a comment\n")
    with pytest.raises(UserError, match=r"list\.txt names no image"):
        data.list_images(tmp_path / "list.txt")
    touch_images(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text("a.png\n\ngone/x.png\na.png\ngone/y.png\n")
    with pytest.raises(
        UserError, match=r"names 2 file\(s\) that do not exist, the first is gone/x.png \(line 3\)"
    ):
        data.list_images(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"a.png is neither a folder nor a text file"):
        data.list_images(tmp_path / "a.png")


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    touch_images(tmp_path, "a/1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*: Permission denied"):
        data.list_images(tmp_path)


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


# ---------------------------------------------------------------------------------------- decoding

JPEGS = {
    "444": {"subsampling": 0, "quality": 95},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "411": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
}


@pytest.mark.parametrize("kind", [*JPEGS, "grey", "grey progressive", "cmyk", "1x1", "3x200"])
def test_both_jpeg_decoders_equal_pillow(tmp_path, photo, monkeypatch, kind):
    image = {
        "grey": lambda: photo.convert("L"),
        "grey progressive": lambda: photo.convert("L"),
        "cmyk": lambda: photo.convert("CMYK"),
        "1x1": lambda: photo.resize((1, 1)),
        "3x200": lambda: photo.resize((3, 200)),
    }.get(kind, lambda: photo)()
    path = tmp_path / "x.jpg"
    image.save(path, **JPEGS.get(kind, {"progressive": "progressive" in kind}))
    expected = pixels(Image.open(path).convert("RGB"))
    assert np.array_equal(array(data.decode(path)), expected)
    monkeypatch.setattr(data, "simplejpeg", None)
    assert np.array_equal(array(data.decode(path)), expected)


def test_plain_jpeg_does_not_need_pillow(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "x.jpg")
    expected = pixels(Image.open(tmp_path / "x.jpg"))

    def refuse(*args, **kwargs):
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(data.Image, "open", refuse)
    assert np.array_equal(array(data.decode(tmp_path / "x.jpg")), expected)


WRITTEN_AS = {
    "1": ["png", "tif", "gif", "bmp", "webp", "tga"],
    "L": ["png", "tif", "gif", "bmp", "webp", "jp2", "tga"],
    "LA": ["png", "tif", "gif", "webp", "jp2", "tga"],
    "P": ["png", "tif", "gif", "bmp", "webp", "tga"],
    "PA": ["tif"],
    "RGB": ["png", "tif", "gif", "bmp", "webp", "jp2", "tga"],
    "RGBA": ["png", "tif", "gif", "bmp", "webp", "jp2", "tga"],
    "CMYK": ["tif", "webp"],
    "YCbCr": ["tif", "webp", "jp2"],
    "LAB": ["tif"],
}


@pytest.mark.parametrize("mode", WRITTEN_AS)
def test_every_8_bit_mode_gives_pillows_rgb(tmp_path, photo, mode):
    image = photo.convert("P").convert("PA") if mode == "PA" else photo.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(photo.convert("L"))
    for ending in WRITTEN_AS[mode]:
        path = tmp_path / f"x.{ending}"
        image.save(path)
        decoded = data.decode(path)
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, 143, 191)
        assert np.array_equal(array(decoded), pixels(Image.open(path).convert("RGB"))), ending


def test_alpha_and_palette_transparency_are_dropped(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    image.save(tmp_path / "alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "index.png", transparency=1)
    palette.save(tmp_path / "bytes.png", transparency=b"\x00\x07")
    palette.save(tmp_path / "x.gif", transparency=1)
    for name in ("alpha.png", "index.png", "bytes.png", "x.gif"):
        assert (array(data.decode(tmp_path / name)) == [200, 100, 50]).all(), name


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    values = (np.arange(60 * 50, dtype=np.uint16) * 21).reshape(60, 50)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    decoded = data.decode(tmp_path / f"x.{ending}").numpy()
    assert np.array_equal(decoded, np.broadcast_to(values >> 8, (3, 60, 50)))


def test_big_endian_and_32_bit_integers(tmp_path):
    values = np.array([[0, 255, 256], [4095, 65280, 65535]])
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    assert data.decode(tmp_path / "big.tif")[0].tolist() == [[0, 0, 1], [15, 255, 255]]
    values[0, 0], values[1, 2] = -5, 10_000_000
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "int.tif")
    assert data.decode(tmp_path / "int.tif")[2].tolist() == [[0, 0, 1], [15, 255, 255]]


def test_floats_are_0_to_255_or_0_to_1(tmp_path):
    large = np.array([[0, 1, 128.7], [300, -4, np.nan]], dtype=np.float32)
    Image.fromarray(large).save(tmp_path / "large.tif")
    assert data.decode(tmp_path / "large.tif")[0].tolist() == [[0, 1, 128], [255, 0, 0]]
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "unit.tif")
    assert data.decode(tmp_path / "unit.tif")[1].tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path, ending):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"x.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (array(data.decode(path)) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied_by_both_decoders(tmp_path, photo, monkeypatch, orientation, ending):
    path = tmp_path / f"x.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(path, exif=exif)
    expected = pixels(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert expected.shape[:2] == ((191, 143) if 5 <= orientation <= 8 else (143, 191))
    decoded = data.decode(path)
    assert np.array_equal(array(decoded), expected)
    assert decoded.permute(1, 2, 0).is_contiguous()  # the layout the fast resize needs
    monkeypatch.setattr(data, "simplejpeg", None)
    assert np.array_equal(array(data.decode(path)), expected)


def test_orientation_behind_other_segments_and_in_xmp(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    photo.save(tmp_path / "late.jpg", exif=exif, icc_profile=bytes(150_000), comment=b"hello")
    photo.save(tmp_path / "xmp.jpg", xmp=xmp)
    for name in ("late.jpg", "xmp.jpg"):
        expected = pixels(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert expected.shape == (191, 143, 3)
        assert np.array_equal(array(data.decode(tmp_path / name)), expected), name


def test_damaged_exif_does_not_lose_the_image(tmp_path, photo):
    for damaged in (b"II*\0\xff\xff\xff\xff", b"no TIFF header", b""):
        photo.save(tmp_path / "x.jpg", exif=b"Exif\0\0" + damaged)
        assert data.decode(tmp_path / "x.jpg").shape == (3, 143, 191)


@pytest.mark.parametrize("kind", [*JPEGS, "grey", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, photo, monkeypatch, kind, share):
    path = tmp_path / ("x.jpg" if kind in JPEGS or kind == "grey" else f"x.{kind}")
    (photo.convert("L") if kind == "grey" else photo).save(path, **JPEGS.get(kind, {}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for decoder in (data.simplejpeg, None):
        monkeypatch.setattr(data, "simplejpeg", decoder)
        with pytest.raises(data.ImageError, match=f"x.{path.suffix[1:]}: .+"):
            data.decode(path)


def test_jpeg_without_its_last_two_bytes_is_refused(tmp_path, photo):
    photo.save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-2])
    with pytest.raises(data.ImageError, match="truncated"):
        data.decode(tmp_path / "x.jpg")


def test_what_only_pillow_tolerates_is_decoded_by_pillow(tmp_path, photo):
    photo.save(tmp_path / "x.jpg")
    photo.save(tmp_path / "png.jpg", "PNG")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(
        content[:20] + b"\0\0" + content[20:]
    )  # stray bytes between two segments
    with pytest.raises(ValueError):
        data.simplejpeg.decode_jpeg((tmp_path / "x.jpg").read_bytes())
    for name in ("x.jpg", "png.jpg"):
        assert np.array_equal(array(data.decode(tmp_path / name)), pixels(Image.open(tmp_path / name))), name


def write_broken(root: Path) -> dict[str, str]:
    """Broken files and a part of the reason that is to be given."""
    (root / "empty.jpg").touch()
    (root / "text.png").write_text("not an image, but long enough to be looked at" * 10)
    (root / "program.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    (root / "folder.jpg").mkdir()
    return {
        "empty.jpg": "the file is empty",
        "text.png": "not an image",
        "program.jpg": "not an image",
        "folder.jpg": "is a directory",
        "gone.jpg": "no such file",
    }


def test_broken_files_are_named_with_the_reason(tmp_path):
    reasons = write_broken(tmp_path)
    images = data.ImageList(tmp_path, list(reasons))
    found = data.check_headers(images, workers=2)
    assert [i for i, _ in found] == list(range(len(reasons)))
    for i, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(data.ImageError, match=f"{name}: {reason}") as caught:
            data.decode(tmp_path / name)
        assert isinstance(caught.value, UserError)
        assert data.broken_reason(images, i) == found[i][1] == caught.value.reason


def test_bombs_are_refused_before_they_are_decoded(tmp_path, photo, monkeypatch):
    names = ["x.jpg", "x.png", "x.gif"]
    for name in names:
        photo.save(tmp_path / name)
    images = data.ImageList(tmp_path, names)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 143 * 191 // 2)  # the limit is twice that: one pixel less
    assert [i for i, _ in data.check_headers(images, 1)] == [0, 1, 2]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    monkeypatch.setattr(data.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    for name in names:
        with pytest.raises(
            data.ImageError, match=f"{name}: more than 27312 pixels, refused as a decompression bomb"
        ):
            data.decode(tmp_path / name)


def test_large_images_within_the_limit_are_decoded(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "x.jpg")
    for limit in ((143 * 191 + 1) // 2, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert data.decode(tmp_path / "x.jpg").shape == (3, 143, 191)


def test_stamps_tell_files_that_change(tmp_path):
    images = data.list_images(touch_images(tmp_path, "a.png", "b.png", "c.png"))
    before = images.stamps()
    assert before[:, 0].tolist() == [images.path(i).stat().st_size for i in range(3)]
    images.path(1).write_bytes(b"shorter")
    images.path(2).unlink()
    changed = (images.stamps() != before).any(axis=1)
    assert changed.tolist() == [False, True, True] and images.stamps()[2].tolist() == [-1, -1, -1]


def test_check_headers_covers_every_index_once(tmp_path):
    touch_images(tmp_path, "good.png")
    (tmp_path / "bad.png").write_text("no")
    names = ["bad.png" if i % 700 == 3 else "good.png" for i in range(2500)]
    found = data.check_headers(data.ImageList(tmp_path, names), workers=3)
    assert [i for i, _ in found] == [3, 703, 1403, 2103]


def test_image_error_keeps_its_line_through_pickle_and_a_worker(tmp_path):
    error = data.ImageError("/a: b/x.jpg", "broken: very")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "/a: b/x.jpg: broken, very"
    assert (copy.path, copy.reason) == ("/a: b/x.jpg", "broken, very")
    (tmp_path / "x.jpg").write_text("no image")
    view = data.TrainView(data.list_images(tmp_path), 32, seed=0, epoch=0)
    with pytest.raises(data.ImageError) as caught:
        list(data.make_loader(view, 1, workers=1, sampler=[(0, 0)]))
    assert str(caught.value) == f"{tmp_path / 'x.jpg'}: not an image in a format that Pillow reads"
    assert caught.value.path == str(tmp_path / "x.jpg")


# ---------------------------------------------------------------------------------------- scaled decoding


@pytest.mark.parametrize(
    "size, decoded",
    [
        ((1500, 1023), (1500, 1023)),
        ((1500, 1024), (750, 512)),
        ((1025, 1401), (513, 701)),
        ((2047, 3000), (1024, 1500)),
        ((2048, 3001), (512, 751)),
        ((4096, 4100), (512, 513)),
        ((9000, 4095), (2250, 1024)),
    ],
)
def test_scaled_decoding_keeps_512_pixels_of_large_photographs(tmp_path, photo, size, decoded):
    photo.resize(size, Image.Resampling.NEAREST).save(tmp_path / "x.jpg", quality=50)
    assert data.decode(tmp_path / "x.jpg", scaled=True).shape == (3, decoded[1], decoded[0])
    if max(size) < 2100:
        assert data.decode(tmp_path / "x.jpg").shape == (3, size[1], size[0])


def test_scaled_decoding_is_close_upright_and_optional(tmp_path):
    image = Image.open(PHOTOS[3]).convert("RGB").resize((1600, 1070), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "1.jpg", quality=95, exif=exif)
    image.save(tmp_path / "2.png")
    image.convert("CMYK").save(tmp_path / "3.jpg")
    images, plain = data.list_images(tmp_path), data.list_images(tmp_path)
    images.scaled = True
    assert images.decode(0).shape == (3, 800, 535) and plain.decode(0).shape == (3, 1600, 1070)
    for i in (1, 2):  # other formats are decoded in full
        assert torch.equal(images.decode(i), plain.decode(i))
    crop = data.central_crop(224)
    error = (crop(images.decode(0)).float() - crop(plain.decode(0)).float()).abs()
    assert 0 < error.mean() < 2
    assert torch.equal(data.CentralView(images.keep([True, False, True]), 224)[0][0], crop(images.decode(0)))


def test_scaled_decoding_refuses_the_same_files(tmp_path):
    Image.open(PHOTOS[3]).convert("RGB").resize((1600, 1070)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:20000])
    with pytest.raises(data.ImageError, match="truncated"):
        data.decode(tmp_path / "x.jpg", scaled=True)


# ---------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73), (96, 110)])
@pytest.mark.parametrize("source", PHOTOS, ids=lambda path: path.name)
def test_central_crop_is_pillows_within_one_level(source, size, side):
    reference = v1.Compose([v1.Resize(side), v1.CenterCrop(size)])
    error = np.abs(
        pixels(reference(Image.open(source).convert("RGB")))
        - array(data.central_crop(size)(data.decode(source)))
    )
    assert error.shape == (size, size, 3)
    assert error.max() <= 1 and error.mean() <= 0.01


@pytest.mark.parametrize("source", PHOTOS, ids=lambda path: path.name)
def test_train_crop_is_pillows_within_one_level(source):
    reference = v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()])
    image, decoded = Image.open(source).convert("RGB"), data.decode(source)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = pixels(reference(image))
        torch.manual_seed(seed)
        error = np.abs(expected - array(data.train_crop(224)(decoded)))
        assert error.max() <= 1 and error.mean() <= 0.3  # more where a small box is enlarged


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (64, 64), (1, 1), (3, 2000), (2000, 3), (7, 5), (40, 30), (30, 40)]
)
@pytest.mark.parametrize("scale, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.1, 0.5), (1.0, 1.0))])
def test_boxes_and_random_state_are_torchvisions(shape, scale, ratio):
    reference = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = torch.empty(3, *shape, dtype=torch.uint8)
    for seed in range(200):
        torch.manual_seed(seed)
        expected, state = reference.make_params([image]), torch.get_rng_state()
        torch.manual_seed(seed)
        top, left, height, width = data._draw_box(*shape, scale, ratio)
        assert {"top": top, "left": left, "height": height, "width": width} == expected
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("native", [True, False])
def test_resizing_is_torchvisions_for_every_layout(photo, monkeypatch, native):
    monkeypatch.setattr(data, "RESIZES_UINT8", native)  # False: the way of processors without AVX2
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    layouts = {
        "(H, W, 3)": image,
        "(3, H, W)": image.contiguous(),
        "a box": image[:, 20:100, 30:90],
        "a box of (3, H, W)": image.contiguous()[:, 20:100, 30:90],
        "turned": image.transpose(1, 2),
        "one value": image[:, :1, :1].expand(3, 50, 40),
    }
    for name, source in layouts.items():
        for size in ((64, 64), (30, 200), tuple(source.shape[1:])):
            expected = v2.functional.resize(source, list(size))
            assert torch.equal(data._resize_to(source, *size), expected), (name, size)


def test_train_crop_flips_half_the_time():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    crop = data.train_crop(16)
    torch.manual_seed(0)
    flipped = sum(int(view[0, 0, 0] > view[0, 0, -1]) for view in (crop(ramp) for _ in range(400)))
    assert 160 < flipped < 240


def test_voc_crop_takes_squares_of_10_to_50_percent_of_the_area():
    # Red counts columns and green rows, so that the corners of a view tell the box it was cut from.
    columns, rows = torch.meshgrid(torch.arange(120), torch.arange(200), indexing="xy")
    image = torch.stack([columns, rows, rows * 0]).to(torch.uint8)
    crop = data.voc_train_crop(40)
    torch.manual_seed(0)
    shares, flips = [], 0
    for _ in range(200):
        view = crop(image).int()
        width, height = view[0, 0, -1] - view[0, 0, 0], view[1, -1, 0] - view[1, 0, 0]
        flips += int(width < 0)
        assert abs(abs(int(width)) - int(height)) <= 2
        shares.append((int(height) * 40 / 39) ** 2 / (120 * 200))
    assert 0.09 < min(shares) < 0.15 and 0.44 < max(shares) < 0.52
    assert 70 < flips < 130


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73)])
def test_ten_crops_are_torchvisions(size, side):
    decoded = data.decode(PHOTOS[1])
    expected = torch.stack(v2.TenCrop(size)(v2.Resize(side)(decoded)))
    assert expected.shape == (10, 3, size, size)
    assert torch.equal(data.ten_crops(size)(decoded), expected)
    assert torch.equal(expected[4], data.central_crop(size)(decoded))


@pytest.mark.parametrize("size, side", [(224, 256), (64, 73)])
def test_probe_train_crop_is_torchvisions(size, side):
    decoded = data.decode(PHOTOS[1])
    reference = [v2.Resize(side), v2.CenterCrop(side), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    for seed in range(4):
        torch.manual_seed(seed)
        expected = v2.Compose(reference)(decoded)
        torch.manual_seed(seed)
        assert torch.equal(data.probe_train_crop(size)(decoded), expected)


CROPS = [data.central_crop, data.train_crop, data.voc_train_crop, data.probe_train_crop, data.ten_crops]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (1, 50000), (224, 224), (7, 5)])
@pytest.mark.parametrize("make", CROPS, ids=lambda make: make.__name__)
def test_odd_shapes_give_full_views(make, shape):
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    view = make(64)(image)
    assert view.shape[-3:] == (3, 64, 64) and view.dtype == torch.uint8
    assert (view == 77).all()  # nothing is padded


@pytest.mark.parametrize("long", [2000, 2001])
@pytest.mark.parametrize("short", [3, 4])
def test_central_crop_of_a_strip_is_its_middle(short, long):
    ramp = torch.linspace(0, 255, long).round().to(torch.uint8).expand(3, short, long)
    for image in (ramp, ramp.transpose(1, 2)):
        middle = data.central_crop(224)(image).float().mean()
        assert abs(middle - 127.5) < 0.6


def test_transforms_survive_pickling(photo):
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    for make in CROPS:
        views = []
        for transform in (make(32), pickle.loads(pickle.dumps(make(32)))):
            torch.manual_seed(3)
            views.append(transform(image))
        assert torch.equal(*views)


# ---------------------------------------------------------------------------------------- views and loader


@pytest.fixture
def folder(tmp_path, photo) -> data.ImageList:
    for i in range(7):
        photo.rotate(10 * i).save(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}")
    return data.list_images(tmp_path)


def test_central_view_gives_views_and_indexes_in_order(folder):
    view = data.CentralView(folder, 48)
    assert len(view) == 7
    batches = list(data.make_loader(view, 4, workers=0))
    assert [batch[0].shape for batch in batches] == [(4, 3, 48, 48), (3, 3, 48, 48)]
    assert torch.cat([index for _, index in batches]).tolist() == list(range(7))
    views = torch.cat([views for views, _ in batches])
    expected = torch.stack([data.central_crop(48)(data.decode(folder.path(i))) for i in range(7)])
    assert torch.equal(views, expected)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_broken_image_is_marked_in_the_central_view(folder):
    folder.path(3).write_bytes(folder.path(3).read_bytes()[:-200])
    folder.path(0).write_bytes(b"")
    for workers, transform, shape in ((0, None, (3, 48, 48)), (1, data.ten_crops(48), (10, 3, 48, 48))):
        loader = data.make_loader(data.CentralView(folder, 48, transform), 7, workers)
        views, indexes = next(iter(loader))
        assert indexes.tolist() == [-1, 1, 2, -4, 4, 5, 6]
        assert views.shape == (7, *shape)
        assert (views[3] == 0).all() and (views[1] != 0).any()
    assert "truncated" in data.broken_reason(folder, 3)
    assert data.broken_reason(folder, 1) is None


def test_train_view_depends_on_seed_epoch_and_position_only(folder):
    def views(workers: int, order: list[tuple[int, int]], seed=5, epoch=2) -> dict:
        loader = data.make_loader(data.TrainView(folder, 48, seed, epoch), 3, workers, sampler=order)
        batches, indexes = zip(*loader)
        assert torch.cat(indexes).tolist() == [i for _, i in order]
        return dict(zip(order, torch.cat(batches)))

    order = [(position, (3 * position) % 7) for position in range(10)]
    first = views(0, order)
    for other in (views(2, order), views(1, order[::-1]), {item: views(0, [item])[item] for item in order}):
        assert all(torch.equal(first[item], other[item]) for item in order)
    assert len({view.numpy().tobytes() for view in first.values()}) == 10
    for other in (views(0, order, seed=6), views(0, order, epoch=3)):
        assert not any(torch.equal(first[item], other[item]) for item in order)


def test_train_view_gives_a_batch_as_it_gives_items(folder):
    view = data.TrainView(folder, 48, seed=5, epoch=2)
    items = [(3, 1), (0, 6), (9, 1)]
    torch.manual_seed(1)
    for (batch_view, index), item in zip(view.__getitems__(items), items):
        assert torch.equal(batch_view, view[item][0]) and index == item[1]


def test_train_view_is_the_crop_under_its_derived_seed(folder):
    view, index = data.TrainView(folder, 48, seed=5, epoch=2)[11, 4]
    torch.manual_seed(derive_seed(5, "crop", 2, 11))
    assert torch.equal(view, data.train_crop(48)(data.decode(folder.path(4)))) and index == 4


def test_train_view_leaves_the_callers_random_state(folder):
    def fail(_):
        torch.rand(3)
        raise ValueError

    view = data.TrainView(folder, 48, seed=5, epoch=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    view[0, 0]
    with pytest.raises(ValueError):
        data.TrainView(folder, 48, 5, 2, transform=fail)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(view) == 7


def test_train_view_raises_for_a_broken_image(folder):
    folder.path(2).write_bytes(b"")
    with pytest.raises(data.ImageError, match=r"2.png: the file is empty"):
        data.TrainView(folder, 48, seed=5, epoch=2)[0, 2]


class WorkerState(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return torch.full((3, 1, 1), torch.get_num_threads()), int(ignored)


def test_workers_use_one_thread_and_ignore_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    loader = data.make_loader(WorkerState(), 1, workers=1)
    threads, ignored = next(iter(loader))
    assert threads.flatten().tolist() == [1, 1, 1] and ignored.tolist() == [1]
    assert signal.getsignal(signal.SIGINT) == before


WITH_A_WORKER = """
import os, signal, subprocess, sys
import data
from tests.test_data import WorkerState

iterator = iter(data.make_loader(WorkerState(), 1, workers=1))
worker = iterator._workers[0]
next(iterator)
if sys.argv[1] == "others":
    for name in ("INT", "TERM", "USR1"):  # by another process: a SIGTERM of this one would end the worker
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(1)
    print("alive" if worker.is_alive() else f"ended: {worker.exitcode}")
sys.modules["kept"] = iterator  # as an exception's traceback keeps it
"""


@pytest.mark.parametrize("signals, output", [("others", "alive"), ("none", "")])
def test_a_worker_outlives_the_signals_of_others_but_not_the_main_process(signals, output):
    command = [sys.executable, "-c", WITH_A_WORKER, signals]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(data.__file__).parent
    )
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, output, "")


# ---------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_equals_totensor_and_normalize(memory_format):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    batch = levels.contiguous(memory_format=memory_format)
    before = batch.clone()
    normalised = data.normalise(batch)
    reference = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(batch.double() / 255)
    assert normalised.dtype == torch.float32
    assert (normalised - reference).abs().max() < 1e-6
    assert normalised.is_contiguous(memory_format=memory_format)
    assert torch.equal(batch, before)


def test_normalise_takes_ten_crops_and_leaves_floats_alone():
    batch = torch.randint(0, 256, (2, 10, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(data.normalise(batch)[1, 7], data.normalise(batch[1, 7]))
    floats = batch.float()
    data.normalise(floats)
    assert torch.equal(floats, batch.float())
