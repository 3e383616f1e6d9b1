"""eval_lowshot.py: the whole way on a small VOC folder, going on after a stop, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval_lowshot
from evaluation import lowshot
from tests.helpers import refuses
from tests.voc_folder import CLASSES, make_voc


@pytest.fixture(scope="module")
def vocdir(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"), number=16)


@pytest.fixture
def evaluate(vocdir, tmp_path):
    """Run the evaluator; keywords change or add flags."""

    def run(**flags):
        flags = {
            "vocdir": vocdir,
            "model": "random:tiny",
            "layers": ["conv2"],
            "k": [1, 3],
            "draws": 2,
        } | flags
        flags = {"costs": [0.1, 1, 10], "exp": tmp_path / "exp", "image-size": 32} | flags
        command = []
        for name, value in ({"workers": 0, "device": "cpu"} | flags).items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return eval_lowshot.main(eval_lowshot.get_parser().parse_args(command))

    return run


def test_figures_table_and_protocol(evaluate, tmp_path, capsys):
    rows = evaluate(layers=["conv2", "fc7"])
    assert [row["layer"] for row in rows] == ["conv2", "fc7"]
    for row in rows:
        assert list(row) == ["layer", "size", "1", "3", "all"]
        for k in ("1", "3"):
            assert row[k]["mAP"] == pytest.approx(np.mean(row[k]["draws"])) and len(row[k]["draws"]) == 2
            assert row[k]["std"] == pytest.approx(np.std(row[k]["draws"], ddof=1))
        aps = [found["ap"] for found in row["all"]["classes"].values()]
        assert row["all"]["mAP"] == pytest.approx(np.mean(aps)) and list(row["all"]["classes"]) == list(
            CLASSES
        )
        assert all(found["folds"] == 3 for found in row["all"]["classes"].values())
    # Photographs of four kinds of texture: a random network tells them apart far above chance (a third).
    assert rows[0]["all"]["mAP"] > 70
    written = json.loads((tmp_path / "exp" / "results.json").read_text())["lowshot"]
    assert written["results"] == rows and written["protocol"]["split"] == "trainval -> test"
    assert "k images with the class and 3 k without, 2 draws" in written["protocol"]["k"]
    printed = capsys.readouterr().out
    assert "k 3" in printed and "±" in printed and "all images" in printed


def test_a_stopped_evaluation_goes_on_and_gives_the_same(evaluate, tmp_path, monkeypatch, capsys):
    whole = evaluate(exp=tmp_path / "whole")
    add, added = lowshot.Journal.add, []

    def stop_after_nine(self, task, found):
        if len(added) == 9:
            raise KeyboardInterrupt
        added.append(task)
        add(self, task, found)

    with monkeypatch.context() as patch:
        patch.setattr(lowshot.Journal, "add", stop_after_nine)
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    journal = tmp_path / "exp" / "lowshot.jsonl"
    journal.write_text(journal.read_text() + '{"svm": {"layer"')  # a kill cuts the last line
    capsys.readouterr()
    assert evaluate() == whole
    assert "9 SVMs are done" in capsys.readouterr().out
    assert journal.read_text() == (tmp_path / "whole" / "lowshot.jsonl").read_text()

    monkeypatch.setattr(lowshot, "judge_class", lambda *_: pytest.fail("trained again"))
    assert evaluate() == whole


def test_other_settings_are_not_mixed_in(evaluate, tmp_path):
    before = evaluate(k=[1])
    with refuses(r"lowshot.jsonl: of another network, .* begin anew with --restart"):
        evaluate(k=[1], seed=32)
    assert evaluate(k=[1], seed=32, restart=[]) != before
    more = evaluate(k=[1, 2], seed=32)  # others of the same settings join in
    assert more[0]["1"] == evaluate(k=[1], seed=32)[0]["1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": [99]}, r"--k 99: only \d+ images of trainval show \w+"),
        ({"k": [], "no-full": []}, "--k without a number and --no-full leave nothing"),
        ({"layers": ["conv9"]}, "tiny has no layer conv9"),
        ({"costs": [0]}, "--costs: 0: must be a positive number"),
        ({"vocdir": "nowhere"}, "nowhere/ImageSets/Main is missing"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(evaluate, tmp_path, flags, message):
    with refuses(message):
        evaluate(**flags)
    assert not (tmp_path / "exp").exists()


def test_defaults_are_the_protocols():
    args = eval_lowshot.get_parser().parse_args(["--vocdir", "VOC2007", "--model", "x.pth.tar"])
    assert args.k == [1, 2, 4, 8, 16, 32, 64, 96] and args.split == "trainval" and args.draws == 5
    assert args.full and args.costs is None
    assert len(lowshot.COSTS) == 26 and {2.0**-19, 2.0**-4, 1e-7, 100.0} <= set(lowshot.COSTS)
