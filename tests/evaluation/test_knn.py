"""evaluation/knn.py: votes against brute force, clusters against scikit-learn, features one by one."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

import clustering
import data
import models
from algorithms.agreement import hungarian_accuracy
from algorithms.pca import normalise_rows
from evaluation import knn
from features import Pass
from tests.helpers import refuses
from util import Progress

CPU = torch.device("cpu")


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    return normalise_rows(np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32))


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

    cosines, neighbours = knn.nearest(val, train, 40, CPU)
    for k in (1, 10, 40):
        expected = brute_force_knn(train, train_classes, val, k, temperature, 4)
        votes = knn.vote(cosines[:, :k], train_classes[neighbours][:, :k], 4, temperature)
        np.testing.assert_array_equal(votes, expected)
        accuracy = knn.knn_accuracies(cosines, neighbours, train_classes, val_classes, [k], temperature)
        assert accuracy == {str(k): np.mean(expected == val_classes)}


def test_nearest_gives_cosines_largest_first():
    train, val = unit_rows(40, 6, 4), unit_rows(9, 6, 5)
    cosines, neighbours = knn.nearest(val, train, 7, CPU)
    everything = val @ train.T
    np.testing.assert_array_equal(neighbours, np.argsort(-everything, axis=1)[:, :7])
    np.testing.assert_allclose(cosines, -np.sort(-everything, axis=1)[:, :7], atol=1e-6)


class Watched:
    """Points that note which rows are taken."""

    def __init__(self, rows):
        self.rows, self.taken, self.shape = rows, [], rows.shape

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        self.taken.append(range(*part.indices(len(self.rows))))
        return self.rows[part]


def test_train_streams_by_once_and_gives_what_the_whole_gives(monkeypatch, tmp_path):
    train, val = unit_rows(103, 6, 11), unit_rows(17, 6, 12)
    whole = knn.nearest(val, train, 30, CPU)
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 6 * 10)  # 10 rows, fewer than the neighbours
    monkeypatch.setattr(knn, "PRODUCTS", 50)
    watched = Watched(train)
    np.testing.assert_array_equal(knn.nearest(val, watched, 30, CPU)[1], whole[1])
    assert [i for part in watched.taken for i in part] == list(range(103))
    assert max(map(len, watched.taken)) == 10
    assert knn.nearest(val, train, 103, CPU)[1].shape == (17, 103)  # all of them

    np.save(tmp_path / "train.npy", train.astype(np.float16))
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    half = np.asarray(mapped, np.float32)
    cosines, rows = knn.nearest(val, mapped, 30, CPU)
    np.testing.assert_array_equal(rows, np.argsort(-(val @ half.T), axis=1)[:, :30])
    assert cosines.dtype == np.float32


def test_of_equal_cosines_the_row_of_the_earlier_chunk_comes_first(monkeypatch):
    train = np.repeat(unit_rows(1, 8, 13), 40, axis=0)
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 8)  # a row a chunk
    assert knn.nearest(train[:2], train, 5, CPU)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_temperature_decides_between_one_near_and_two_far_neighbours():
    cosines, classes = np.array([[0.9, 0.8, 0.8]], np.float32), np.array([[0, 1, 1]])
    # exp(0.1 / T) against 2: the near one wins below T = 0.1 / log 2 = 0.144
    assert knn.vote(cosines, classes, 2, 0.14).tolist() == [0]
    assert knn.vote(cosines, classes, 2, 0.15).tolist() == [1]


def test_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow():
    cosines, classes = np.array([[0.9, 0.89, 0.89]], np.float32), np.array([[2, 1, 1]])
    with np.errstate(over="raise", invalid="raise"):
        assert knn.vote(cosines, classes, 3, 1e-5).tolist() == [2]


def test_votes_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
    cosines, neighbours = knn.nearest(unit_rows(50, 5, 6), unit_rows(80, 5, 7), 20, CPU)
    classes = np.random.default_rng(8).integers(0, 5, 80)[neighbours]
    whole = knn.vote(cosines, classes, 5, 0.07)
    monkeypatch.setattr(knn, "VOTE_ROWS", 7)
    np.testing.assert_array_equal(knn.vote(cosines, classes, 5, 0.07), whole)


# ---------------------------------------------------------------------------------------- clusters


def test_cluster_figures_equal_scikit_learns(monkeypatch):
    x = unit_rows(120, 8, 9)
    classes = np.random.default_rng(10).integers(0, 4, 120)
    x[np.arange(120), classes] += 0.7  # some structure, so that no figure is near 0 or 1
    used = []
    kmeans = clustering.kmeans
    monkeypatch.setattr(
        clustering, "kmeans", lambda *args, **kw: used.append(kmeans(*args, **kw)) or used[-1]
    )
    figures = knn.cluster_figures(x, classes, 4, seed=31, device=CPU)

    assert len({assignment.objective for assignment in used}) > 1  # starts differ
    labels = min(used, key=lambda assignment: assignment.objective).labels
    assert 0.1 < figures["ari"] < 0.9
    assert figures == pytest.approx(
        {
            "nmi": normalized_mutual_info_score(classes, labels, average_method="geometric"),
            "nmi_arithmetic": normalized_mutual_info_score(classes, labels),
            "ami": adjusted_mutual_info_score(classes, labels),
            "ari": adjusted_rand_score(classes, labels),
            "acc": hungarian_accuracy(labels, classes),
            "purity": sum(np.bincount(classes[labels == c]).max() for c in range(4)) / 120,
        },
        abs=1e-9,
    )


def test_clusters_of_train_stand_for_its_classes_on_val():
    """Two classes in four far-apart heaps; val holds one heap of each, one of its images in the other's."""
    heaps = np.eye(6, dtype=np.float32)[:4]
    train, train_classes = np.repeat(heaps, 10, axis=0), np.repeat([0, 0, 1, 1], 10)
    val, val_classes = heaps[[0, 0, 2, 2, 2]], np.array([0, 1, 1, 1, 1])
    found = knn.train_cluster_figures(train, train_classes, val, val_classes, 4, 31, CPU, draws=20)
    assert found["train"]["purity"] == 1 and found["train"]["acc"] == 0.5
    assert found["val"]["many_to_one"] == 0.8 and "many_to_one" not in found["train"]
    low, high = found["val"]["intervals"]["many_to_one"]
    assert low < 0.8 < high


