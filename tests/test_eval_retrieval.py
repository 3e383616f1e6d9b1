"""eval_retrieval.py: views, networks, the stages from folder to figure."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ground_truth
import numpy as np
import pytest
import ranking
import torch
from torchvision.models import vgg16

import checkpoint
import data
import eval_retrieval as er
import models
from tests.cities import CROPS, make_city, truth_of
from util import UserError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CITY_PICTURES = {
    "Oxford": ["astronaut", "cat", "coffee", "coins", "raccoon", "rocket"],
    "Paris": ["dahlia", "footbridge", "hopper", "pagoda", "stairs", "earth"],
}
SIZE = 112


@pytest.fixture(scope="module", autouse=True)
def slim_classifiers():
    """8 units instead of 4096: retrieval looks at the convolutions, and a checkpoint has 15 MB, not 240."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("models.alexnet", "models.vgg16"):
            patch.setattr(importlib.import_module(name), "FEATURE_DIM", 8)
        yield


def save_alexnet(path: Path, seed: int) -> Path:
    net = models.build("alexnet", sobel=False, seed=seed)
    checkpoint.save(path, {"arch": "alexnet", "state_dict": net.state_dict()})
    return path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    for seed, (city, pictures) in enumerate(CITY_PICTURES.items()):
        make_city(folder / city, pictures, seed)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, slim_classifiers) -> Path:
    return save_alexnet(tmp_path_factory.mktemp("model") / "checkpoint.pth.tar", seed=1)


def call(datasets: Path, exp: Path, model: Path | None, *flags: str) -> dict | None:
    arguments = ["--datasets", datasets, "--exp", exp, "--S", SIZE, "--workers", 0, "--device", "cpu"]
    arguments += ["--model", model] if model else []
    return er.main(er.get_parser().parse_args([str(word) for word in (*arguments, *flags)]))


@pytest.fixture(scope="module")
def exp(datasets, model, tmp_path_factory) -> Path:
    """Where one plain run of all stages left its files."""
    folder = tmp_path_factory.mktemp("exp")
    call(datasets, folder, model)
    return folder


# -------------------------------------------------------------------------------- views


def test_longer_side_becomes_s_and_the_box_is_cut_out_after_resizing():
    image = torch.zeros(3, 200, 400, dtype=torch.uint8)
    image[:, 50:100, 100:300] = 255
    assert er.resized_view(er.Item(Path("x")), image, 100).shape == (3, 50, 100)
    assert er.resized_view(er.Item(Path("x")), image.transpose(1, 2), 100).shape == (3, 100, 50)
    view = er.resized_view(er.Item(Path("x"), (100.0, 40.0, 302.0, 100.0)), image, 100)
    whole = er.resized_view(er.Item(Path("x")), image, 100)
    assert torch.equal(view, whole[:, 10:25, 25:76])  # cut out of the resized image: a quarter of the box
    beyond = er.resized_view(er.Item(Path("x"), (-8.0, 40.0, 999.0, 999.0)), image, 100)
    assert torch.equal(beyond, whole[:, 10:])
    with pytest.raises(data.ImageError, match="holds no pixel"):
        er.resized_view(er.Item(Path("x"), (390.0, 10.0, 390.0, 20.0)), image, 100)


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_activation_is_the_last_relu_without_its_pooling(arch, monkeypatch):
    net = models.build(arch, sobel=True, seed=0).eval()
    with torch.no_grad():  # statistics that differ from layer to layer, as those of a trained net
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    monkeypatch.setattr(checkpoint, "load_model", lambda path: net)
    view = torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)
    ours = er.activation(er.open_trunk("net", CPU), view, CPU)
    with torch.no_grad():
        expected = net.features[:-1](net.sobel(data.normalise(view[None])))[0]
    assert ours.shape[1:] == ((5, 3) if arch == "alexnet" else (6, 4))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_tiny_views_are_padded():
    view = torch.zeros(3, 3, 40, dtype=torch.uint8)
    assert er.activation(lambda x: x, view, CPU).shape == (3, 16, 40)


