"""Pictures of 12 bits in files of 16: their range is that of the data set, and a run keeps it."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import assign
import data
import extract
from tests import small_run
from tests.helpers import refuses


def write_grey(folder, bits, count=20, ending="png", shift=0):
    """Noise whose values lie below 2**bits, some of it near the top."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 2**bits, (48, 48)).astype(np.uint16)
        values[:8, :8] = 2**bits - 1
        Image.fromarray(values << shift).save(folder / f"{i:02d}.{ending}")
    return folder


def opened(folder, **options):
    lines = []
    return data.open_images(str(folder), bad_list=folder / "bad.txt", log=lines.append, **options), lines


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_pictures_of_few_bits_are_not_black(tmp_path, ending, bits):
    images, lines = opened(write_grey(tmp_path / "x", bits, ending=ending))
    assert images.bits == bits
    assert [line for line in lines if f"{2**bits - 1} is taken for white" in line] == lines
    values = np.asarray(Image.open(images.path(3)))
    assert np.array_equal(images.decode(3).numpy(), np.broadcast_to(values >> (bits - 8), (3, 48, 48)))


def test_full_16_bit_photographs_and_other_pictures_stay_as_they_are(tmp_path):
    images, lines = opened(write_grey(tmp_path / "full", 12, shift=4))
    assert images.bits == 16 and not lines
    values = np.asarray(Image.open(images.path(0)))
    assert np.array_equal(images.decode(0)[1].numpy(), values >> 8)
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    Image.new("I;16", (8, 8), 0).save(tmp_path / "black.png")
    alone = data.list_images(tmp_path).keep(np.arange(22) < 2)
    data.find_bits(alone)
    assert alone.bits is None and alone.decode(1).unique().tolist() == [7]


def test_the_range_is_one_for_the_data_set_and_brighter_ones_are_white(tmp_path):
    write_grey(tmp_path / "x", 9, count=3)
    Image.new("I;16", (8, 8), 2000).save(tmp_path / "x" / "z.png")
    images, _ = opened(tmp_path / "x")
    assert images.bits == 11 and images.decode(3).unique().tolist() == [2000 >> 3]
    images.bits = 10
    assert images.decode(3).unique().tolist() == [255]


