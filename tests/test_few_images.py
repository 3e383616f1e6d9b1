"""Few images: whitened to nearly as many dimensions as there are images all are equally far apart."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import clustering
import main_deepercluster
import models
from algorithms.agreement import compare
from algorithms.pca import fit_pca, normalise_rows
from data import PlainView, central_crop, list_images
from features import Pass, extract_features
from tests import small_run

TEXTURES = {
    "bars": lambda x, y: np.sin(y / 2),
    "checks": lambda x, y: np.sign(np.sin(x / 3) * np.sin(y / 3)),
    "slanting": lambda x, y: np.sin((x + y) / 3),
    "stripes": lambda x, y: np.sin(x / 2),
}


def write_textures(folder, each=12, side=64):
    """folder/<texture>/<number>.png: each texture at some place, with a little noise, in grey."""
    for name, wave in TEXTURES.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            rng = np.random.default_rng(i)
            y, x = np.mgrid[:side, :side] + rng.uniform(0, 30, (2, 1, 1))
            grey = 128 + 90 * wave(x, y) + rng.normal(0, 8, (side, side))
            Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    return write_textures(tmp_path_factory.mktemp("few") / "textures")


@pytest.fixture(scope="module")
def features(textures):
    images, net = list_images(textures), models.build("alexnet", seed=31)
    view = PlainView(images, central_crop(64))
    return extract_features(net, net.feature, view, Pass(48, 0, torch.device("cpu")))[0], images.classes


def agreement(points, classes, **options):
    return np.mean([
        compare(clustering.kmeans(points, k=4, seed=seed).labels, classes)["ami"] for seed in range(5)
    ])  # fmt: skip


def test_clusters_of_48_images_of_plain_textures_are_the_textures(features):
    features, classes = features
    assert features.shape == (48, 4096)
    assert agreement(clustering.preprocess(features)[1], classes) > 0.8
    assert agreement(normalise_rows(fit_pca(features, 47).apply(features)), classes) < 0.2  # without a limit


def test_pic_finds_groups_among_them_rather_than_48_clusters(features):
    features, classes = features
    found = clustering.pic(clustering.preprocess(features)[1])
    assert 3 <= found.num_clusters <= 10 and compare(found.labels, classes)["ami"] > 0.6


@pytest.mark.parametrize("images, most", [(5, 4), (48, 4), (100, 6), (1000, 66), (3839, 255), (3840, 256)])
def test_dimensions_go_with_the_number_of_images(images, most):
    said = []
    x = np.random.default_rng(0).standard_normal((images, 300)).astype(np.float32)
    pca, points = clustering.preprocess(x, 256, log=said.append)
    assert pca.dim == points.shape[1] == most
    expected = f"PCA keeps {most} dimensions of 256: {images} images are too few for more"
    assert said == ([expected] if most < 256 else [])
    assert clustering.preprocess(x, 3)[0].dim == 3


def test_a_lack_of_rank_is_told_as_such():
    said, rng = [], np.random.default_rng(0)
    x = (rng.standard_normal((90, 2)) @ rng.standard_normal((2, 30))).astype(np.float32)
    clustering.preprocess(x, 256, log=said.append)
    assert said == ["PCA keeps 2 dimensions of 256: the features have no more"]


def test_both_methods_that_whiten_keep_to_it_and_say_so(textures, tmp_path):
    flags = "--arch tiny --image-size 32 --workers 0 --device cpu --no-report".split()
    small_run.train(textures, tmp_path / "one", "--k", 4, "--epochs", 1)
    more = ["--nepochs", "1", "--k", "2", "--super_classes", "8", "--batch_size", "16", "--dim_pca", "64"]
    arguments = [str(textures), "--exp", str(tmp_path / "two"), *flags, *more]
    main_deepercluster.main(main_deepercluster.get_parser().parse_args(arguments))
    for exp, dim in (("one", 256), ("two", 64)):
        said = (tmp_path / exp / "train.log").read_text()
        assert said.count(f"PCA keeps 4 dimensions of {dim}: 48 images are too few for more") == 1
        record = json.loads((tmp_path / exp / "log.jsonl").read_text().splitlines()[0])
        assert record["pca_dims"] == 4