def test_pretrained_is_torchvisions_vgg16_up_to_its_last_relu(monkeypatch):
    with torch.device("meta"):  # its classifier takes seconds and stays untouched
        net = vgg16(weights=None)
    net.features.to_empty(device="cpu")
    for parameter in net.features.parameters():
        torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1)
    monkeypatch.setattr(er, "vgg16", lambda weights, progress: net)
    view = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    ours = er.activation(er.open_trunk("pretrained", CPU), view, CPU)
    with torch.no_grad():
        expected = net.features[:30](data.normalise(view[None]))[0]
    assert isinstance(net.features[30], torch.nn.MaxPool2d) and expected.shape == (512, 3, 4)
    assert expected.max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_pretrained_that_cannot_be_downloaded_is_one_line(monkeypatch):
    def offline(**_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(er, "vgg16", offline)
    with pytest.raises(
        UserError, match=r"pretrained: .*Name or service not known.*put https://\S+\.pth"
    ) as error:
        er.open_trunk("pretrained", CPU)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- end to end


def test_descriptors_beat_shuffled_ones_by_far(exp, datasets):
    results = json.loads((exp / "results.json").read_text())["eval_retrieval_Oxford"]
    assert results["results"]["classic"]["queries"] == len(CITY_PICTURES["Oxford"])
    assert results["protocol"]["PCA"] == "whitening 512 learnt on Paris"
    index = json.loads((exp / "retrieval/Oxford_database.json").read_text())
    database = np.load(exp / "retrieval/Oxford_database.npy")
    queries = np.load(exp / "retrieval/Oxford_queries.npy")
    assert (
        database.dtype == np.float32
        and database.shape == (6 * CROPS, 256)
        and len(index["names"]) == 6 * CROPS
    )
    np.testing.assert_allclose(np.linalg.norm(database, axis=1), 1, atol=1e-5)
    shuffled = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(database))
        rankings = [[index["names"][i] for i in row] for row in ranking.rank(queries, database[order])]
        truth = ground_truth.read_queries(datasets / "Oxford", index["names"])
        shuffled.append(ranking.score(truth, rankings, "classic")["mAP"])
    assert results["results"]["classic"]["mAP"] > 70 > 40 > np.mean(shuffled)


def test_stages_one_by_one_give_what_all_gives_and_the_other_city_works(datasets, model, exp, tmp_path):
    for stage in er.STAGES[:-1]:
        assert call(datasets, tmp_path, model, "--stage", stage) is None
    results = call(datasets, tmp_path, None, "--stage", "eval")  # needs no model any more
    for name in ("Paris_regions", "Oxford_database", "Oxford_queries"):
        np.testing.assert_array_equal(*(np.load(x / f"retrieval/{name}.npy") for x in (exp, tmp_path)))
    assert results == json.loads((exp / "results.json").read_text())["eval_retrieval_Oxford"]["results"]
    call(datasets, tmp_path, model, "--eval", "Paris")
    both = json.loads((tmp_path / "results.json").read_text())
    assert set(both) == {"eval_retrieval_Oxford", "eval_retrieval_Paris"}
    assert both["eval_retrieval_Paris"]["protocol"]["PCA"] == "whitening 512 learnt on Oxford"


def test_a_killed_run_goes_on_with_the_images_that_are_left(datasets, model, exp, tmp_path, monkeypatch):
    decode, calls = data.decode, []

    def failing(path):
        calls.append(Path(path).stem)
        if len(calls) == 40:  # in the middle of db_features
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(data, "decode", failing)
    with pytest.raises(KeyboardInterrupt):
        call(datasets, tmp_path, model)
    assert len(list((tmp_path / "retrieval/Oxford_database.parts").glob("*.npy"))) == 9
    before = list(calls)
    call(datasets, tmp_path, model)
    total = 30 + 30 + 6  # regions of Paris, database, queries: each image once, and once more the one cut off
    assert len(calls) == total + 1 and calls[40] == before[39]
    for name in ("Paris_regions", "Oxford_database", "Oxford_queries"):
        np.testing.assert_array_equal(*(np.load(x / f"retrieval/{name}.npy") for x in (exp, tmp_path)))
    assert not list((tmp_path / "retrieval").glob("*.parts"))
    call(datasets, tmp_path, model)
    assert len(calls) == total + 1  # nothing is computed again


def test_workers_change_nothing(datasets, model, exp, tmp_path):
    call(datasets, tmp_path, model, "--workers", "2", "--stage", "extract_train")
    np.testing.assert_array_equal(*(np.load(x / "retrieval/Paris_regions.npy") for x in (exp, tmp_path)))