# ---------------------------------------------------------------------------------------- features


def test_small_maps_stay_flat_and_large_ones_are_averaged():
    small = torch.randn(2, 10, 4, 4)
    values, size = knn.flatten(small)
    assert torch.equal(values, small.reshape(2, 160)) and size == "10x4x4"

    large = torch.randn(2, 96, 55, 55)  # AlexNet's conv 1 at 224 pixels
    values, size = knn.flatten(large)
    assert values.shape == (2, 96 * 10 * 10) and size == "96x55x55 averaged to 96x10x10"
    assert torch.allclose(values.view(2, 96, 10, 10)[1, 7, 0, 0], large[1, 7, :6, :6].mean(), atol=1e-6)


def features_of(images: data.ImageList, net: models.Network, layers: list[str], batch: int = 5):
    view = data.PlainView(images, data.central_crop(32))
    return knn.unit_features(net, layers, view, Pass(batch, 0, CPU), Progress(len(view), "val"))


@pytest.mark.parametrize("arch", ["tiny", "resnet18s", "toy"])
def test_features_are_the_networks_activations_in_data_set_order(photos, arch):
    images = data.list_images(photos)
    net = models.build(arch, seed=1).eval()
    layers = [net.maps[0], net.feature]
    features, broken = features_of(images, net, layers)
    assert list(features) == layers and broken == []

    view = data.PlainView(images, data.central_crop(32))
    with torch.no_grad():
        for i in (0, 4, 5, 11):
            expected = net.activations(data.normalise(view[i][0])[None], layers)
            for layer, (rows, _) in features.items():
                assert len(rows) == len(images)
                row = knn.flatten(expected[layer])[0][0]
                np.testing.assert_allclose(rows[i], (row / row.norm()).numpy(), atol=1e-5)


def test_broken_images_have_no_row_and_the_others_keep_theirs(photos, tmp_path):
    paths = [str(photos.resolve() / path) for path in data.list_images(photos).paths[:12]]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    net = models.build("tiny", seed=1)
    whole, _ = features_of(data.ImageList(tmp_path, paths), net, ["fc7.pre"])
    for at in (0, 6, 12):
        some = [*paths[:at], "broken.jpg", *paths[at:]]
        features, broken = features_of(data.ImageList(tmp_path, some), net, ["fc7.pre"])
        assert broken == [at]
        np.testing.assert_allclose(features["fc7.pre"][0], whole["fc7.pre"][0], atol=1e-6)
    with refuses("none of its 2 images can be decoded"):
        features_of(data.ImageList(tmp_path, ["broken.jpg"] * 2), net, ["fc7.pre"])
