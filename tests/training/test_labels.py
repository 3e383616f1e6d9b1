import math
import pickle

import numpy as np
import pytest
import torch

import checkpoint
import data
import models
from clustering import Assignment
from features import ToPoints
from tests.helpers import refuses
from training.labels import PseudoLabels


@pytest.fixture
def images(tmp_path):
    for name in ("a/1", "a/2", "b/3", "b/4", "b/5", "b/6"):
        path = tmp_path / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return data.list_images(tmp_path / "images")


def found(ids, k=3, points=None):
    ids = np.array(ids, np.int64)
    zeros = np.zeros((k, 2), np.float32)
    return Assignment(ids, k, 1.5, np.arange(len(ids), dtype=np.float32), zeros, points)


def take(labels, epoch, *assignments):
    net = models.build("tiny", seed=1)
    labels.take(epoch, *assignments, net=net, layer="fc7.pre", to_points=ToPoints(None, True))


def clusters(exp):
    with open(exp / "clusters", "rb") as file:
        return pickle.load(file)


def test_labels_are_those_of_the_images_asked_for_by_head(tmp_path, images):
    labels = PseudoLabels(tmp_path, images, print, {"seed": 1})
    assert labels.epoch == -1 and labels.assignments == []
    take(labels, 0, found([0, 0, 1, 1, 2, 2]), found([1, 0, 1, 0, 1, 0], k=2))
    index = torch.tensor([4, 0, 2])
    assert labels.of(index).tolist() == [2, 0, 1] and labels.of(index, head=1).tolist() == [1, 1, 1]
    assert labels.of(index).dtype == torch.int64 and labels.num_clusters == 3
    assert labels.log_k == pytest.approx(math.log(3))


def test_figures_compare_with_the_classes_and_with_the_last_clustering(tmp_path, images):
    said = []
    labels = PseudoLabels(tmp_path, images, said.append, {})
    take(labels, 0, found([0, 0, 1, 1, 1, 1]))
    figures = labels.figures()
    assert figures["nmi_classes"] == pytest.approx(1) and "nmi_previous" not in figures
    assert figures["clusters"]["nonempty"] == 2 and figures["clustering_loss"] == 1.5
    assert figures["pca_dims"] == 2
    take(labels, 1, found([1, 1, 0, 0, 0, 0]))
    assert labels.figures()["nmi_previous"] == pytest.approx(1)
    assert any("warning: collapse, the largest cluster holds 4 of 6" in line for line in said)


def test_clusters_nearly_as_many_as_images_are_warned_about(tmp_path, images):
    said = []
    labels = PseudoLabels(tmp_path, images, said.append, {})
    take(labels, 0, found([0, 0, 1, 1, 2, 2]))
    assert not any("warning" in line for line in said)
    take(labels, 1, found([0, 1, 2, 3, 3, 4], k=5))
    assert any("warning: 5 clusters of 6 images" in line and "fewer clusters" in line for line in said)


def test_the_files_are_those_of_the_clustering(tmp_path, images):
    labels = PseudoLabels(tmp_path, images, print, {"seed": 5})
    take(labels, 0, found([0, 0, 1, 1, 2, 2], points=np.ones((6, 2), np.float32)))
    take(labels, 1, found([2, 0, 1, 1, 2, 2]))
    assert clusters(tmp_path) == [[[0, 1], [2, 3], [4, 5]], [[1], [2, 3], [0, 4, 5]]]
    rows = (tmp_path / "assignments.csv").read_text().splitlines()
    assert rows[0] == "path,cluster,distance" and rows[1:3] == ["a/1.jpg,2,0", "a/2.jpg,0,1"]
    saved = checkpoint.read(tmp_path / checkpoint.CLUSTERING)
    assert saved["paths"] == list(images.paths) and saved["epoch"] == 1 and saved["points"] is None
    assert saved["args"] == {"seed": 5} and saved["transform"]["pca"] is None


def test_they_come_back_and_cut_the_files_to_what_they_had_seen(tmp_path, images):
    labels = PseudoLabels(tmp_path, images, print, {})
    take(labels, 0, found([0, 0, 1, 1, 2, 2]))
    state = labels.state_dict()
    take(labels, 1, found([2, 0, 1, 1, 2, 2]))
    again = PseudoLabels(tmp_path, images, print, {})
    again.load_state_dict(state)
    assert again.epoch == 0 and again.ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert again.figures()["nmi_classes"] == state["figures"]["nmi_classes"]
    assert len(clusters(tmp_path)) == 1
    assert (tmp_path / "assignments.csv").read_text().splitlines()[1] == "a/1.jpg,0,0"


def test_in_another_folder_the_log_is_copied(tmp_path, images):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    labels = PseudoLabels(one, images, print, {})
    take(labels, 0, found([0, 0, 1, 1, 2, 2]))
    again = PseudoLabels(two, images, print, {}, origin=one)
    again.load_state_dict(labels.state_dict())
    take(again, 1, found([2, 0, 1, 1, 2, 2]))
    assert len(clusters(one)) == 1 and len(clusters(two)) == 2


def test_a_log_that_a_dead_run_left_is_begun_afresh(tmp_path, images):
    (tmp_path / "clusters").write_bytes(b"left over")
    labels = PseudoLabels(tmp_path, images, print, {})
    take(labels, 0, found([0, 0, 1, 1, 2, 2]))
    assert len(clusters(tmp_path)) == 1


def test_labels_of_other_images_or_a_lost_log_are_refused(tmp_path, images):
    labels = PseudoLabels(tmp_path, images, print, {})
    take(labels, 0, found([0, 0, 1, 1, 2, 2]))
    state = labels.state_dict()
    (tmp_path / "clusters").unlink()
    with refuses("log of the earlier epochs is missing"):
        PseudoLabels(tmp_path, images, print, {}).load_state_dict(state)
    state["assignments"] = [found([0, 1]).state_dict()]
    with pytest.raises(ValueError, match="another number of images than 6"):
        PseudoLabels(tmp_path, images, print, {}).load_state_dict(state)