def test_multires_and_expansions_change_the_figures_sensibly(datasets, model, exp, tmp_path, capsys):
    for name in ("Paris_regions.npy", "Paris_regions.json", "Paris_pca.npz", "Paris_pca.json"):
        (tmp_path / name).write_bytes((exp / "retrieval" / name).read_bytes())
    three = call(datasets, tmp_path, model, "--multires", "--temp", str(tmp_path))
    one, many = (np.load(x / "Oxford_database.npy") for x in (exp / "retrieval", tmp_path))
    assert three["classic"]["mAP"] > 60
    assert 0.5 < (one * many).sum(axis=1).mean() < 0.999  # of the same images, yet not the same
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    plain = call(datasets, exp, model, "--stage", "eval")["classic"]
    for flag in ("--aqe", "--dbe"):
        expanded = call(datasets, exp, model, "--stage", "eval", flag, "2")["classic"]
        assert expanded["mAP"] > 60 and expanded["AP"].keys() == plain["AP"].keys()
    with pytest.raises(UserError, match="another scales"):
        call(datasets, exp, model, "--stage", "eval", "--multires")
    assert "from memory, unverified): DeepCluster 61.0" in capsys.readouterr().out


def test_descriptors_of_other_settings_are_refused(datasets, model, exp, tmp_path):
    with pytest.raises(UserError, match="S 112, now 128; use another --temp"):
        call(datasets, exp, model, "--S", "128")
    other = save_alexnet(tmp_path / "other.pth.tar", seed=2)
    with pytest.raises(UserError, match="another model"):
        call(datasets, exp, other)
    with pytest.raises(UserError, match="run --stage extract_train first"):
        call(datasets, tmp_path / "new", model, "--stage", "train_pca")
    with pytest.raises(UserError, match="run --stage train_pca first"):
        call(datasets, tmp_path / "new", model, "--stage", "db_features")
    with pytest.raises(UserError, match="run --stage db_features first"):
        call(datasets, tmp_path / "new", model, "--stage", "eval")


def test_revisited_protocol_end_to_end_and_without_lab(datasets, model, exp, tmp_path):
    oxford = datasets / "Oxford"
    queries = ground_truth.read_queries(oxford, ground_truth.list_database(oxford))
    gnd = tmp_path / "gnd_roxford5k.pkl"
    gnd.write_bytes(pickle.dumps(truth_of(queries, list(ground_truth.list_database(oxford)), list), 2))
    results = call(datasets, exp, model, "--gnd", str(gnd))
    assert list(results) == ["classic", "easy", "medium", "hard"]
    assert results["medium"]["queries"] == 6 and results["medium"]["mAP"] > 60
    assert 0 < results["medium"]["mP@10"] <= 100
    alone = tmp_path / "Oxford"
    alone.mkdir()
    (alone / "jpg").symlink_to(oxford / "jpg")
    again = call(datasets, exp, model, "--gnd", str(gnd), "--oxford", str(alone), "--stage", "eval")
    assert list(again) == ["easy", "medium", "hard"] and again["hard"] == results["hard"]


# -------------------------------------------------------------------------------- bad input


def test_missing_inputs_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"Paris: no such folder"):
        call(tmp_path, tmp_path / "exp", model)
    with pytest.raises(UserError, match="--model is missing"):
        call(tmp_path, tmp_path / "exp", None)
    with pytest.raises(UserError, match="no such checkpoint"):
        call(tmp_path, tmp_path / "exp", tmp_path / "nothing")
    with pytest.raises(UserError, match="where is Paris"):
        er.main(er.get_parser().parse_args(["--model", str(model), "--exp", str(tmp_path / "exp")]))
    with pytest.raises(UserError, match="--L 0"):
        call(tmp_path, tmp_path / "exp", model, "--L", "0")


def test_an_undecodable_image_is_named(datasets, model, tmp_path):
    make_city(tmp_path / "Paris", ["cat"], 0)
    (tmp_path / "Paris/jpg/cat_000001.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(UserError, match=r"cat_000001\.jpg: ") as error:
        call(datasets, tmp_path / "exp", model, "--paris", str(tmp_path / "Paris"), "--workers", "1")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- from the shell


def test_shell_script_runs_all_stages(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("models.alexnet"), "FEATURE_DIM", models.FEATURE_DIM)
    model = save_alexnet(tmp_path / "checkpoint.pth.tar", seed=1)  # of full size
    settings = {
        "DATASETS": datasets, "MODEL": model, "EXP": tmp_path / "exp", "EVAL": "Paris", "S": 64,
        "WORKERS": 0, "PYTHON": sys.executable,
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    done = subprocess.run(
        [ROOT / "eval_retrieval.sh", "--device", "cpu"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris classic: mAP" in done.stdout and "eval_retrieval_Paris protocol: " in done.stdout
    assert (tmp_path / "exp/results.json").is_file()


def test_shell_script_says_what_is_missing(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "DATASETS": "", "MODEL": ""}
    done = subprocess.run(
        [ROOT / "eval_retrieval.sh"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "DATASETS" in done.stderr and done.stderr.count("\n") == 1
