"""extract.py: the right rows, in every form, in constant memory."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import checkpoint
import clustering
import data
import extract
from evaluation import store
from features import Settings, ToPoints
from formats import released, rows
from formats.rows import read_names
from models import weights
from tests import golden, small_run
from tests.extract_runs import close, plain, run, work  # noqa: F401
from tests.helpers import ROOT, refuses
from tests.small_run import SIZE
from tools import make_shards
from util import UserError

# ---------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("layer", ["conv1.pre", "conv2", "pool", "fc6", "fc7.pre", "fc7", "logits"])
def test_rows_are_the_layer_flattened_in_the_order_of_the_names(work, tmp_path, layer):
    path = run(work, tmp_path / layer, "--layer", layer)  # no ending is taken off `conv1.pre`
    assert path == tmp_path / f"{layer}.npy"
    expected = plain(work, layer).reshape(48, -1)
    rows = np.load(path)
    assert rows.dtype == np.float32 and close(rows, expected)
    assert read_names(tmp_path / f"{layer}.txt") == list(data.list_images(work / "images").paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{layer}.npy", f"{layer}.txt"]


def test_maps_are_averaged_to_the_asked_size(work, tmp_path):
    maps = plain(work, "conv1")  # (48, 8, 16, 16)
    rows = np.load(run(work, tmp_path / "a.npy", "--layer", "conv1", "--pool", 2))
    assert close(rows, maps.reshape(48, 8, 2, 8, 2, 8).mean((3, 5)).reshape(48, -1))


def test_size_and_batch_are_the_runs_unless_given(work, tmp_path):
    assert close(np.load(run(work, tmp_path / "a", "--image-size", 48)), plain(work, "fc7.pre", size=48))
    state = checkpoint.read(work / "exp" / "checkpoint.pth.tar")
    del state["args"]  # as the authors' files
    checkpoint.save(tmp_path / "bare.pth.tar", state)
    settings = Settings.choose({}, torch.device("cpu"))
    assert (settings.image_size, settings.batch, settings.precision) == (224, 256, "fp32")
    rows = np.load(run(tmp_path, tmp_path / "b", model="bare.pth.tar", images=work / "images"))
    assert close(rows, plain(work, "fc7.pre", size=224))


def test_whitened_rows_are_the_points_of_the_run(work, tmp_path):
    state = checkpoint.read(work / "exp" / "clustering.pth.tar")
    features = plain(work, "fc7.pre", "exp/clustering.pth.tar")
    pca = state["transform"]["pca"]
    points = (features - pca["mean"].numpy()) @ pca["matrix"].numpy()
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = np.load(run(work, tmp_path / "a", "--run", work / "exp", "--whitened", model=None))
    assert np.abs(rows - points).max() < 1e-3
    stored = clustering.Assignment.from_state_dict(state["assignment"])
    distances = np.square(rows - stored.centroids[stored.labels]).sum(1)
    assert np.allclose(distances, stored.distances, atol=1e-4)
    same = np.load(run(work, tmp_path / "b", "--whitened", model="exp/clustering.pth.tar"))
    assert np.array_equal(rows, same)


@pytest.mark.parametrize("spec", ["random:toy", "random:resnet18s:sobel"])
def test_any_network_gives_what_it_is_clustered_by_unless_asked(work, tmp_path, spec):
    net = weights.load(spec).double()
    view = data.PlainView(data.list_images(work / "images"), data.central_crop(SIZE))
    flags = ["--model", spec, "--image-size", SIZE, "--batch", 16]
    for layer in (net.feature, net.maps[-1]):
        asked = [] if layer == net.feature else ["--layer", layer]
        found = np.load(run(work, tmp_path / layer, *flags, *asked, model=None))
        with torch.no_grad():
            x = data.normalise(torch.stack([view[i][0] for i in range(48)])).double()
            expected = net.activations(x, [layer])[layer].flatten(1).numpy()
        assert close(found, expected)


@pytest.mark.parametrize("exp", ["kmeans", "pic"])
def test_points_of_a_run_of_the_first_version_are_those_that_it_clustered(tmp_path, exp):
    golden.write_crops(tmp_path / "images", small_run.PICTURES)
    stored = ROOT / "tests" / "files" / "v1" / exp
    found = np.load(run(tmp_path, tmp_path / "a", "--run", stored, "--whitened", model=None))
    state = checkpoint.read(stored / "clustering.pth.tar")
    was = clustering.Assignment.from_state_dict(state["assignment"])
    assert np.allclose(np.square(found - was.centroids[was.labels]).sum(1), was.distances, atol=1e-3)
    assert exp != "pic" or np.allclose(found, state["points"].numpy(), atol=1e-3)


def test_points_of_a_method_without_pca_are_its_features(work, tmp_path):
    state = checkpoint.read(work / "exp" / "clustering.pth.tar")
    state |= {"layer": "conv2", "transform": ToPoints(None, l2=False).state_dict()}
    centroids = torch.zeros(len(state["assignment"]["centroids"]), 12 * 7 * 7)
    state["assignment"] = state["assignment"] | {"centroids": centroids}
    checkpoint.save(tmp_path / "clustering.pth.tar", state)
    found = np.load(run(work, tmp_path / "a", "--run", tmp_path, "--whitened", model=None))
    flat = np.load(run(work, tmp_path / "b", "--layer", "conv2", model="exp/clustering.pth.tar"))
    assert np.array_equal(found, flat)


# ---------------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_holds_the_same_rows(work, tmp_path, dtype, monkeypatch):
    expected = np.load(run(work, tmp_path / "a", "--dtype", dtype, "--layer", "conv2"))
    assert expected.dtype == dtype
    monkeypatch.setattr(rows, "GROUP_BYTES", 10 * expected[0].nbytes)
    path = run(work, tmp_path / "a", "--dtype", dtype, "--layer", "conv2", "--format", "parquet")
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [10, 10, 10, 10, 8]
    table = file.read()
    assert table.column("path").to_pylist() == read_names(tmp_path / "a.txt")
    assert pyarrow.types.is_fixed_size_list(table.schema.field("feature").type)
    values = table.column("feature").combine_chunks().flatten().to_numpy().reshape(48, -1)
    assert values.dtype == dtype and np.array_equal(values, expected)
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (about["layer"], about["image_size"], about["shape"]) == ("conv2", "32", "12x7x7")
    assert about["model"].endswith("exp/checkpoint.pth.tar")


def test_the_pickle_is_of_the_authors_form(work, tmp_path):
    rows = np.load(run(work, tmp_path / "a"))
    names, found = released.read_features(run(work, tmp_path / "a.pkl", "--format", "pickle"))
    assert np.array_equal(found, rows) and names == read_names(tmp_path / "a.txt")


def test_odd_names_come_back(work, tmp_path):
    image = next((work / "images").rglob("*.jpg"))
    names = [
        "a\nb.jpg",
        "a\\nb.jpg",
        "back\\\\slash\\.jpg",
        "c\r.jpg",
        "\u2028é.jpg",
        os.fsdecode(b"\xff\xfe.jpg"),
    ]
    for name in names:
        shutil.copy(image, tmp_path / name)
    (tmp_path / "out").mkdir()
    run(work, tmp_path / "out" / "a", images=tmp_path)
    assert sorted(read_names(tmp_path / "out" / "a.txt")) == sorted(names)
    assert (tmp_path / "out" / "a.txt").read_bytes().count(b"\n") == len(names)
    table = pyarrow.parquet.read_table(
        run(work, tmp_path / "out" / "a", "--format", "parquet", images=tmp_path)
    )
    assert "\\xff\\xfe.jpg" in table.column("path").to_pylist() and table.num_rows == len(names)
    pickled, _ = released.read_features(
        run(work, tmp_path / "out" / "a", "--format", "pickle", images=tmp_path)
    )
    assert len(pickled) == len(names) and set(names[:5]) < set(pickled)


def test_shards_give_the_rows_of_the_folder(work, tmp_path):
    arguments = [str(work / "images"), str(tmp_path / "s-%02d.tar"), "--size-mb", "0.05"]
    make_shards.main(make_shards.get_parser().parse_args(arguments))
    rows = np.load(run(work, tmp_path / "a"))
    flags = ["--shards", str(tmp_path / "s-*.tar"), "--workers", "0", "--device", "cpu"]
    flags += ["--model", str(work / "exp" / "checkpoint.pth.tar"), "--out", str(tmp_path / "b")]
    assert np.array_equal(np.load(extract.main(extract.get_parser().parse_args(flags))), rows)


# ---------------------------------------------------------------------------------------- memory and mistakes


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", ["npy", "parquet", "pickle"])
def test_memory_does_not_grow_with_the_number_of_images(work, tmp_path, monkeypatch, form):
    Image.new("RGB", (36, 36), "red").save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n" * 6000)  # 6000 rows of 8 KB: 49 MB
    sizes = []
    append = store.Store.append

    def measuring(*arguments):
        append(*arguments)
        sizes.append(resident_bytes())

    monkeypatch.setattr(store.Store, "append", measuring)
    monkeypatch.setattr(rows, "GROUP_BYTES", 2**20)
    flags = ["--format", form, "--layer", "conv1", "--batch", 100]
    (tmp_path / "short.txt").write_text("a.png\n" * 600)  # first, for libraries take memory themselves
    run(work, tmp_path / "out", *flags, images=tmp_path / "short.txt")
    sizes.clear()
    path = run(work, tmp_path / "out", *flags, images=tmp_path / "list.txt")
    assert path.stat().st_size > 45e6 or form == "parquet"  # equal rows are compressed
    assert len(sizes) == 60 and max(*sizes, resident_bytes()) - sizes[4] < 20e6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "conv9"], "has no layer conv9"),
        (["--pool", "2"], "fc7.pre is a vector of 40"),
        (["--layer", "conv2", "--pool", "99"], "only 7 x 7"),
        (["--pool", "0"], "at least 1"),
        (["--whitened"], "holds no clustering that fits its weights"),
        (["--whitened", "--pool", "2"], "no maps"),
        (["--format", "pickle", "--dtype", "float16"], "float32"),
        (["--batch", "0"], "--batch: 0: must be at least 1"),
        (["--run", "exp"], "one of them"),
        (["--shards", "a.tar"], "one of them"),
        (["--precision", "tf32"], "CUDA"),
    ],
)
def test_mistakes_are_told_before_any_work(work, tmp_path, flags, message):
    with refuses(message):
        run(work, tmp_path / "a", *flags)
    assert not list(tmp_path.iterdir())


def test_another_layer_than_the_clustered_one_has_no_points(work, tmp_path):
    with refuses("the run clustered fc7.pre, not --layer fc7"):
        run(work, tmp_path / "a", "--whitened", "--layer", "fc7", model="exp/clustering.pth.tar")


def test_values_that_float16_cannot_hold_are_refused(work, tmp_path, monkeypatch):
    batches = extract.activation_batches

    def huge(*arguments):
        for found, index, broken in batches(*arguments):
            yield {"fc7.pre": torch.full_like(found["fc7.pre"], 7e4)}, index, broken

    monkeypatch.setattr(extract, "activation_batches", huge)
    with pytest.raises(UserError, match="not finite; float16 ends at 65504"):
        run(work, tmp_path / "a", "--dtype", "float16")
    assert np.load(run(work, tmp_path / "b")).max() == np.float32(7e4)


def test_a_full_disk_is_told_before_any_work(work, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 5000))
    with pytest.raises(UserError, match="still to be written"):
        run(work, tmp_path / "a")


@pytest.mark.parametrize(
    ("out", "form"),
    [(".", "npy"), ("..", "npy"), ("x/.npy", "npy"), (".npy", "npy"), ("x/", "parquet"), ("", "pickle")],
)
def test_an_out_that_names_no_file_is_refused(work, tmp_path, monkeypatch, out, form):
    monkeypatch.chdir(tmp_path)
    with refuses("names no file"):
        run(work, out, "--format", form)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_told_before_any_work(work, tmp_path):
    (tmp_path / "a.txt").mkdir()
    with refuses(r"a\.txt is a folder"):
        run(work, tmp_path / "a")
    run(work, tmp_path / "a", "--format", "parquet")


def test_what_is_read_is_not_overwritten(work, tmp_path):
    image = next((work / "images").rglob("*.jpg"))
    odd = shutil.copy(image, tmp_path / "odd.npy")  # an image by its content
    for name in ("a.txt", "b.bad_images.txt", "c.npy.journal"):
        (tmp_path / name).write_text(f"{image}\n{odd}\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    shutil.copy(work / "exp" / "checkpoint.pth.tar", tmp_path / "net.pkl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, images, form in (
        ("a", "a.txt", "npy"),
        ("a", "link.txt", "npy"),
        ("b", "b.bad_images.txt", "npy"),
        ("c", "c.npy.journal", "parquet"),
        ("odd", "a.txt", "npy"),
        ("net", "a.txt", "pickle"),
    ):
        with refuses("would be overwritten, but is read"):
            run(work, tmp_path / out, "--format", form, model=tmp_path / "net.pkl", images=tmp_path / images)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    path = run(
        work, tmp_path / "a", "--format", "parquet", model=tmp_path / "net.pkl", images=tmp_path / "a.txt"
    )
    assert len(pyarrow.parquet.read_table(path)) == 2  # which has no a.txt beside it
