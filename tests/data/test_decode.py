"""Decoding of every kind of file, against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from data import decode
from tests.data.pictures import PHOTOS, array, pixels

# As in data/decode.py; pytest resets the filters.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

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
    assert np.array_equal(array(decode.decode_file(path)), expected)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(array(decode.decode_file(path)), expected)


def test_plain_jpeg_does_not_need_pillow(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "x.jpg")
    expected = pixels(Image.open(tmp_path / "x.jpg"))

    def refuse(*args, **kwargs):
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(decode.Image, "open", refuse)
    assert np.array_equal(array(decode.decode_file(tmp_path / "x.jpg")), expected)


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
        decoded = decode.decode_file(path)
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
        assert (array(decode.decode_file(tmp_path / name)) == [200, 100, 50]).all(), name


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    values = (np.arange(60 * 50, dtype=np.uint16) * 21).reshape(60, 50)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    decoded = decode.decode_file(tmp_path / f"x.{ending}").numpy()
    assert np.array_equal(decoded, np.broadcast_to(values >> 8, (3, 60, 50)))


def test_big_endian_and_32_bit_integers(tmp_path):
    values = np.array([[0, 255, 256], [4095, 65280, 65535]])
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    assert decode.decode_file(tmp_path / "big.tif")[0].tolist() == [[0, 0, 1], [15, 255, 255]]
    values[0, 0], values[1, 2] = -5, 10_000_000
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "int.tif")
    assert decode.decode_file(tmp_path / "int.tif")[2].tolist() == [[0, 0, 1], [15, 255, 255]]


def test_floats_are_0_to_255_or_0_to_1(tmp_path):
    large = np.array([[0, 1, 128.7], [300, -4, np.nan]], dtype=np.float32)
    Image.fromarray(large).save(tmp_path / "large.tif")
    assert decode.decode_file(tmp_path / "large.tif")[0].tolist() == [[0, 1, 128], [255, 0, 0]]
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "unit.tif")
    assert decode.decode_file(tmp_path / "unit.tif")[1].tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path, ending):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"x.{ending}"
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (array(decode.decode_file(path)) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied_by_both_decoders(tmp_path, photo, monkeypatch, orientation, ending):
    path = tmp_path / f"x.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(path, exif=exif)
    expected = pixels(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert expected.shape[:2] == ((191, 143) if 5 <= orientation <= 8 else (143, 191))
    decoded = decode.decode_file(path)
    assert np.array_equal(array(decoded), expected)
    assert decoded.permute(1, 2, 0).is_contiguous()  # the layout the fast resize needs
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.array_equal(array(decode.decode_file(path)), expected)


def test_orientation_behind_other_segments_and_in_xmp(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    photo.save(tmp_path / "late.jpg", exif=exif, icc_profile=bytes(150_000), comment=b"hello")
    photo.save(tmp_path / "xmp.jpg", xmp=xmp)
    for name in ("late.jpg", "xmp.jpg"):
        expected = pixels(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert expected.shape == (191, 143, 3)
        assert np.array_equal(array(decode.decode_file(tmp_path / name)), expected), name


def test_damaged_exif_does_not_lose_the_image(tmp_path, photo):
    for damaged in (b"II*\0\xff\xff\xff\xff", b"no TIFF header", b""):
        photo.save(tmp_path / "x.jpg", exif=b"Exif\0\0" + damaged)
        assert decode.decode_file(tmp_path / "x.jpg").shape == (3, 143, 191)


@pytest.mark.parametrize("kind", [*JPEGS, "grey", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, photo, monkeypatch, kind, share):
    path = tmp_path / ("x.jpg" if kind in JPEGS or kind == "grey" else f"x.{kind}")
    (photo.convert("L") if kind == "grey" else photo).save(path, **JPEGS.get(kind, {}))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for decoder in (decode.simplejpeg, None):
        monkeypatch.setattr(decode, "simplejpeg", decoder)
        with pytest.raises(data.ImageError, match=f"x.{path.suffix[1:]}: .+"):
            decode.decode_file(path)


def test_jpeg_without_its_last_two_bytes_is_refused(tmp_path, photo):
    photo.save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-2])
    with pytest.raises(data.ImageError, match="truncated"):
        decode.decode_file(tmp_path / "x.jpg")


def test_what_only_pillow_tolerates_is_decoded_by_pillow(tmp_path, photo):
    photo.save(tmp_path / "x.jpg")
    photo.save(tmp_path / "png.jpg", "PNG")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(
        content[:20] + b"\0\0" + content[20:]
    )  # stray bytes between two segments
    with pytest.raises(ValueError):
        decode.simplejpeg.decode_jpeg((tmp_path / "x.jpg").read_bytes())
    for name in ("x.jpg", "png.jpg"):
        assert np.array_equal(
            array(decode.decode_file(tmp_path / name)), pixels(Image.open(tmp_path / name))
        ), name


def test_large_images_within_the_limit_are_decoded(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "x.jpg")
    for limit in ((143 * 191 + 1) // 2, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode.decode_file(tmp_path / "x.jpg").shape == (3, 143, 191)


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
    assert decode.decode_file(tmp_path / "x.jpg", scaled=True).shape == (3, decoded[1], decoded[0])
    if max(size) < 2100:
        assert decode.decode_file(tmp_path / "x.jpg").shape == (3, size[1], size[0])


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
    assert torch.equal(
        data.PlainView(images.keep([True, False, True]), data.central_crop(224))[0][0], crop(images.decode(0))
    )


def test_scaled_decoding_refuses_the_same_files(tmp_path):
    Image.open(PHOTOS[3]).convert("RGB").resize((1600, 1070)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:20000])
    with pytest.raises(data.ImageError, match="truncated"):
        decode.decode_file(tmp_path / "x.jpg", scaled=True)
