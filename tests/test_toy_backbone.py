"""A backbone of one file and one name (tests/toy.py) goes through everything that takes a network."""

import json

import numpy as np
import pytest

import assign
import checkpoint
import eval_knn
import eval_linear
import eval_pretrain
import eval_retrieval
import eval_semisup
import eval_voc_classif
import extract
import main
import main_deepclusterv2
import main_deepercluster
import main_swav
import models
from models import weights
from tests import small_run
from tests.cities import make_city
from tests.toy import toy
from tests.voc_folder import make_voc
from visu import activ_retrieval, clusters, filters, gradient_ascent, report

COMMON = "--workers 0 --device cpu"
CROPS = (
    "--nmb_crops 2 1 --size_crops 32 24 --min_scale_crops .3 .1 --max_scale_crops 1 .4 --hidden_mlp 16 "
    "--feat_dim 8 --batch_size 16 --base_lr .1 --warmup_epochs 0 --epochs 1"
)
METHODS = {
    "deepcluster": (main, "--image-size 32 --k 5 --batch 16 --epochs 1"),
    "swav": (main_swav, f"{CROPS} --nmb_prototypes 12"),
    "deepclusterv2": (main_deepclusterv2, f"{CROPS} --nmb_prototypes 7 6"),
    "deepercluster": (
        main_deepercluster,
        "--image-size 32 --super_classes 4 --k 6 --dim_pca 8 --reassignment 1 --nepochs 1 --batch_size 16",
    ),
}
ARCHS = ("toy", "resnet18s")


def call(script, *words):
    """The script's main on these words; those in one string are parted at blanks."""
    flags = [flag for word in words for flag in (word.split() if isinstance(word, str) else [str(word)])]
    return script.main(script.get_parser().parse_args(flags))


@pytest.fixture(scope="module")
def images(split):
    return split / "train"


@pytest.fixture(scope="module")
def run_of(images, tmp_path_factory):
    """run_of(method, arch): EXP of a run on the images, made once."""
    made = {}

    def run(method, arch="toy"):
        if (method, arch) not in made:
            script, own = METHODS[method]
            exp = made[method, arch] = tmp_path_factory.mktemp(f"{method}-{arch}") / "exp"
            call(script, images, "--exp", exp, "--arch", arch, own, COMMON, "--no-report")
        return made[method, arch]

    return run


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """train/ and val/ with four classes, other crops in each."""
    root = tmp_path_factory.mktemp("split")
    small_run.write_crops(root / "train", each=8)
    small_run.write_crops(root / "val", each=4, first=50)
    return root


