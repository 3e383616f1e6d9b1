"""eval_knn.py: the whole way, on folders whose answer is known, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import eval_knn
import extract
import models
from evaluation.feature_files import open_rows
from tests.helpers import refuses

COLOURS = {"blue": (20, 40, 230), "green": (30, 220, 40), "red": (230, 30, 20)}


# ---------------------------------------------------------------------------------------- end to end


def colour_folder(root: Path, train: int = 6, val: int = 4, names: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A class a colour, with some noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-15, 16, (70, 80, 3))
                pixels = np.clip(COLOURS[name] + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def save_network(path: Path, seed: int, change=None) -> Path:
    net = models.build("tiny", num_clusters=5, seed=seed)
    if change is not None:
        change(net)
    checkpoint.save(path, {"arch": "tiny", "state_dict": net.state_dict()})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return colour_folder(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("model") / "model.pth.tar", seed=1)


@pytest.fixture
def evaluate(folder, model, tmp_path):
    """Run the evaluator; keywords change or add flags, e.g. k=[1, 3] is --k 1 3 and pixels=[] is --pixels."""

    def run(**flags):
        flags = {"data": folder, "model": model, "layers": ["conv2"], "exp": tmp_path / "exp"} | flags
        flags = {"image-size": 64, "workers": 0, "device": "cpu"} | flags
        command = []
        for name, value in flags.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return eval_knn.main(eval_knn.get_parser().parse_args(command))

    return run


def test_classes_told_by_colour_are_told_apart_in_every_network(evaluate, model, tmp_path, capsys):
    baseline = save_network(tmp_path / "baseline.pth.tar", seed=2)
    results = evaluate(baseline=baseline, layers=["conv2", "fc7.pre"], pixels=[], k=[1, 3])

    rows = [(row["network"], row["layer"]) for row in results]
    assert rows == [("pixels", "pixels")] + [
        (network, layer) for network in ("baseline", "model") for layer in ("conv2", "fc7.pre")
    ]
    for row in results:
        assert row["knn"] == {"1": 1.0, "3": 1.0}
        assert [row["nmi"], row["ami"], row["ari"], row["acc"]] == pytest.approx([1.0] * 4)

    written = json.loads((tmp_path / "exp" / "results.json").read_text())["knn"]
    assert written["results"] == results
    protocol = written["protocol"]
    assert (protocol["model"], protocol["baseline"]) == (str(model), str(baseline))
    assert (protocol["train images"], protocol["val images"], protocol["classes"]) == (18, 12, 3)
    assert "64x64" in protocol["view"] and "exp(cosine / 0.07)" in protocol["kNN"]
    assert "conv2 12x15x15" in protocol["features"] and "fc7.pre 40" in protocol["features"]

    printed = capsys.readouterr().out
    assert "kNN@1" in printed and "gain" in printed and "knn protocol: data" in printed


def test_same_seed_gives_the_same_figures(evaluate):
    assert evaluate(seed=5) == evaluate(seed=5)


def test_k_is_capped_at_the_train_images_and_says_so(evaluate, capsys):
    results = evaluate()  # 18 train images, k 10, 20, 100, 200
    assert list(results[0]["knn"]) == ["10", "18"]
    assert "--k 20 100 200: capped at the 18 images in train/" in capsys.readouterr().out


def test_files_of_extract_give_what_the_network_gives(evaluate, folder, model, tmp_path):
    rows = evaluate(layers=["fc7.pre"], k=[1, 5], **{"cluster-train": []})
    for split in ("train", "val"):
        command = f"{folder / split} --model {model} --layer fc7.pre --out {tmp_path / split} --image-size 64"
        extract.main(extract.get_parser().parse_args(f"{command} --workers 0 --device cpu".split()))
    flags = ["--features", tmp_path / "train.npy", tmp_path / "val.npy", "--device", "cpu", "--k", 1, 5]
    flags += ["--exp", tmp_path / "files", "--cluster-train"]
    (found,) = eval_knn.main(eval_knn.get_parser().parse_args(list(map(str, flags))))
    assert (found.pop("network"), found.pop("layer"), found.pop("size")) == ("file", "val", "40")
    assert found == {name: rows[0][name] for name in found}

    labels = tmp_path / "labels.csv"
    paths = [f"{s}/{c}/{i}.png" for s, n in (("train", 6), ("val", 4)) for c in COLOURS for i in range(n)]
    labels.write_text("path,label\n" + "".join(f"{path},{'rb'['blue' in path]}\n" for path in paths[1:]))
    flags += ["--labels", labels]
    (found,) = eval_knn.main(eval_knn.get_parser().parse_args(list(map(str, flags))))
    written = json.loads((tmp_path / "files" / "results.json").read_text())["knn"]["protocol"]
    assert (written["train images"], written["val images"], written["classes"]) == (17, 12, 2)
    assert found["knn"]["1"] == 1.0


HEADERS = {
    "negative": "(-1, 40)", "of 10^30": f"({10**30}, 40)", "2^63": f"({2**63}, 1)",
    "of a bool": "(True, 40)", "open": "(24, 40", "deep": "(" * 300, "list": "[24, 40]", "none": "None",
}  # fmt: skip


@pytest.mark.parametrize("shape", HEADERS)
def test_a_header_of_no_file_of_features_is_one_line(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {HEADERS[shape]}, }}\n".encode()
    (tmp_path / "x.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4000)
    )
    with refuses("x.npy: not a .npy file that can be read"):
        open_rows(str(tmp_path / "x.npy"), ["a/1", "b/2"], "train", None)


def test_an_archive_and_a_header_of_4_gib_are_no_file_of_features(tmp_path):
    np.savez(tmp_path / "x", a=np.zeros((2, 3), np.float32))
    (tmp_path / "y.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}")
    for name in ("x.npz", "y.npy"):
        with refuses(f"{name}: not a .npy file that can be read"):
            open_rows(str(tmp_path / name), ["a/1", "b/2"], "train", None)


def test_mistakes_in_files_of_features_are_named(evaluate, tmp_path):
    def judge(*flags):
        args = ["--features", tmp_path / "train.npy", tmp_path / "val.npy", "--exp", tmp_path / "exp", *flags]
        eval_knn.main(eval_knn.get_parser().parse_args(list(map(str, args))))

    def write(name, rows, *paths):
        np.save(tmp_path / f"{name}.npy", rows)
        (tmp_path / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths))

    with refuses("train.npy: not a file of extract.py"):
        judge()
    write("train", np.eye(3, dtype=np.float32), "a/1", "b/1")
    with refuses("train.npy has 3 rows, its file of names 2"):
        judge()
    write("train", np.eye(3, dtype=np.float32), "a/1", "b/1", "c/1")
    write("val", np.eye(2, dtype=np.float32), "a/2", "b/2")
    with refuses("rows of 3 numbers, .*val.npy of 2"):
        judge()
    write("val", np.eye(3, dtype=np.float32), "a/2", "b/2", "d/2")
    with refuses("class d is only in val"):
        judge()
    write("val", np.full((3, 3), np.nan, np.float32), "a/2", "b/2", "b/3")
    with refuses("val.npy: the feature of a/2 is not finite"):
        judge()
    for flag in (["--pixels"], ["--image-size", "64"], ["--data", "images"]):
        with refuses(f"{flag[0]}: not with --features"):
            judge(*flag)
    with refuses("give the network as --model PATH, or its --features"):
        judge("--model", "random:tiny")


def test_one_image_a_class_and_one_class_in_val(evaluate, tmp_path):
    single = colour_folder(tmp_path / "single", train=1, val=1)
    (row,) = evaluate(data=single, k=[1])
    assert row["knn"] == {"1": 1.0} and row["acc"] == row["purity"] == 1.0
    for name in ("blue", "red"):
        shutil.rmtree(single / "val" / name)
    (row,) = evaluate(data=single, k=[1])
    assert row["knn"] == {"1": 1.0}


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("alexnet", ["conv5", "fc7.pre"]),
        ("tiny", ["conv2", "fc7.pre"]),
        ("toy", ["b", "pooled"]),
        ("resnet18s", ["layer4", "avgpool"]),
    ],
)
def test_default_layers_are_the_last_map_and_the_clustered_feature(folder, tmp_path, arch, layers):
    flags = ["--data", str(folder), "--model", f"random:{arch}", "--exp", str(tmp_path), "--image-size", "32"]
    args = eval_knn.get_parser().parse_args([*flags, "--workers", "0", "--device", "cpu"])
    assert [row["layer"] for row in eval_knn.main(args)] == layers


def test_defaults_are_the_protocols():
    args = eval_knn.get_parser().parse_args(["--data", "images", "--model", "x.pth.tar"])
    assert (args.k, args.temperature, args.seed) == ([10, 20, 100, 200], 0.07, 31)
    assert (args.image_size, args.batch, args.clusters, args.precision) == (None, 256, None, "fp32")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": [0]}, "--k: 0: must be at least 1"),
        ({"temperature": 0}, "--temperature: 0: must be a positive number"),
        ({"temperature": "nan"}, "--temperature: nan: must be a positive number"),
        ({"clusters": 1}, "--clusters: 1: must be at least 2"),
        ({"clusters": 13}, "--clusters 13: more than the 12 images"),
        ({"image-size": 8}, "--image-size: 8: must be at least 16"),
        ({"batch": 0}, "--batch: 0: must be at least 1"),
        ({"layers": ["conv2", "conv6"]}, "tiny has no layer conv6"),
        ({"model": "nowhere.pth.tar"}, "nowhere.pth.tar: no such checkpoint file"),
        ({"baseline": "nowhere.pth.tar"}, "nowhere.pth.tar: no such checkpoint file"),
        ({"device": "abacus"}, "--device abacus: not a device"),
        ({"precision": "tf32"}, "--precision tf32: for CUDA GPUs only"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_in_one_line(evaluate, tmp_path, flags, message):
    with refuses(message):
        evaluate(**flags)
    assert not (tmp_path / "exp").exists()


def test_missing_val_and_differing_classes_are_named(evaluate, tmp_path):
    (colour_folder(tmp_path / "a", 1, 1) / "val").rename(tmp_path / "away")
    with refuses(r"val/ is missing in .*a \(expected DATA/train and DATA/val\)"):
        evaluate(data=tmp_path / "a")
    odd = colour_folder(tmp_path / "b", 1, 1)
    (odd / "val" / "red").rename(odd / "val" / "pink")
    with refuses("class folder pink is only in val/"):
        evaluate(data=odd)


def test_one_image_a_class_and_a_class_of_one_in_val_work(evaluate, folder, tmp_path):
    names = sorted(path.name for path in (folder / "train").iterdir())
    for split, count in (("train", 1), ("val", 1)):
        for name in names[: len(names) if split == "train" else 2]:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for image in sorted((folder / split / name).iterdir())[:count]:
                shutil.copy(image, tmp_path / "data" / split / name)
    (row,) = evaluate(data=tmp_path / "data", k=[1, 20])
    assert list(row["knn"]) == ["1", str(len(names))]  # 20 are not there
    assert row["knn"]["1"] == 1  # each colour's nearest is its own


def test_class_that_is_only_in_train_is_fine_and_its_votes_count(evaluate, tmp_path):
    folder = colour_folder(tmp_path / "images")
    shutil.rmtree(folder / "val" / "green")
    rows = evaluate(data=folder, k=[1, 3])
    assert rows[0]["knn"] == {"1": 1.0, "3": 1.0} and rows[0]["acc"] == 1.0  # by two clusters, not three
    # What looks like val's red carries the name of a class that val lacks.
    (folder / "train" / "red").rename(folder / "train" / "green_too")
    (folder / "train" / "green").rename(folder / "train" / "red")
    assert evaluate(data=folder, k=[3])[0]["knn"] == {"3": 0.5}


def test_undecodable_image_is_named(evaluate, tmp_path):
    bad = colour_folder(tmp_path / "images", 2, 2) / "val" / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with refuses(r"1 of 6 images .*val/green/1\.png: .*bad_images\.txt"):
        evaluate(data=tmp_path / "images")


def test_undecodable_images_are_left_out_when_asked(evaluate, tmp_path, capsys):
    folder = colour_folder(tmp_path / "images")
    for name in ("train/blue/0.png", "train/red/5.png", "val/green/1.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:300])  # the header is whole
    (folder / "val" / "red" / "0.png").write_text("no image at all")
    baseline = save_network(tmp_path / "baseline.pth.tar", seed=2)
    rows = evaluate(data=folder, pixels=[], baseline=baseline, k=[1, 18], **{"skip-bad-images": []})
    for row in rows:
        assert row["knn"]["1"] == 1.0 and list(row["knn"]) == ["1", "16"] and row["acc"] == 1.0
    assert "left out 2 of 18 images" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "exp" / "results.json").read_text())["knn"]["protocol"]
    assert (protocol["train images"], protocol["val images"]) == (16, 10)
    assert len((tmp_path / "exp" / "bad_images.txt").read_text().splitlines()) == 4


def test_diverged_network_is_named_with_the_layer_and_the_image(evaluate, tmp_path):
    def spoil(net):
        with torch.no_grad():
            next(net.body_parameters())[3] = float("nan")

    with refuses(r"conv2 of .*train/blue/0\.png is not finite"):
        evaluate(model=save_network(tmp_path / "nan.pth.tar", 1, spoil))


def test_unwritable_exp_is_refused_before_any_work(evaluate, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(eval_knn, "extract", lambda *_: pytest.fail("worked before it looked at --exp"))
    with refuses("cannot make the folder"):
        evaluate(exp=tmp_path / "file" / "exp")


def test_command_line_ends_with_one_line_and_code_2(tmp_path):
    script = Path(eval_knn.__file__)
    command = [
        sys.executable,
        script,
        "--data",
        tmp_path,
        "--model",
        tmp_path / "x.pth.tar",
        "--device",
        "cpu",
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"eval_knn.py: train/ is missing in {tmp_path} (expected DATA/train and DATA/val)"
    )
