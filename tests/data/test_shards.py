"""data/shards.py: a run on shards is a run on the folder, whatever wrote the shards."""

import functools
import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
import webdataset

import data
from data import CropCache, shards
from tests.helpers import refuses
from tests.tars import jpeg, write, write_folder, write_tar
from util import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.mark.parametrize("size_mb", ["300", "0.012"])
def test_shards_are_the_folder(folder, tmp_path, size_mb):
    written = write(folder, tmp_path, "--size-mb", size_mb)
    assert (len(written) > 2) == (size_mb != "300")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    assert list(images.paths) == list(plain.paths) and images.digest() == plain.digest()
    assert images.classes.tolist() == plain.classes.tolist() and images.class_names == plain.class_names
    assert images.classes.dtype == np.int64
    for i in range(len(plain)):
        assert images.read(i) == plain.read(i) == plain.path(i).read_bytes()
        assert torch.equal(images.decode(i), plain.decode(i))
        with images.open(i) as file:
            assert file.read() == plain.read(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_through_loaders_are_the_folders(folder, tmp_path, workers):
    write(folder, tmp_path, "--size-mb", "0.02")
    lists = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    order = [(position, i) for position, i in enumerate(random.Random(0).choices(range(len(lists[0])), k=20))]
    batches = []
    for images in lists:
        plain = data.PlainView(images, data.central_crop(32))
        random_ = data.RandomView(images, data.train_crop(32)).at(1, 2)
        loaders = [
            data.make_loader(plain, 5, workers, CPU),
            data.make_loader(random_, 4, workers, CPU, sampler=order),
        ]
        found = [batch for loader in loaders for batch in loader]
        assert not any(batch.broken for batch in found)
        batches.append([tensor for batch in found for tensor in (batch.views, batch.index)])
    assert len(batches[0]) == len(batches[1])
    assert all(torch.equal(one, other) for one, other in zip(*batches))


def test_keep_keeps_images_with_their_names(folder, tmp_path):
    write(folder, tmp_path, "--size-mb", "0.02")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    mask = np.arange(len(images)) % 3 == 1
    images.scaled = True
    kept, expected = images.keep(mask), plain.keep(mask)
    assert kept.digest() == expected.digest() and kept.classes.tolist() == expected.classes.tolist()
    assert [kept.read(i) for i in range(len(kept))] == [expected.read(i) for i in range(len(kept))]
    assert kept.scaled and isinstance(kept, shards.ShardList)
    copy = pickle.loads(pickle.dumps(kept))  # as a worker that is spawned gets it
    assert copy.read(1) == kept.read(1) and copy.class_names == kept.class_names


def test_more_shards_than_open_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_handle", functools.lru_cache(maxsize=2)(shards._Handle))
    write(folder, tmp_path, "--size-mb", "0.001")
    images, plain = shards.list_shards(f"{tmp_path}/train-*.tar"), data.list_images(folder)
    assert len(images.shards) == len(images)
    before = len(os.listdir("/proc/self/fd"))
    with images.open(0) as first:
        for i in range(len(images)):
            assert images.read(i) == plain.read(i)
        assert first.read() == plain.read(0)  # its handle left the cache long ago
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # two, and that of `first`


def test_a_file_that_nobody_keeps_open_stays_open_for_its_reader(folder, tmp_path, monkeypatch):
    """As where two threads open a shard at once, of which one is kept, or one is dropped while it is read."""
    write(folder, tmp_path)
    listed = shards.list_shards(f"{tmp_path}/train-*.tar")
    expected = [listed.read(i) for i in range(len(listed))]
    monkeypatch.setattr(shards, "_handle", shards._Handle)
    assert [listed.read(i) for i in range(len(listed))] == expected and len(set(expected)) > 1
    assert [listed.open(i).read() for i in range(len(listed))] == expected


def test_crop_cache_over_shards_follows_the_shards(folder, tmp_path):
    write(folder, tmp_path, "--size-mb", "0.02")
    images = shards.list_shards(f"{tmp_path}/train-*.tar")
    crops = CropCache(tmp_path / "cache", images, 16)
    view = data.PlainView(images, data.central_crop(16), crops)
    assert all(view[i][0] is not None for i in range(13))
    assert torch.equal(crops.read(5), data.PlainView(data.list_images(folder), data.central_crop(16))[5][0])
    again = CropCache(tmp_path / "cache", shards.list_shards(f"{tmp_path}/train-*.tar"), 16)
    assert all(again.read(i) is not None for i in range(13))
    os.utime(images.shards[1])
    changed = CropCache(tmp_path / "cache", shards.list_shards(f"{tmp_path}/train-*.tar"), 16)
    assert changed.path != crops.path and all(changed.read(i) is None for i in range(13))


def test_webdataset_reads_what_make_shards_writes(folder, tmp_path):
    write(folder, tmp_path)
    plain = data.list_images(folder)
    samples = list(webdataset.WebDataset(str(tmp_path / "train-000.tar"), shardshuffle=False))
    assert len(samples) == len(plain)
    for i, sample in enumerate(samples):
        content = sample.get("jpg") or sample.get("png")
        assert content == plain.read(i) and int(sample["cls"]) == plain.classes[i]


def test_damaged_image_in_a_shard_is_broken_and_named(folder, tmp_path):
    (path,) = write(folder, tmp_path)
    images = shards.list_shards(path)
    content = bytearray(path.read_bytes())
    first, second = (images.where[i, 1:].tolist() for i in (0, 1))
    content[first[0] : first[0] + 30] = bytes(30)  # no JPEG any more
    content[second[0] + second[1] // 2 : second[0] + second[1]] = bytes(second[1] - second[1] // 2)
    path.write_bytes(content)
    images = shards.list_shards(path)
    assert data.check_headers(images, 2) == [(0, "not an image in a format that Pillow reads")]
    view = data.PlainView(images, data.central_crop(16))
    batch = next(iter(data.make_loader(view, 4, 0, CPU)))
    assert batch.index.tolist() == [2, 3] and batch.broken == [0, 1]
    assert data.broken_reason(images, 0) == "not an image in a format that Pillow reads"
    with pytest.raises(data.ImageError, match=r"train-000.tar/a cat/0\.0\.jpg: not an image"):
        images.decode(0)


# ---------------------------------------------------------------------------------------- foreign shards


def test_shards_of_webdatasets_own_writer(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/x-%02d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            other = {"json": b"{}", "seg.png": b"no photograph", "txt": b"caption"}
            writer.write({"__key__": f"k{i}", "jpg": jpeg(i), "cls": 10 - 3 * i % 4, **other})
    images = shards.list_shards(f"{tmp_path}/x-{{00..02}}.tar")
    assert list(images.paths) == ["x-00/k0.jpg", "x-00/k1.jpg", "x-01/k2.jpg", "x-01/k3.jpg", "x-02/k4.jpg"]
    assert [images.read(i) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert images.class_names == ["7", "8", "9", "10"]  # as numbers
    assert [images.class_names[c] for c in images.classes] == ["10", "7", "8", "9", "10"]
    assert images.root == tmp_path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_folders(tmp_path, format):
    names = [
        "./b/1.jpg",
        "./b/2.jpg",
        f"./a/{'long/' * 22}{'x' * 60}.jpg",
        "./a/ä.jpeg",
        "./a/._x.jpg",
        "./a/readme",
    ]
    with tarfile.open(tmp_path / "t.tar", "w", format=format) as tar:
        tar.addfile(folder := tarfile.TarInfo("./b"), None)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(jpeg(i)), 1.25 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(jpeg(i)))
    images = shards.list_shards(tmp_path / "t.tar")
    assert list(images.paths) == [f"t/{name[2:]}" for name in names[:4]]
    assert [images.read(i) for i in range(4)] == [jpeg(i) for i in range(4)]
    assert images.class_names == ["a", "b"] and images.classes.tolist() == [1, 1, 0, 0]


def test_shards_without_labels_have_no_classes(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "1.cls": b"4"})
    images = shards.list_shards(tmp_path / "{a,b}.tar")
    assert list(images.paths) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]
    assert images.classes is None and images.class_names is None


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("gone.tar", "names 1 shards, of which 1 do not exist; the first is .*gone.tar"),
        ("x-{00..03}.tar", "names 4 shards, of which 2 do not exist; the first is .*x-01.tar"),
        ("y-*.tar", r"y-\*.tar: no file matches"),
        ("x-{00..03.tar", "brace"),
        ("x-{00,00}.tar", "the image x-00/1.jpg is in the shards twice"),
        ("twice.tar", r"2 images of the key 1 \(1.jpg, 1.png\)"),
        ("dots.tar", r"2 images of the key 1 \(1.a.jpg, 1.b.jpg\)"),
        ("text.tar", "no image found in the 1 shard"),
        ("photo.tar", "is no tar file"),
        ("empty.tar", "is no tar file.*empty"),
        ("packed.tar.gz", "is compressed.*gunzip"),
        ("packed.tar", "is compressed.*gunzip"),
        ("http://host/x-{00..03}.tar", "only local files"),
        ("pipe:cat x.tar", "only local files"),
    ],
)
def test_mistakes_are_named(tmp_path, pattern, message):
    for name in ("x-00.tar", "x-02.tar"):
        write_tar(tmp_path / name, {"1.jpg": jpeg(1)})
    write_tar(tmp_path / "twice.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(3), "1.png": jpeg(2)})
    write_tar(tmp_path / "dots.tar", {"1.a.jpg": jpeg(1), "1.b.jpg": jpeg(2)})
    write_tar(tmp_path / "text.tar", {"1.txt": b"nothing"})
    (tmp_path / "photo.tar").write_bytes(jpeg(5))
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "photo.tar", "1.jpg")
    (tmp_path / "packed.tar").write_bytes((tmp_path / "packed.tar.gz").read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        shards.list_shards(pattern if ":" in pattern else f"{tmp_path}/{pattern}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_any_cut_is_noticed(tmp_path, format):
    long_name = "x" * 120 + ".jpg" if format == tarfile.GNU_FORMAT else "3.jpg"
    members = {"1.jpg": jpeg(1), "2.jpg": jpeg(2), long_name: jpeg(3)}
    path = write_tar(tmp_path / "x.tar", members, format=format)
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))  # of the last image; the end mark follows in whole blocks
    end += -end % 512
    for length in [1, 511, 512, 700, *range(1024, end + 1, 512), end - 5, end - 600]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"x\.tar.*(truncated|damaged|no tar file)"):
            shards.list_shards(path)
    path.write_bytes(content[: end + 512])
    assert len(shards.list_shards(path)) == 3


