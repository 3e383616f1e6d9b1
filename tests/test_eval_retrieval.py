"""eval_retrieval.py: the stages from folder to figure."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import eval_retrieval as er
import models
import util
from evaluation import ground_truth, last_maps, ranking, retrieval
from tests.cities import CROPS, make_city, truth_of
from util import UserError

ROOT = Path(__file__).resolve().parent.parent
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
            patch.setattr(importlib.import_module(name), "UNITS", 8)
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
    for stage in er.STAGE_NAMES[:-1]:
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
    decode, calls = last_maps.open_rgb, []

    def failing(path):
        calls.append(path.stem)
        if len(calls) == 40:  # in the middle of db_features
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(last_maps, "open_rgb", failing)
    with pytest.raises(KeyboardInterrupt):
        call(datasets, tmp_path, model)
    journal = json.loads((tmp_path / "retrieval/Oxford_database.npy.journal").read_text())
    assert journal["done"] == journal["rows"] == 9
    before = list(calls)
    call(datasets, tmp_path, model)
    total = 30 + 30 + 6  # regions of Paris, database, queries: each image once, and once more the one cut off
    assert len(calls) == total + 1 and calls[40] == before[39]
    for name in ("Paris_regions", "Oxford_database", "Oxford_queries"):
        np.testing.assert_array_equal(*(np.load(x / f"retrieval/{name}.npy") for x in (exp, tmp_path)))
    assert not [*(tmp_path / "retrieval").glob("*.part"), *(tmp_path / "retrieval").glob("*.journal")]
    call(datasets, tmp_path, model)
    assert len(calls) == total + 1  # nothing is computed again


def test_workers_change_nothing(datasets, model, exp, tmp_path):
    call(datasets, tmp_path, model, "--workers", "2", "--stage", "extract_train")
    np.testing.assert_array_equal(*(np.load(x / "retrieval/Paris_regions.npy") for x in (exp, tmp_path)))


def test_multires_and_expansions_change_the_figures_sensibly(datasets, model, exp, tmp_path):
    for name in ("Paris_regions.npy", "Paris_regions.json", "Paris_pca.npz"):
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


def test_descriptors_of_other_settings_are_refused(datasets, model, exp, tmp_path, monkeypatch):
    monkeypatch.setattr(util, "cpu_has_bf16", lambda: True)
    with pytest.raises(UserError, match="S 112, now 128; use another --temp"):
        call(datasets, exp, model, "--S", "128")
    other = save_alexnet(tmp_path / "other.pth.tar", seed=2)
    with pytest.raises(UserError, match="another model"):
        call(datasets, exp, other)
    with pytest.raises(UserError, match="precision fp32, now bf16"):
        call(datasets, exp, model, "--precision", "bf16")
    with pytest.raises(UserError, match="run --stage extract_train first"):
        call(datasets, tmp_path / "new", model, "--stage", "train_pca")
    with pytest.raises(UserError, match="run --stage train_pca first"):
        call(datasets, tmp_path / "new", model, "--stage", "db_features")
    with pytest.raises(UserError, match="run --stage db_features first"):
        call(datasets, tmp_path / "new", model, "--stage", "eval")


def test_descriptors_of_images_that_were_replaced_are_refused(datasets, model, exp, tmp_path):
    """The same names and settings, another picture behind one of them."""
    own = tmp_path / "datasets"
    shutil.copytree(datasets, own)
    call(own, tmp_path / "exp", model)
    oxford, paris = own / "Oxford/jpg/cat_000001.jpg", own / "Paris/jpg/earth_000001.jpg"
    good = {path: path.read_bytes() for path in (oxford, paris)}
    oxford.write_bytes((own / "Oxford/jpg/coins_000001.jpg").read_bytes())
    for stage in ("db_features", "eval", "all"):
        with pytest.raises(
            UserError, match=r"Oxford_database\.json: was made with another state of the images"
        ):
            call(own, tmp_path / "exp", model, "--stage", stage)
    for name in ("Oxford_database.npy", "Oxford_database.json"):  # the way out
        (tmp_path / "exp/retrieval" / name).unlink()
    paris.write_bytes(good[paris][:-1] + b"\0")
    with pytest.raises(UserError, match=r"Paris_regions\.json: was made with another state of the images"):
        call(own, tmp_path / "exp", model)
    call(own, tmp_path / "exp", model, "--stage", "db_features")
    ours, other = (np.load(x / "retrieval/Oxford_database.npy") for x in (tmp_path / "exp", exp))
    changed = np.flatnonzero((ours != other).any(axis=1))
    assert [sorted(ground_truth.list_database(own / "Oxford"))[i] for i in changed] == ["cat_000001"]


def test_damaged_descriptors_are_refused(datasets, model, exp, tmp_path):
    shutil.copytree(exp, tmp_path / "exp")
    path = tmp_path / "exp/retrieval/Oxford_database.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"Oxford_database\.npy: damaged, .*; use another --temp"):
        call(datasets, tmp_path / "exp", model, "--stage", "eval")


@pytest.mark.parametrize("spec", ["random:tiny", "random:resnet18:sobel"])
def test_any_network_is_described_by_its_last_map(datasets, tmp_path, spec):
    results = call(datasets, tmp_path, spec, "--S", "64")
    net = models.build(*spec.split(":")[1:2])
    saved = json.loads((tmp_path / "results.json").read_text())["eval_retrieval_Oxford"]
    assert saved["protocol"]["layer"] == f"{net.maps[-1]}, frozen" and saved["results"] == results
    assert 0 < results["classic"]["mAP"] <= 100


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
    gnd.write_bytes(pickle.dumps(subprocess.call, 2))
    with pytest.raises(UserError, match=r"gnd_roxford5k\.pkl: refused"):
        call(datasets, exp, model, "--gnd", str(gnd), "--stage", "eval")


# -------------------------------------------------------------------------------- bad input


def test_missing_inputs_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"Paris: no such folder"):
        call(tmp_path, tmp_path / "exp", model)
    with pytest.raises(UserError, match="--model is missing"):
        call(tmp_path, tmp_path / "exp", None)
    with pytest.raises(UserError, match="no such checkpoint"):
        call(tmp_path, tmp_path / "exp", tmp_path / "nothing")
    with pytest.raises(UserError, match="--precision tf32: for CUDA"):
        call(tmp_path, tmp_path / "exp", model, "--precision", "tf32")
    with pytest.raises(UserError, match="where is Paris"):
        er.main(er.get_parser().parse_args(["--model", str(model), "--exp", str(tmp_path / "exp")]))


@pytest.mark.parametrize(("flag", "value"), [("S", 15), ("L", 0), ("aqe", -1), ("dbe", -1), ("workers", -1)])
def test_numbers_that_cannot_work_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        er.get_parser().parse_args([f"--{flag}", str(value)])
    assert end.value.code == 2 and f"--{flag}: {value}: must be at least" in capsys.readouterr().err


def test_the_flags_name_the_stages_and_the_cities():
    assert tuple(retrieval.STAGES) == er.STAGE_NAMES
    action = next(a for a in er.get_parser()._actions if a.dest == "eval")
    assert tuple(action.choices) == tuple(retrieval.OTHER)


def test_an_undecodable_image_is_named(datasets, model, tmp_path):
    make_city(tmp_path / "Paris", ["cat"], 0)
    (tmp_path / "Paris/jpg/cat_000001.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(UserError, match=r"cat_000001\.jpg: ") as error:
        call(datasets, tmp_path / "exp", model, "--paris", str(tmp_path / "Paris"), "--workers", "1")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- from the shell


@pytest.mark.slow
def test_shell_script_runs_all_stages(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("models.alexnet"), "UNITS", 4096)  # of full size
    model = save_alexnet(tmp_path / "checkpoint.pth.tar", seed=1)
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
