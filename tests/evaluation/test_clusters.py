"""evaluation/clusters.py: whose word counts for an image, and which image of the run it is."""

import os
from pathlib import Path

import numpy as np
import torch

import clustering
import data
import features
from evaluation.clusters import Clusters, numbered, squared_distances
from features import ToPoints


def two_clusters(points=None, labels=(1, 0, 0)):
    """Centroids at 10 and 80 degrees; the run put image 0, halfway between them, into cluster 1."""
    angles = np.radians([45, 10, 12])
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    turned = np.radians([10, 80])
    centroids = np.stack([np.cos(turned), np.sin(turned)], 1).astype(np.float32)
    labels = np.array(labels)
    distances = squared_distances(x, centroids[labels]).astype(np.float32)
    stored = clustering.Assignment(labels, 2, 0.0, distances, centroids)
    pca = clustering.PCAWhitening(np.zeros(2), np.eye(2))
    return x, Clusters(ToPoints(pca), stored, points, {}, None, 2e-6, torch.device("cpu"))


def at(degrees):
    return np.array([[np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]], np.float32)


def test_a_near_tie_is_decided_by_the_run_for_its_own_images_only():
    _, clusters = two_clusters()
    tolerance = np.array([1e-3])
    nearer_to_0 = at(44.99)  # by 4e-4 of squared distance, which is noise
    assert clusters.assign(nearer_to_0, tolerance, np.array([-1]))[0] == [0]
    labels, distances = clusters.assign(nearer_to_0, tolerance, np.array([0]))
    assert labels == [1] and distances[0] == clusters.stored.distances[0]
    assert clusters.assign(at(44), tolerance, np.array([0]))[0] == [0]  # by 0.04, which is not
    labels, distances = clusters.assign(at(10), tolerance, np.array([0]))
    assert labels == [0] and distances[0] < 1e-6


def test_a_tie_of_another_picture_is_not_the_runs():
    """A picture as far from both centroids as before it was near to its own is another picture."""
    _, clusters = two_clusters(labels=(1, 0, 1))
    clusters.stored.distances[0] = 0.1
    labels, distances = clusters.assign(at(44.99), np.array([1e-3]), np.array([0]))
    assert labels == [0] and abs(distances[0] - squared_distances(at(44.99), at(10))[0]) < 1e-6


def test_equal_images_in_two_clusters_of_pic_keep_theirs():
    x = np.concatenate([at(45), at(45), at(80)])
    _, clusters = two_clusters(points=x, labels=(1, 0, 0))
    labels, _ = clusters.assign(x, np.full(3, 1e-3), np.arange(3))
    assert labels.tolist() == [1, 0, 0]
    changed, _ = clusters.assign(at(80), np.array([1e-3]), np.array([0]))
    assert changed == [0]


def test_the_tolerance_covers_noise_of_the_features(finished):
    """Distances of features with noise of the assumed size stay within it, in the worst of 20 draws."""
    state = features.read_clustering(finished)[1]
    clusters = Clusters.from_state(state, "fp16", torch.device("cpu"))
    assert clusters.noise == 1e-3
    mean = state["transform"]["pca"]["mean"]
    rows = (torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * 0.01 + mean).float()
    x, tolerance = clusters.place(rows)
    centroids = clusters.stored.centroids
    before = np.stack([squared_distances(x, c) for c in centroids], 1)
    for seed in range(20):
        noise = torch.randn(48, 40, generator=torch.Generator().manual_seed(seed))
        rms = rows.square().mean(1, keepdim=True).sqrt()
        y, _ = clusters.place(rows + 1e-3 * rms * noise)
        after = np.stack([squared_distances(y, c) for c in centroids], 1)
        assert (np.abs(after - before).max(1) < tolerance).all()
    assert 1e-3 <= tolerance.min() and tolerance.max() < 1


def test_two_images_of_one_name_are_not_taken_for_each_other(tmp_path):
    _, clusters = two_clusters()
    root = os.path.realpath(tmp_path)
    clusters.root, clusters.row = root, {"a.jpg": 0, "sub/a.jpg": 1, "b.jpg": 2}

    def known(folder, *paths):
        return clusters.known(data.ImageList(folder, paths)).tolist()

    assert known(tmp_path, "a.jpg", "sub/a.jpg", "b.jpg", "c.jpg") == [0, 1, 2, -1]
    assert known(tmp_path / "sub", "a.jpg", "b.jpg") == [1, -1]  # b.jpg is another one than the run's
    assert known(tmp_path.parent, f"{tmp_path.name}/sub/a.jpg", "b.jpg") == [1, 2]
    assert known(Path("/elsewhere"), "a.jpg", "sub/a.jpg") == [0, 1]  # a copy of the folder
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert known(tmp_path / "link", "a.jpg") == [1]
    clusters.root = None
    assert known(tmp_path / "sub", "a.jpg") == [0]


def test_a_path_that_comes_again_gets_a_number():
    assert list(numbered(["a", "b", "a", "a"])) == ["a", "b", "a\x001", "a\x002"]