def test_two_sets_of_make_shards_with_the_same_names(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(folder, tmp_path / name)
    with pytest.raises(UserError, match=r"a cat/0.0.jpg is in the shards twice, in .*one.* and in .*two"):
        shards.list_shards(f"{tmp_path}/{{one,two}}/*.tar")


# ---------------------------------------------------------------------------------------- strangers' files


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a\nb.jpg", "a\rb.jpg", ".."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    if name.endswith(".jpg"):
        write_tar(tmp_path / "x.tar", {"1.png": jpeg(1), name: jpeg(2)})
        with pytest.raises(UserError, match=r"x\.tar: holds an image of the name") as error:
            shards.list_shards(tmp_path / "x.tar")
        assert repr(name) in str(error.value) and "\n" not in str(error.value)
    paths = json.dumps(["a.jpg", name]).encode()
    write_tar(tmp_path / "y.tar", {"0.jpg": jpeg(1), "1.jpg": jpeg(2), "__paths__": paths})
    with pytest.raises(UserError, match=r"y\.tar: holds an image of the name") as error:
        shards.list_shards(tmp_path / "y.tar")
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b'"a.jpg"',
        b'{"a.jpg": 1}',
        b"[null]",
        b'["a.jpg"',
        b"\xff\xfe",
        b'["\\ud800.jpg"]',
        b"[" * 10**5,
    ],
)
def test_paths_that_are_no_list_of_texts_are_one_line(tmp_path, content):
    write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(1), "__paths__": content})
    with pytest.raises(UserError, match=r"x\.tar: its __paths__ is no JSON list of paths") as error:
        shards.list_shards(tmp_path / "x.tar")
    assert "\n" not in str(error.value)


