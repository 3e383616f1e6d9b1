"""The one pass from images to activations, against the plain forward in float64."""

import math

import numpy as np
import pytest
import torch

import checkpoint
import clustering
import data
import features
import models
import util
from algorithms.nearest import assign
from algorithms.pca import fit_pca, normalise_rows
from features import Pass, ToPoints, activation_batches, extract_features, layer_shape
from tests.helpers import ROOT, refuses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    net = models.build("alexnet", sobel=True, num_clusters=4, seed=2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        net(torch.randn(8, 3, 64, 64))
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)


class View(torch.utils.data.Dataset):
    """What PlainView gives, of tensors; `broken` cannot be decoded."""

    def __init__(self, images, broken=()):
        self.images, self.broken = images, broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return None if i in self.broken else self.images[i], i


def extract(net, images, layer="fc7.pre", batch=4, broken=(), **options):
    return extract_features(net, layer, View(images, broken), Pass(batch, 0, CPU), **options)


def plain(net, images, layer="fc7.pre"):
    """The slow, obviously right way: float64, batch norm as it stands, one image at a time."""
    double = models.build(net.arch, sobel=True, num_clusters=4).double().eval()
    double.load_state_dict(net.state_dict())
    with torch.no_grad():
        inputs = [data.normalise(image[None]).double() for image in images]
        rows = [double.activations(x, [layer])[layer].flatten() for x in inputs]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("layer", ["fc7.pre", "conv3", "conv4.pre"])
def test_features_equal_the_plain_forward_in_float64(net, images, layer):
    found, broken = extract(net, images, layer)
    expected = plain(net, images, layer)
    assert found.dtype == np.float32 and broken == []
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("arch", ["tiny", "toy", "resnet18s"])
def test_any_networks_feature_comes_out(images, arch):
    net = models.build(arch, sobel=True, num_clusters=4, seed=1)
    found, _ = extract(net, images, net.feature)
    expected = plain(net, images, net.feature)
    assert found.shape == (11, net.feature_dim)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    assert layer_shape(net, net.feature, 64) == (net.feature_dim,)
    last = net.maps[-1]
    assert extract(net, images, last)[0].shape == (11, int(np.prod(layer_shape(net, last, 64))))


def test_rows_are_those_asked_for_whatever_the_batches(net, images):
    whole, _ = extract(net, images)
    for rows, batch in ((range(3, 9), 4), (range(11), 11), (range(10, 11), 1)):
        found, _ = extract(net, images, batch=batch, rows=rows)
        assert found.shape == (len(rows), 4096)
        assert np.allclose(found, whole[rows.start : rows.stop], atol=1e-4 * np.abs(whole).max())
    assert extract(net, images, rows=range(0))[0].shape == (0, 4096)


def test_the_network_is_left_as_it_was(net, images):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    extract(net, images)
    assert all(module.training for name, module in net.named_modules() if not name.startswith("sobel"))
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_broken_images_are_listed_and_the_others_keep_their_rows(net, images):
    whole, _ = extract(net, images)
    broken_ones = {6, 8, 9, 10}  # all of the last batch too
    found, broken = extract(net, images, broken=broken_ones)
    assert broken == [6, 8, 9, 10]
    assert not found[broken].any() and found[[5, 7]].any(axis=1).all()
    assert np.allclose(found[:6], whole[:6], atol=1e-4 * np.abs(whole).max())
    assert extract(net, images, broken={0, 1}, rows=range(2))[1] == [0, 1]


def test_a_pass_says_which_images_its_rows_are_and_which_are_broken(net, images):
    batches = list(activation_batches(net, ["conv1", "conv2"], View(images, {1, 8, 9, 10}), Pass(4, 0, CPU)))
    assert [index.tolist() for _, index, _ in batches] == [[0, 2, 3], [4, 5, 6, 7], []]
    assert [broken for *_, broken in batches] == [[1], [], [8, 9, 10]]
    assert [len(found.get("conv2", [])) for found, *_ in batches] == [3, 4, 0]
    assert batches[2][0] == {} and set(batches[0][0]) == {"conv1", "conv2"}


def test_float16_features_are_the_rounded_float32_ones(net, images):
    full, _ = extract(net, images)
    half, _ = extract(net, images, dtype=np.float16)
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))


