"""kNN and clustering figures: against brute force and scikit-learn, on folders whose answer is known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

import checkpoint
import clustering
import data
import eval_knn
import models
from features import eval_forward
from util import Log, UserError

CPU = torch.device("cpu")
COLOURS = {"blue": (20, 40, 230), "green": (30, 220, 40), "red": (230, 30, 20)}


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    return clustering.normalise_rows(np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32))


# ---------------------------------------------------------------------------------------- neighbours


def brute_force_knn(train, train_classes, val, k, temperature, num_classes):
    """Image by image, class by class, in float64."""
    predicted = []
    for row in val.astype(np.float64):
        cosines = [float(row @ other) for other in train.astype(np.float64)]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        sums = [0.0] * num_classes
        for i in nearest:
            sums[train_classes[i]] += np.exp(cosines[i] / temperature)
        predicted.append(int(np.argmax(sums)))
    return np.array(predicted)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_weighted_knn_equals_brute_force(temperature):
    train, val = unit_rows(60, 12, 1), unit_rows(30, 12, 2)
    rng = np.random.default_rng(3)
    train_classes, val_classes = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    all_cosines = np.sort(val.astype(np.float64) @ train.T.astype(np.float64), axis=1)
    assert np.diff(all_cosines, axis=1).min() > 1e-6  # no ties: the answer is one

    cosines, neighbours = eval_knn.nearest(val, train, 40, CPU)
    for k in (1, 10, 40):
        expected = brute_force_knn(train, train_classes, val, k, temperature, 4)
        votes = eval_knn.vote(cosines[:, :k], train_classes[neighbours][:, :k], 4, temperature)
        np.testing.assert_array_equal(votes, expected)
        accuracy = eval_knn.knn_accuracies(cosines, neighbours, train_classes, val_classes, [k], temperature)
        assert accuracy == {str(k): np.mean(expected == val_classes)}


def test_nearest_gives_cosines_largest_first():
    train, val = unit_rows(40, 6, 4), unit_rows(9, 6, 5)
    cosines, neighbours = eval_knn.nearest(val, train, 7, CPU)
    everything = val @ train.T
    np.testing.assert_array_equal(neighbours, np.argsort(-everything, axis=1)[:, :7])
    np.testing.assert_allclose(cosines, -np.sort(-everything, axis=1)[:, :7], atol=1e-6)


def test_temperature_decides_between_one_near_and_two_far_neighbours():
    cosines, classes = np.array([[0.9, 0.8, 0.8]], np.float32), np.array([[0, 1, 1]])
    # exp(0.1 / T) against 2: the near one wins below T = 0.1 / log 2 = 0.144
    assert eval_knn.vote(cosines, classes, 2, 0.14).tolist() == [0]
    assert eval_knn.vote(cosines, classes, 2, 0.15).tolist() == [1]


def test_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow():
    cosines, classes = np.array([[0.9, 0.89, 0.89]], np.float32), np.array([[2, 1, 1]])
    with np.errstate(over="raise", invalid="raise"):
        assert eval_knn.vote(cosines, classes, 3, 1e-5).tolist() == [2]


def test_votes_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
    cosines, neighbours = eval_knn.nearest(unit_rows(50, 5, 6), unit_rows(80, 5, 7), 20, CPU)
    classes = np.random.default_rng(8).integers(0, 5, 80)[neighbours]
    whole = eval_knn.vote(cosines, classes, 5, 0.07)
    monkeypatch.setattr(eval_knn, "VOTE_ROWS", 7)
    np.testing.assert_array_equal(eval_knn.vote(cosines, classes, 5, 0.07), whole)


# ---------------------------------------------------------------------------------------- clustering


def test_hungarian_accuracy_of_a_permutation_is_one():
    classes = np.array([0, 0, 1, 1, 2, 2, 2])
    assert eval_knn.hungarian_accuracy(np.array([2, 1, 0])[classes], classes) == 1.0


def test_hungarian_accuracy_worked_out_by_hand():
    classes = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    # Cluster 0 holds classes 0 0 1, cluster 1 holds 0 1 1 2, cluster 2 holds 2: 2 + 2 + 1 of 8.
    assert eval_knn.hungarian_accuracy(np.array([0, 0, 1, 1, 1, 0, 1, 2]), classes) == 5 / 8
    # Both clusters prefer class 0 (3 + 2 by majority), but only one may have it: 3 + 1, not 3 + 2.
    classes, labels = np.array([0, 0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    assert eval_knn.hungarian_accuracy(labels, classes) == 4 / 6


def test_hungarian_accuracy_leaves_surplus_clusters_without_a_class():
    assert eval_knn.hungarian_accuracy(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])) == 2 / 4


def test_cluster_figures_equal_scikit_learns(monkeypatch):
    x = unit_rows(120, 8, 9)
    classes = np.random.default_rng(10).integers(0, 4, 120)
    x[np.arange(120), classes] += 0.7  # some structure, so that no figure is near 0 or 1
    used = []
    kmeans = clustering.kmeans
    monkeypatch.setattr(
        clustering, "kmeans", lambda *args, **kw: used.append(kmeans(*args, **kw)) or used[-1]
    )
    figures = eval_knn.cluster_figures(x, classes, 4, seed=31, device=CPU)

    assert len({assignment.objective for assignment in used}) > 1  # starts differ
    labels = min(used, key=lambda assignment: assignment.objective).labels
    assert 0.1 < figures["ari"] < 0.9
    assert figures == pytest.approx(
        {
            "nmi": normalized_mutual_info_score(classes, labels, average_method="geometric"),
            "ami": adjusted_mutual_info_score(classes, labels),
            "ari": adjusted_rand_score(classes, labels),
            "acc": eval_knn.hungarian_accuracy(labels, classes),
        },
        abs=1e-9,
    )


# ---------------------------------------------------------------------------------------- features


def test_small_maps_stay_flat_and_large_ones_are_averaged():
    small = torch.randn(2, 10, 4, 4)
    values, size = eval_knn.flatten(small)
    assert torch.equal(values, small.reshape(2, 160)) and size == "10x4x4"

    large = torch.randn(2, 96, 55, 55)  # AlexNet's conv 1 at 224 pixels
    values, size = eval_knn.flatten(large)
    assert values.shape == (2, 96 * 10 * 10) and size == "96x55x55 averaged to 96x10x10"
    assert torch.allclose(values.view(2, 96, 10, 10)[1, 7, 0, 0], large[1, 7, :6, :6].mean(), atol=1e-6)


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
    net = models.build("alexnet", sobel=False, num_clusters=5, seed=seed)
    if change is not None:
        change(net)
    checkpoint.save(path, {"arch": "alexnet", "state_dict": net.state_dict()})
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
        flags = {"data": folder, "model": model, "layers": ["conv5"], "exp": tmp_path / "exp"} | flags
        flags = {"image-size": 64, "workers": 0, "device": "cpu"} | flags
        command = []
        for name, value in flags.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return eval_knn.main(eval_knn.get_parser().parse_args(command))

    return run


def test_classes_told_by_colour_are_told_apart_in_every_network(evaluate, model, tmp_path, capsys):
    baseline = save_network(tmp_path / "baseline.pth.tar", seed=2)
    results = evaluate(baseline=baseline, layers=["conv5", "fc7.pre"], pixels=[], k=[1, 3])

    rows = [(row["network"], row["layer"]) for row in results]
    assert rows == [("pixels", "pixels")] + [
        (network, layer) for network in ("baseline", "model") for layer in ("conv5", "fc7.pre")
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
    assert "conv5 256x3x3" in protocol["features"] and "fc7.pre 4096" in protocol["features"]

    printed = capsys.readouterr().out
    assert "kNN@1" in printed and "gain" in printed and "knn protocol: data" in printed


def test_features_are_the_networks_activations_in_data_set_order(folder, model):
    images = data.list_images(folder / "val")
    net = checkpoint.load_model(model)
    forward = eval_forward(net, ["conv3", "fc7.pre"])
    loader = eval_knn.central_views(images, 64, batch=5, workers=0, device=CPU)
    found = eval_knn.extract(forward, images, loader, CPU, "fp32", "val", Log(quiet=True))
    assert list(found) == ["conv3", "fc7.pre"]

    view = data.CentralView(images, 64)
    with torch.no_grad():
        for i in (0, 4, 5, 11):
            expected = net.activations(data.normalise(view[i][0])[None], ["conv3", "fc7.pre"])
            for layer, (rows, _) in found.items():
                row = expected[layer].flatten()
                np.testing.assert_allclose(rows[i], (row / row.norm()).numpy(), atol=1e-5)


def test_same_seed_gives_the_same_figures(evaluate):
    assert evaluate(seed=5) == evaluate(seed=5)


def test_k_is_capped_at_the_train_images_and_says_so(evaluate, capsys):
    results = evaluate()  # 18 train images, k 10, 20, 100, 200
    assert list(results[0]["knn"]) == ["10", "18"]
    assert "--k 20 100 200: capped at the 18 images in train/" in capsys.readouterr().out


def test_default_layers_are_the_last_convolution_and_the_clustered_feature(folder, model, tmp_path):
    flags = ["--data", str(folder), "--model", str(model), "--exp", str(tmp_path), "--image-size", "64"]
    args = eval_knn.get_parser().parse_args([*flags, "--workers", "0", "--device", "cpu"])
    assert [row["layer"] for row in eval_knn.main(args)] == ["conv5", "fc7.pre"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": [0]}, "--k 0: must be at least 1"),
        ({"temperature": 0}, "--temperature 0.0: must be a positive number"),
        ({"temperature": "nan"}, "--temperature nan: must be a positive number"),
        ({"clusters": 1}, "--clusters 1: must be at least 2"),
        ({"clusters": 13}, "--clusters 13: more than the 12 images"),
        ({"image-size": 8}, "--image-size 8: must be at least 16"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"layers": ["conv5", "conv6"]}, "alexnet has no layer conv6"),
        ({"model": "nowhere.pth.tar"}, "nowhere.pth.tar: no such checkpoint file"),
        ({"baseline": "nowhere.pth.tar"}, "nowhere.pth.tar: no such checkpoint file"),
        ({"device": "abacus"}, "--device abacus: not a device"),
        ({"precision": "tf32"}, "--precision tf32: for CUDA GPUs only"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_in_one_line(evaluate, tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        evaluate(**flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "exp" / "results.json").exists()


def test_missing_val_and_differing_classes_are_named(evaluate, tmp_path):
    (colour_folder(tmp_path / "a", 1, 1) / "val").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"val/ is missing in .*a \(expected DATA/train and DATA/val\)"):
        evaluate(data=tmp_path / "a")
    odd = colour_folder(tmp_path / "b", 1, 1)
    (odd / "val" / "red").rename(odd / "val" / "pink")
    with pytest.raises(UserError, match="class folder pink is only in val/"):
        evaluate(data=odd)


def test_undecodable_image_is_named(evaluate, tmp_path):
    bad = colour_folder(tmp_path / "images", 2, 2) / "val" / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(UserError, match=r"val/green/1\.png: "):
        evaluate(data=tmp_path / "images")


def test_diverged_network_is_named_with_the_layer_and_the_image(evaluate, tmp_path):
    def spoil(net):
        with torch.no_grad():
            net.features[0].bias[3] = float("nan")

    with pytest.raises(UserError, match=r"conv5 of .*train/blue/0\.png is not finite"):
        evaluate(model=save_network(tmp_path / "nan.pth.tar", 1, spoil))


def test_unwritable_exp_is_refused_before_any_work(evaluate, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(eval_knn, "extract", lambda *_: pytest.fail("worked before it looked at --exp"))
    with pytest.raises(UserError, match="cannot make the folder"):
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