def test_a_class_of_many_digits_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(1), "1.cls": b"7" * 5000})
    with pytest.raises(UserError, match=r"x\.tar: the class of '1' is 5000 bytes long"):
        shards.list_shards(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(1), "1.cls": b"7" * 200, "2.jpg": jpeg(2), "2.cls": b"8"})
    assert shards.list_shards(tmp_path / "x.tar").class_names == ["8", "7" * 200]


@pytest.mark.parametrize(
    "size",
    [
        b"00000000999\0",  # not octal
        b"hello world\0",
        b"\x80" + bytes(3) + (2**63).to_bytes(8, "big"),  # GNU's binary numbers
        b"\x80" + bytes(3) + (2**62).to_bytes(8, "big"),
        b"\xff" * 12,  # -1
        b"\xff" * 4 + (-(2**40)).to_bytes(8, "big", signed=True),
        b"-0000000777\0",
        b"77777777777\0",
    ],
)
def test_a_size_that_is_none_is_one_line(tmp_path, size):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)}, format=tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    second = content.index(b"2.jpg\0")
    for header in (0, second):
        changed = bytearray(content)
        changed[header + 124 : header + 136] = size
        block = bytes(changed[header : header + 512])
        checksum = sum(block) - sum(block[148:156]) + 8 * 32
        changed[header + 148 : header + 156] = b"%06o\0 " % checksum
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"x\.tar .*(truncated|damaged|no tar file)") as error:
            shards.list_shards(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_an_image_that_is_a_link_or_a_device_is_refused(tmp_path, kind):
    def write_with(name):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            info = tarfile.TarInfo("1.jpg")
            info.size = len(jpeg(1))
            tar.addfile(info, io.BytesIO(jpeg(1)))
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "1.jpg"
            tar.addfile(link)
        return shards.list_shards(tmp_path / "x.tar")

    with pytest.raises(UserError, match=r"x\.tar: '2\.jpg' is a link, a device"):
        write_with("2.jpg")
    assert len(write_with("readme")) == 1


def test_no_header_or_list_of_paths_takes_the_memory_that_it_claims(tmp_path):
    for kind, size, message in (
        (b"x", 2**32, "a header of"),
        (b"L", 2**32, "a header of"),
        (b"0", 2**33, "bytes; write"),
    ):
        member = tarfile.TarInfo("__paths__")
        member.size, member.type = size, kind
        with open(tmp_path / "a.tar", "wb") as file:  # holes, which take no room on the disk
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate(512 + size + 1024)
        with refuses(message):
            shards.list_shards(tmp_path / "a.tar")


def test_an_image_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(data.ImageError, match="the file has 1073741825 bytes"):
        data.list_images(tmp_path).decode(0)