@pytest.fixture(scope="module")
def model(run_of):
    return run_of("deepcluster") / "checkpoint.pth.tar"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it_and_leaves_a_clustering_that_assign_repeats(run_of, images, tmp_path, method):
    exp = run_of(method)
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    assert saved["arch"] == "toy" and toy().state_dict().keys() <= saved["state_dict"].keys()
    (line,) = [json.loads(text) for text in (exp / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(line["loss"])
    call(assign, images, "--run", exp, "--out", tmp_path / "a.csv", COMMON)
    again, before = (
        clusters.read_assignments(folder) for folder in (tmp_path / "a.csv", exp / "assignments.csv")
    )
    assert again[0] == before[0] and len(before[0]) == 32
    if method != "deepclusterv2":  # which clusters what it saw of random crops
        assert np.array_equal(again[1], before[1])


@pytest.mark.parametrize("arch", ARCHS)
def test_features_and_points_of_it_are_extracted(run_of, images, tmp_path, arch):
    exp = run_of("deepcluster", arch)
    net = weights.load(exp / "checkpoint.pth.tar")
    for layer in (net.feature, net.maps[-1]):
        flags = ("--model", exp / "checkpoint.pth.tar", "--layer", layer, "--image-size 32", COMMON)
        call(extract, images, *flags, "--out", tmp_path / layer)
        rows = np.load(tmp_path / f"{layer}.npy")
        assert len(rows) == 32 and rows.std() > 0 and np.isfinite(rows).all()
    assert np.load(tmp_path / f"{net.feature}.npy").shape == (32, net.feature_dim)
    call(extract, images, "--run", exp, "--whitened", "--out", tmp_path / "points", COMMON)
    assert np.allclose(np.linalg.norm(np.load(tmp_path / "points.npy"), axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_assigned_evaluated_by_neighbours_and_by_probes(run_of, split, images, tmp_path, arch):
    exp = run_of("deepcluster", arch)
    call(assign, images, "--run", exp, "--out", tmp_path / "a.csv", COMMON)
    assert (tmp_path / "a.csv").read_bytes() == (exp / "assignments.csv").read_bytes()
    common = ("--data", split, "--model", exp / "checkpoint.pth.tar", "--image-size 32", COMMON)
    net = weights.load(exp / "checkpoint.pth.tar")
    found = call(eval_knn, *common, "--k 3 --exp", tmp_path)
    assert [row["layer"] for row in found] == [net.maps[-1], net.feature]
    assert all(row["knn"]["3"] > 0.25 for row in found)  # of four classes
    found = call(
        eval_linear, *common, "--epochs 1 --batch_size 8 --exp", tmp_path, "--layers", *net.maps[-2:]
    )
    assert [row["layer"] for row in found] == net.maps[-2:]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_fine_tuned_whole_whatever_trained_it(run_of, split, tmp_path, method):
    """Without the projection head and the prototypes that stood on it."""
    model = run_of(method) / "checkpoint.pth.tar"
    flags = ("--data", split, "--model", model, "--image-size 32 --epochs 1 --batch 8", COMMON, "--exp")
    call(eval_semisup, *flags, tmp_path / "semisup")
    call(eval_pretrain, *flags, tmp_path / "pretrain")
    for name in ("semisup", "pretrain"):
        saved = checkpoint.read(tmp_path / name / f"{name}.pth.tar")["state_dict"]
        assert set(saved) == {*toy().state_dict(), "top_layer.weight", "top_layer.bias"}
        assert len(saved["top_layer.bias"]) == 4


@pytest.mark.parametrize("fc6_8", [0, 1])
def test_it_is_judged_on_voc(model, tmp_path, fc6_8):
    voc = make_voc(tmp_path, number=8)
    flags = ("--vocdir", voc, "--model", model, "--image-size 32 --nit 2 --batch 4", COMMON)
    results = call(eval_voc_classif, *flags, "--fc6_8", fc6_8, "--exp", tmp_path / "exp")
    assert np.isfinite(results["mAP"])


def test_it_retrieves_buildings(model, tmp_path):
    make_city(tmp_path / "Oxford", ["astronaut", "cat"], 0)
    make_city(tmp_path / "Paris", ["dahlia", "hopper", "earth"], 1)
    flags = ("--datasets", tmp_path, "--model", model, "--exp", tmp_path / "exp", "--S 96 --L 2", COMMON)
    results = call(eval_retrieval, *flags)
    assert 0 < results["classic"]["mAP"] <= 100


def test_pictures_of_it_are_drawn(run_of, model, images, tmp_path):
    exp = run_of("deepcluster")
    last = models.ARCHITECTURES["toy"]().maps[-1]
    assert call(filters, "--model", model, "--exp", tmp_path).exists()
    call(activ_retrieval, "--model", model, "--data", images, "--layer", last, "--image-size 32 --exp",
         tmp_path / "top", COMMON)  # fmt: skip
    call(gradient_ascent, "--model", model, "--layer", last, "--filters 0 1 --idim 32 --niter 2 --exp",
         tmp_path / "ascent", "--device cpu")  # fmt: skip
    assert len(list((tmp_path / "top" / last).glob("layer*-channel*"))) == 20
    assert list((tmp_path / "ascent" / last).glob("*.jpeg"))
    call(report, "--exp", exp)
    call(clusters, "--exp", exp, "--data", images)
    assert all((exp / name).stat().st_size > 5000 for name in ("report.png", "report.html", "clusters.html"))


def test_it_becomes_an_onnx_file(model, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    from formats import onnx

    call(onnx, "--model", model, "--out", tmp_path / "toy.onnx", "--image-size 32")
