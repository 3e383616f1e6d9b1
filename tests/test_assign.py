"""assign.py: the run's own images keep their clusters, others go to the nearest one."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import assign
import checkpoint
import clustering
import data
import models
from features import Pass, ToPoints, extract_features
from formats import released
from formats.links import locked
from models import weights
from tests import golden, small_run
from tests.helpers import ROOT, refuses
from tests.small_run import SIZE
from tools import make_shards
from training.labels import PseudoLabels
from util import Log, UserError, make_folder
from visu import clusters as gallery

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """images/ and new/, other crops; Kmeans/ and PIC/: runs on images/."""
    root = tmp_path_factory.mktemp("work")
    small_run.write_crops(root / "images")
    small_run.write_crops(root / "new", each=8, first=50)
    for name in ("Kmeans", "PIC"):
        small_run.train(root / "images", root / name, "--clustering", name)
    return root


def run(work, out, *flags, images="images", exp="Kmeans"):
    common = [
        str(work / images),
        "--run",
        str(work / exp),
        "--out",
        str(out),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    return assign.main(assign.get_parser().parse_args([*common, *map(str, flags)]))


def state_of(work, exp):
    return checkpoint.read(work / exp / checkpoint.CLUSTERING)


def brute_force(work, folder, exp):
    """Labels and squared distances in float64, image by image: all distances, the smallest."""
    state = state_of(work, exp)
    net = weights.load(work / exp / checkpoint.CLUSTERING).double()
    view = data.PlainView(data.list_images(folder), data.central_crop(SIZE))
    with torch.no_grad():
        x = torch.stack([data.normalise(view[i][0]).double() for i in range(len(view))])
        x = torch.cat([net.activations(image[None], ["fc7.pre"])["fc7.pre"] for image in x])
    pca = state["transform"]["pca"]
    x = torch.nn.functional.normalize((x - pca["mean"]) @ pca["matrix"])
    labels, centroids = state["assignment"]["labels"], state["assignment"]["centroids"].double()
    if exp == "PIC":
        labels = labels[torch.cdist(x, state["points"].double()).argmin(1)]
    else:
        labels = torch.cdist(x, centroids).argmin(1)
    return labels.numpy(), (x - centroids[labels]).square().sum(1).numpy()


# ---------------------------------------------------------------------------------------- images of the run


@pytest.mark.parametrize("exp", ["Kmeans", "PIC"])
def test_training_images_get_the_stored_assignment_exactly(work, tmp_path, exp, capsys):
    last, moment = (
        checkpoint.read(work / exp / name) for name in ("checkpoint.pth.tar", checkpoint.CLUSTERING)
    )
    name = "features.0.weight"
    assert not torch.equal(last["state_dict"][name], moment["state_dict"][name])  # training went on
    run(work, tmp_path / "a.csv", exp=exp)
    assert (tmp_path / "a.csv").read_bytes() == (work / exp / "assignments.csv").read_bytes()
    assert "48 are known to the run by their path, 48 of them are in the cluster" in capsys.readouterr().out


@pytest.mark.parametrize("exp", ["Kmeans", "PIC"])
def test_part_of_them_in_other_batches_too(work, tmp_path, exp):
    shutil.copytree(work / "images", tmp_path / "images")
    paths = data.list_images(tmp_path / "images").paths
    for i in range(0, 48, 3):
        (tmp_path / "images" / paths[i]).unlink()
    labels, _ = run(work, tmp_path / "a.csv", "--batch", 5, images=tmp_path / "images", exp=exp)
    stored = state_of(work, exp)["assignment"]["labels"].numpy()
    assert np.array_equal(labels, np.delete(stored, np.arange(0, 48, 3)))


def test_a_run_in_float16_is_assigned_as_it_was(work, tmp_path):
    small_run.train(work / "images", tmp_path / "exp", "--feature-dtype", "float16", "--epochs", 1)
    run(work, tmp_path / "a.csv", exp=tmp_path / "exp")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "exp" / "assignments.csv").read_bytes()


@pytest.mark.parametrize("exp", ["Kmeans", "PIC"])
def test_new_images_equal_brute_force(work, tmp_path, exp, monkeypatch):
    monkeypatch.setattr(assign, "CHUNK", 10)
    labels, distances = run(work, tmp_path / "a.csv", "--batch", 4, images="new", exp=exp)
    expected, squared = brute_force(work, work / "new", exp)
    assert np.array_equal(labels, expected) and np.allclose(distances, squared, atol=1e-3)
    assert len(set(labels.tolist())) > 1
    paths, read, _ = gallery.read_assignments(tmp_path / "a.csv")
    assert paths == list(data.list_images(work / "new").paths) and np.array_equal(read, labels)


@pytest.mark.parametrize("exp", ["Kmeans", "PIC"])
def test_changed_images_go_where_they_belong_now(work, tmp_path, exp, capsys):
    shutil.copytree(work / "images", tmp_path / "images")
    images, stored = (
        data.list_images(tmp_path / "images"),
        state_of(work, exp)["assignment"]["labels"].numpy(),
    )
    other = [int(np.flatnonzero(stored != stored[i])[-1]) for i in range(3)]
    for i, j in enumerate(other):
        shutil.copy(work / "images" / images.paths[j], images.path(i))
    labels, _ = run(work, tmp_path / "a.csv", images=tmp_path / "images", exp=exp)
    assert np.array_equal(labels, [*stored[other], *stored[3:]])
    assert "45 of them are in the cluster that it gave them, 3 are not" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- any run, any path


@pytest.mark.parametrize("exp", ["kmeans", "pic"])
def test_a_run_of_the_first_version_is_assigned_as_it_was(tmp_path, exp):
    golden.write_crops(tmp_path / "images", small_run.PICTURES)
    stored = ROOT / "tests" / "files" / "v1" / exp
    run(tmp_path, tmp_path / "a.csv", exp=stored)
    assert (tmp_path / "a.csv").read_bytes() == (stored / "assignments.csv").read_bytes()


@pytest.mark.parametrize("arch", ["toy", "resnet18s"])
def test_any_network_is_assigned_as_it_was(work, tmp_path, arch):
    small_run.train(work / "images", tmp_path / "exp", "--arch", arch, "--epochs", 1)
    run(work, tmp_path / "a.csv", exp=tmp_path / "exp")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "exp" / "assignments.csv").read_bytes()


@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("layer", ["conv2", "fc7"])
def test_a_method_without_pca_is_assigned_as_it_was(work, tmp_path, layer, l2):
    images = data.list_images(work / "images")
    net, to_points = models.build("tiny", seed=1), ToPoints(None, l2)
    view = data.PlainView(images, data.central_crop(SIZE))
    features, _ = extract_features(net, layer, view, Pass(16, 0, CPU))
    points, _ = to_points(features, CPU)
    found = clustering.kmeans(points, k=5, seed=1)
    labels = PseudoLabels(make_folder(tmp_path / "exp"), images, Log(quiet=True), {"image_size": SIZE})
    labels.take(0, found, net=net, layer=layer, to_points=to_points)
    assigned, _ = run(work, tmp_path / "a.csv", "--batch", 7, exp=tmp_path / "exp")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "exp" / "assignments.csv").read_bytes()
    assert np.array_equal(assigned, found.labels)
    new, distances = run(work, tmp_path / "b.csv", images="new", exp=tmp_path / "exp")
    view = data.PlainView(data.list_images(work / "new"), data.central_crop(SIZE))
    features, _ = extract_features(net, layer, view, Pass(16, 0, CPU))
    norms = np.linalg.norm(features, axis=1, keepdims=True) if l2 else 1
    squared = np.square((features / norms)[:, None] - found.centroids[None]).sum(2)
    assert np.array_equal(new, squared.argmin(1)) and np.allclose(distances, squared.min(1), rtol=1e-3)


def test_part_of_the_runs_images_are_known_by_where_they_lie(work, tmp_path, capsys):
    """Their names in the list start from their own folder, and are not those of the run."""
    paths = data.list_images(work / "images").paths
    folder = paths[0].split("/")[0]
    some = [i for i, path in enumerate(paths) if path.startswith(f"{folder}/")][::2]
    (tmp_path / "list.txt").write_text("".join(f"{work / 'images' / paths[i]}\n" for i in some))
    labels, distances = run(work, tmp_path / "a.csv", images=tmp_path / "list.txt")
    stored = state_of(work, "Kmeans")["assignment"]
    assert np.array_equal(labels, stored["labels"].numpy()[some])
    assert np.array_equal(distances, stored["distances"].numpy()[some])
    assert f"{len(some)} are known to the run by their path, {len(some)} of them" in capsys.readouterr().out


def test_an_image_that_a_list_names_twice_is_two_images(work, tmp_path):
    paths = list(data.list_images(work / "images").paths)
    twice = paths[:40] + paths[8:]
    (tmp_path / "list.txt").write_text("".join(f"{work / 'images' / path}\n" for path in twice))
    small_run.train(tmp_path / "list.txt", tmp_path / "exp", "--clustering", "PIC", "--epochs", 1)
    run(work, tmp_path / "a.csv", images=tmp_path / "list.txt", exp=tmp_path / "exp")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "exp" / "assignments.csv").read_bytes()


# ---------------------------------------------------------------------------------------- the forms


def test_the_pickle_is_of_the_authors_form(work, tmp_path):
    labels, _ = run(work, tmp_path / "a.pickle", "--format", "pickle", images="new")
    pairs = released.read_assignments(tmp_path / "a.pickle")
    assert pairs == list(zip(data.list_images(work / "new").paths, labels.tolist()))


@pytest.mark.parametrize("flags", [[], ["--relative"], ["--copy"]])
def test_links_by_cluster_nearest_first(work, tmp_path, flags):
    (tmp_path / "out").mkdir()  # empty
    labels, distances = run(work, tmp_path / "out", "--format", "links", *flags, images="new")
    images = data.list_images(work / "new")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted({str(c) for c in labels.tolist()})
    for cluster in set(labels.tolist()):
        members = sorted(np.flatnonzero(labels == cluster).tolist(), key=lambda i: distances[i])
        found = sorted((tmp_path / "out" / str(cluster)).iterdir())
        assert [p.name.split("_", 1)[1] for p in found] == [images.path(i).name for i in members]
        assert [p.read_bytes() for p in found] == [images.path(i).read_bytes() for i in members]
        for path in found:
            assert path.is_symlink() == (flags != ["--copy"])
            assert not path.is_symlink() or os.path.isabs(os.readlink(path)) == (flags == [])
    assert len(list(tmp_path.iterdir())) == 1  # nothing is left beside


def test_shards_are_copied_by_cluster(work, tmp_path):
    arguments = [str(work / "images"), str(tmp_path / "s-%02d.tar"), "--size-mb", "0.05"]
    make_shards.main(make_shards.get_parser().parse_args(arguments))
    flags = ["--shards", str(tmp_path / "s-*.tar"), "--run", str(work / "Kmeans"), "--workers", "0"]
    flags += ["--device", "cpu", "--out", str(tmp_path / "out"), "--format", "links", "--copy"]
    labels, _ = assign.main(assign.get_parser().parse_args(flags))
    assert np.array_equal(labels, state_of(work, "Kmeans")["assignment"]["labels"].numpy())
    copies = sorted(path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg"))
    assert copies == sorted(path.read_bytes() for path in (work / "images").rglob("*.jpg"))


# ---------------------------------------------------------------------------------------- mistakes


def test_damaged_images_stop_it_or_are_left_out(work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    images = data.list_images(tmp_path / "images")
    images.path(20).write_bytes(images.read(20)[:-40])
    with pytest.raises(UserError, match=f"1 of 48 images cannot be decoded .*{images.paths[20]}"):
        run(work, tmp_path / "a.csv", images=tmp_path / "images")
    assert not (tmp_path / "a.csv").exists()
    labels, _ = run(work, tmp_path / "a.csv", "--skip-bad-images", images=tmp_path / "images")
    assert len(labels) == 47 and labels.min() >= 0
    assert images.paths[20] in (tmp_path / "a.csv.bad_images.txt").read_text()
    lines = (work / "Kmeans" / "assignments.csv").read_text().splitlines()
    assert (tmp_path / "a.csv").read_text().splitlines() == [*lines[:21], *lines[22:]]


def test_only_a_clustering_is_taken(work, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.pth\.tar: holds no clustering .*clustering\.pth\.tar"):
        run(work, tmp_path / "a.csv", exp="Kmeans/checkpoint.pth.tar")
    with pytest.raises(UserError, match=r"clustering\.pth\.tar is missing: a run writes it"):
        run(work, tmp_path / "a.csv", exp="images")
    run(work, tmp_path / "a.csv", exp="Kmeans/clustering.pth.tar")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--copy"], "only with --format links"),
        (["--format", "links", "--copy", "--relative"], "one of them"),
        (["--shards", "a.tar"], "one of them"),
        (["--batch", "0"], "--batch: 0: must be at least 1"),
        (["--precision", "tf32"], "CUDA"),
    ],
)
def test_mistakes_are_told_before_any_work(work, tmp_path, flags, message):
    with refuses(message):
        run(work, tmp_path / "a", *flags)
    assert not list(tmp_path.iterdir())


def test_the_out_folder_must_be_new_or_empty(work, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    with pytest.raises(UserError, match="new or empty"):
        run(work, tmp_path, "--format", "links")
    with pytest.raises(UserError, match="is a folder"):
        run(work, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_what_is_read_is_not_overwritten(work, tmp_path):
    exp = shutil.copytree(work / "Kmeans", tmp_path / "exp")
    folder = shutil.copytree(work / "images", tmp_path / "images")
    first = sorted(folder.rglob("*.jpg"))[0]
    (tmp_path / "list.txt").write_text(f"{first}\n")
    (tmp_path / "list.csv.bad_images.txt").write_text(f"{first}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, images in (
        (tmp_path / "list.txt", tmp_path / "list.txt"),
        (tmp_path / "list.csv", tmp_path / "list.csv.bad_images.txt"),
        (first, folder),
        (first, tmp_path / "list.txt"),
        (exp / "clustering.pth.tar", folder),
        (exp / "checkpoint.pth.tar", folder),
    ):
        with refuses("would be overwritten, but is read"):
            run(work, out, images=images, exp=exp)
    with refuses("the next call would take the links for images"):
        run(work, folder / "by_cluster", "--format", "links", images=folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_a_killed_call_left_does_not_block_the_next_one(work, tmp_path):
    mine, dead, alive = (tmp_path / f"out.tmp-{name}" for name in (os.getpid(), 1, 2))
    for folder in (mine, dead, alive):
        (folder / "0").mkdir(parents=True)
    with locked(alive) as free:
        assert free
        run(work, tmp_path / "out", "--format", "links", "--copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp-2"]
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 48


@pytest.mark.parametrize("flags", [[], ["--format", "links"]])
def test_the_folder_that_one_stands_in_is_refused(work, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with refuses("is a folder|is where you are"):
        run(work, ".", *flags)
    assert not list(tmp_path.iterdir())