@pytest.mark.skipif(not util.cpu_has_bf16(), reason="a CPU that multiplies bfloat16")
def test_bf16_keeps_directions_and_neighbours(net):
    """Not labels: k-means is chaotic. Pairwise cosines move by well under a hundredth, the loss hardly."""
    images = torch.nn.functional.interpolate(torch.rand(60, 3, 8, 8) * 255, 64, mode="bilinear")
    images = images.to(torch.uint8)
    exact, fast = (
        extract_features(net, "fc7.pre", View(images), Pass(20, 0, CPU, precision))[0]
        for precision in ("fp32", "bf16")
    )
    losses = [
        clustering.kmeans(clustering.preprocess(x, 16)[1], k=6, seed=1).objective for x in (exact, fast)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    exact, fast = (x - x.mean(0) for x in (exact, fast))
    cosines = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (exact, fast)]
    cosines = [x @ x.T for x in cosines]
    assert np.abs(cosines[0] - cosines[1]).mean() < 0.01
    nearest = [np.argsort(-(c - 2 * np.eye(60)), axis=1)[:, :5] for c in cosines]
    overlap = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*nearest)])
    assert overlap > 0.9


# ---------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("dim", [4, None])
def test_points_are_what_was_clustered_and_survive_their_state(l2, dim):
    x = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32) * 3 + 1
    pca = None if dim is None else fit_pca(x, dim)
    to_points = ToPoints(pca, l2)
    points, norms = to_points(x, CPU)
    expected = x.copy() if pca is None else pca.apply(x)
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=1), rtol=1e-6)
    assert np.array_equal(points, normalise_rows(expected) if l2 else expected)
    assert points.shape[1] == to_points.dim(12) == (dim or 12) and points.dtype == np.float32
    again = ToPoints.from_state_dict(to_points.state_dict())
    assert np.array_equal(again(x, CPU)[0], points)
    assert x.max() > 1  # only read: an L2 without a PCA works on a copy
    before = x.copy()
    ToPoints(None, True)(x, CPU)
    assert np.array_equal(x, before)


def test_the_file_of_a_clustering_gives_its_images_their_clusters(finished, photos):
    path, state = features.read_clustering(finished)
    assert path == finished / checkpoint.CLUSTERING and state["metric"] == "l2"
    assert features.read_clustering(path)[1].keys() == state.keys()
    net = models.build(state["arch"], seed=0)
    net.load_state_dict(state["state_dict"], strict=False)
    images = data.list_images(photos)
    assert list(images.paths) == state["paths"]
    view = data.PlainView(images, data.central_crop(state["args"]["image_size"]))
    rows, _ = extract_features(net, state["layer"], view, Pass(16, 0, CPU))
    points, _ = ToPoints.from_state_dict(state["transform"])(rows, CPU)
    saved = clustering.Assignment.from_state_dict(state["assignment"])
    assert np.array_equal(assign(points, saved.centroids)[0], saved.labels)


def test_what_holds_no_clustering_is_refused_with_the_way_out(finished, tmp_path):
    with refuses(r"clustering\.pth\.tar is missing: .*--resume"):
        features.read_clustering(tmp_path)
    with refuses(r"checkpoint\.pth\.tar: holds no clustering that fits its weights"):
        features.read_clustering(finished / "checkpoint.pth.tar")


def test_settings_are_those_asked_for_else_the_runs_else_the_papers():
    run = {"image_size": 32, "batch": 16, "precision": "tf32", "scaled_decoding": True}
    chosen = features.Settings.choose(run, CPU)  # no TF32 on a CPU: what is more exact
    assert (chosen.image_size, chosen.batch, chosen.precision, chosen.scaled) == (32, 16, "fp32", True)
    chosen = features.Settings.choose(run, CPU, image_size=64, batch=3)
    assert (chosen.image_size, chosen.batch) == (64, 3)
    paper = features.Settings.choose({}, CPU)
    assert (paper.image_size, paper.batch, paper.precision, paper.scaled) == (224, 256, "fp32", False)
    several = {"size_crops": [96, 32], "batch_size": 8}  # of multi-crop, the first crops
    chosen = features.Settings.choose(several, CPU)
    assert (chosen.image_size, chosen.batch) == (96, 8)
    with refuses("--precision tf32: for CUDA GPUs only"):
        features.Settings.choose({}, CPU, precision="tf32")