def test_what_the_file_says_goes_before_its_values(tmp_path):
    """A TIFF of 12 bits a sample, packed; and a PGM, which Pillow stretches to 16 bits by its own maximum."""
    packed = b"".join(bytes([(a >> 4) & 255, ((a & 15) << 4) | (a >> 8), a & 255]) for a in [100] * 32)
    entries = [
        (256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8), (279, len(packed)),
    ]  # fmt: skip
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + b"\4\0" + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in entries
    )
    header = b"II*\0\10\0\0\0" + directory + bytes(4)
    (tmp_path / "x.tif").write_bytes(header + packed)
    assert len(header) == 122 and Image.open(tmp_path / "x.tif").getextrema() == (100, 100)
    images, _ = opened(tmp_path)
    assert images.bits == 12
    (tmp_path / "x.tif").unlink()
    (tmp_path / "x.pgm").write_text("P2\n2 1\n4095\n4095 100\n")
    images, _ = opened(tmp_path)
    assert images.bits == 16 and images.decode(0)[0].tolist() == [[255, 100 * 65535 // 4095 >> 8]]


def test_a_damaged_picture_does_not_stop_the_look(tmp_path):
    write_grey(tmp_path / "x", 12, count=3)
    content = (tmp_path / "x" / "00.png").read_bytes()
    (tmp_path / "x" / "00.png").write_bytes(content[: len(content) // 2])
    assert opened(tmp_path / "x")[0].bits == 12


def test_a_run_keeps_the_range_for_its_resume_and_for_other_images(tmp_path, monkeypatch):
    photos, exp = write_grey(tmp_path / "photos", 12), tmp_path / "exp"
    small_run.train(photos, exp, "--epochs", 1)
    log = (exp / "train.log").read_text()
    assert log.count("4095 is taken for white") == 1
    for name in ("checkpoint.pth.tar", "clustering.pth.tar"):
        saved = torch.load(exp / name, weights_only=True)
        assert saved.get("bits", saved.get("parts", {}).get("images", {}).get("bits")) == 12
    dim = write_grey(tmp_path / "dim", 9, count=4)  # alone they would be taken for 9 bits
    seen = []
    decode = data.ImageList.decode
    monkeypatch.setattr(data.ImageList, "decode", lambda self, i: seen.append(self.bits) or decode(self, i))
    for module, flags in (
        (extract, ["--run", str(exp), "--whitened", "--out", str(tmp_path / "a.npy")]),
        (extract, ["--model", str(exp / "checkpoint.pth.tar"), "--out", str(tmp_path / "b.npy")]),
        (assign, ["--run", str(exp), "--out", str(tmp_path / "c.csv")]),
    ):
        arguments = [str(dim), *flags, "--workers", "0", "--device", "cpu"]
        module.main(module.get_parser().parse_args(arguments))
    assert seen and set(seen) == {12}
    images, _ = opened(photos)
    images.load_state_dict({"number": 20, "digest": images.digest(), "skipped": []})  # of an earlier version
    assert images.bits == 16


def test_a_range_that_cannot_be_is_refused_in_a_checkpoint(tmp_path):
    photos, exp = write_grey(tmp_path / "photos", 12), tmp_path / "exp"
    small_run.train(photos, exp, "--epochs", 1)
    path = exp / "checkpoint.pth.tar"
    saved = torch.load(path, weights_only=True)
    saved["parts"]["images"]["bits"] = 40
    torch.save(saved, path)
    with refuses("bits is 40"):
        small_run.train(photos, exp, "--resume", path)


def test_the_crop_cache_follows_the_range(tmp_path):
    images, _ = opened(write_grey(tmp_path / "x", 12, count=3))
    cache = data.CropCache(tmp_path / "cache", images, 16)
    images.bits = 16
    assert data.CropCache(tmp_path / "cache", images, 16).path != cache.path


# ---------------------------------------------------------------------------------------- colour


def png_of(values):
    """A PNG of 16 bits a sample, colour with or without alpha; Pillow writes none."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = (struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff_of(values, order="<", packed=False):
    """A TIFF of 16 bits a sample, colour, in either order of bytes."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if packed else content
    tags = {256: width, 257: height, 258: 0, 259: 8 if packed else 1, 262: 2, 273: 0, 277: channels,
            278: height, 279: len(content)}  # fmt: skip
    tags[258] = 8 + 2 + 12 * len(tags) + 4  # where the bits of the samples stand; the pixels follow
    tags[273] = tags[258] + 2 * channels
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags.items():
        kind, count = (3, channels) if tag == 258 else (4, 1)
        out += struct.pack(f"{order}HHII", tag, kind, count, value)
    return out + struct.pack(f"{order}I{channels}H", 0, *[16] * channels) + content


FILES = {
    "png": png_of, "alpha.png": lambda v: png_of(np.concatenate([v, v[:, :, :1]], axis=2)), "tif": tiff_of,
    "big.tif": lambda v: tiff_of(v, ">"), "packed.tif": lambda v: tiff_of(v, "<", packed=True),
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 9, 12, 16])
@pytest.mark.parametrize("kind", FILES)
def test_colours_of_few_bits_are_not_black(tmp_path, kind, bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 7, 3)).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    (tmp_path / f"x.{kind}").write_bytes(FILES[kind](values))
    images, lines = opened(tmp_path)
    assert images.bits == bits and len(lines) == (bits < 16)
    assert np.array_equal(images.decode(0).numpy(), (values >> (bits - 8)).transpose(2, 0, 1))
    images.bits = None
    assert np.array_equal(images.decode(0).numpy(), (values >> 8).transpose(2, 0, 1))
    images.bits = max(bits - 1, 8)
    clipped = np.minimum(values >> (images.bits - 8), 255)
    assert np.array_equal(images.decode(0).numpy(), clipped.transpose(2, 0, 1))