@pytest.mark.parametrize(
    "run", [{"image_size": 10**6}, {"image_size": "64"}, {"batch": 0}, {"batch": 10**9}, {"batch": 1.5}]
)
def test_settings_in_a_file_that_no_run_has_are_refused(run):
    (name,) = run
    with refuses(f"--{name.replace('_', '-')}: the run's own is"):
        features.Settings.choose(run, CPU)
    assert vars(features.Settings.choose(run, CPU, image_size=32, batch=4))[name] in (32, 4)


def test_points_are_of_features_as_the_run_held_them():
    x = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    pca = fit_pca(x, 3)
    points, _ = ToPoints(pca, dtype="float16")(x, CPU)
    again, _ = ToPoints(pca)(x.astype(np.float16).astype(np.float32), CPU)
    assert np.array_equal(points, again)


# ---------------------------------------------------------------------------------------- clustering.pth.tar


@pytest.fixture
def state():
    return checkpoint.read(ROOT / "tests" / "files" / "v1" / "pic" / "clustering.pth.tar")


def test_a_file_of_the_first_version_has_the_keys_of_today(state, tmp_path):
    matrix = state["whitening"]["matrix"]
    path, found = features.read_clustering(ROOT / "tests" / "files" / "v1" / "pic")
    assert path.name == "clustering.pth.tar"
    assert (found["layer"], found["metric"], found["root"]) == ("fc7.pre", "l2", None)
    to_points = ToPoints.from_state_dict(found["transform"])
    assert (to_points.l2, to_points.dtype) == (True, "float32")
    assert np.array_equal(to_points.pca.matrix, matrix.numpy())
    state["args"] |= {"dir": str(tmp_path), "feature_dtype": "float16"}
    checkpoint.save(tmp_path / "clustering.pth.tar", state)
    _, found = features.read_clustering(tmp_path)
    assert found["root"] == str(tmp_path.resolve()) and found["transform"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": [1]}, "holds no clustering"),
        ({"optimizer": {}}, "holds no clustering"),
        ({"paths": ["a"] * 59}, "damaged"),
        ({"paths": [1] * 60}, "damaged"),
        ({"points": torch.zeros(60, 3)}, "damaged"),
        ({"whitening": {"mean": torch.zeros(40), "matrix": torch.zeros(40, 7)}}, "damaged"),
        ({"whitening": {"mean": torch.zeros(0), "matrix": torch.zeros(0)}}, "damaged"),
        ({"assignment": {"labels": torch.zeros(60)}}, "damaged"),
        ({"transform": {"pca": None, "l2": True}, "layer": "fc7", "metric": "l2"}, "damaged"),
        ({"transform": {"l2": True}, "layer": "fc7", "metric": "cosine"}, "clustered by cosine"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_told_in_one_line(state, tmp_path, change, message):
    checkpoint.save(tmp_path / "clustering.pth.tar", state | change)
    with refuses(f"clustering.pth.tar: {message}"):
        features.read_clustering(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["transform"]["pca"].update(matrix=s["transform"]["pca"]["matrix"].half()), "damaged"),
        (lambda s: s["transform"]["pca"]["mean"].fill_(math.nan), "damaged"),
        (lambda s: s["assignment"]["centroids"].fill_(math.inf), "damaged"),
        (lambda s: s["assignment"]["distances"].fill_(math.nan), "damaged"),
        (lambda s: s["assignment"].update(coarse=torch.zeros(2, 3)), "damaged"),
        (lambda s: s["args"].update(precision=["bf16"]), "damaged"),
        (lambda s: s["transform"].update(dtype={1: 2}), "damaged"),
        (lambda s: s.update(root={}), "damaged"),
        (lambda s: s.update(bits=99), "damaged"),
        (lambda s: s.update(transform=torch.zeros(3)), "holds no clustering"),
    ],
)
def test_what_a_file_says_is_of_the_kind_that_runs_write(finished, tmp_path, change, message):
    state = checkpoint.read(finished / "clustering.pth.tar")
    change(state)
    checkpoint.save(tmp_path / "clustering.pth.tar", state)
    with refuses(f"clustering.pth.tar: {message}"):
        features.read_clustering(tmp_path)


@pytest.mark.parametrize("value", [-1, 10**6])
def test_labels_beyond_the_clusters_are_refused(state, tmp_path, value):
    state["assignment"]["labels"][3] = value
    checkpoint.save(tmp_path / "clustering.pth.tar", state)
    with refuses("damaged"):
        features.read_clustering(tmp_path)
