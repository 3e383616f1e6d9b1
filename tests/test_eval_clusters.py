"""eval_clusters.py: of a run's own files, of several heads, of other images, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

import assign
import eval_clusters
from evaluation.assignments import read_heads
from tests.helpers import refuses
from training.logs import read_lines, write_assignments


def judged(*command):
    args = [*map(str, command), "--bootstrap", "20"]
    return eval_clusters.main(eval_clusters.get_parser().parse_args(args))


def write_csv(path, paths, *heads):
    write_assignments(path, paths, *((np.array(labels), np.zeros(len(labels))) for labels in heads))
    return path


PATHS = ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "c/1.png"]


def test_a_run_is_judged_as_its_log_judged_it(finished, tmp_path, capsys):
    exp = shutil.copytree(finished, tmp_path / "exp")
    (row,) = judged(exp)
    record = read_lines(exp / "log.jsonl")[-1]
    assert (row["nmi"], row["ami"]) == pytest.approx((record["nmi_classes"], record["ami_classes"]))
    paths, (labels,) = read_heads(exp / "assignments.csv")
    classes = [path.split("/")[0] for path in paths]
    assert row["nmi_arithmetic"] == pytest.approx(normalized_mutual_info_score(classes, labels))
    assert row["ari"] == pytest.approx(adjusted_rand_score(classes, labels))
    assert (row["head"], row["split"], row["images"], row["classes"]) == (0, "train", 60, 6)
    low, high = row["intervals"]["purity"]
    assert low < row["purity"] < high and "many_to_one" not in row
    written = json.loads((exp / "results.json").read_text())["clusters"]
    assert written["results"] == [row] and "arithmetic mean" in written["protocol"]["figures"]
    assert "ACC 1:1" in capsys.readouterr().out


def test_every_head_has_its_row(tmp_path, capsys):
    heads = ([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 1], [7, 7, 7, 3, 3, 0])
    write_csv(tmp_path / "assignments.csv", PATHS, *heads)
    rows = judged(tmp_path)
    assert [row["head"] for row in rows] == [0, 1, 2]
    for row, labels in zip(rows, heads):
        assert row["ami"] == pytest.approx(adjusted_mutual_info_score([0, 0, 0, 1, 1, 2], labels), abs=1e-9)
    assert rows[0]["acc"] == rows[2]["acc"] == 1.0 and rows[0]["ari"] == rows[2]["ari"]
    out = capsys.readouterr().out
    assert "train, head 1, k 2  " in out and "6 of train in 3 and 2 and 3 clusters and 3 classes" in out


def test_other_images_are_judged_by_the_classes_of_train(finished, photos, tmp_path):
    """assign.py gives the run's own images their clusters, so that many-to-one is the purity."""
    args = f"{photos} --run {finished} --out {tmp_path}/val.csv --workers 0 --device cpu"
    assign.main(assign.get_parser().parse_args(args.split()))
    exp = shutil.copytree(finished, tmp_path / "exp")
    train, val = judged(exp, "--val", tmp_path / "val.csv")
    assert val["split"] == "val" and val["many_to_one"] == train["purity"] == val["purity"]
    assert val["images"] == 60


def test_clusters_of_val_by_hand_with_several_heads_in_train_and_one_class_in_val(tmp_path):
    file = write_csv(tmp_path / "assignments.csv", PATHS, [0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1])
    val = write_csv(tmp_path / "val.csv", ["b/7.png", "b/8.png", "b/9.png"], [1, 0, 9])
    rows = judged(file, "--val", val)
    assert [(row["head"], row["split"]) for row in rows] == [(0, "train"), (0, "val"), (1, "train")]
    assert rows[1]["many_to_one"] == pytest.approx(1 / 3)  # cluster 1 is b's, 0 is a's, 9 nobody's
    assert rows[1]["classes"] == 1


def test_labels_of_a_file_with_and_without_splits(tmp_path, capsys):
    flat = [path.replace("/", "") for path in PATHS]
    ids = [0, 0, 0, 1, 1, 2]
    write_csv(tmp_path / "assignments.csv", flat, ids)
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"{path},{path[0]}\n" for path in flat[1:]))
    (row,) = judged(tmp_path, "--labels", labels)
    assert row["acc"] == 1.0 and row["images"] == 5
    assert "left out 1 of the 6 images" in capsys.readouterr().out

    labels.write_text("path,label\n" + "".join(f"train/{path},{path[0]}\nval/{path},x\n" for path in flat))
    assert judged(tmp_path, "--labels", labels)[0]["classes"] == 3  # a run on DIR/train
    labels.write_text("path,label\n" + "".join(f"/data/{path},{path[0]}\n" for path in flat))
    assert judged(tmp_path, "--labels", labels, "--data", "/data")[0]["acc"] == 1.0

    split = ["train", "val", "train", "train", "val", "val"]
    lines = "".join(f"{path},{path[0]},{name}\n" for path, name in zip(flat, split))
    labels.write_text("path,label,split\n" + lines)
    train, val = judged(tmp_path, "--labels", labels)
    assert (train["images"], val["images"]) == (3, 3)
    assert val["many_to_one"] == pytest.approx(2 / 3)  # c's cluster is nobody's in train


def test_train_and_val_folders_in_one_run_are_two_splits(tmp_path):
    paths = [f"{split}/{path}" for split in ("train", "val") for path in PATHS]
    write_csv(tmp_path / "assignments.csv", paths, [0, 0, 0, 1, 1, 2] * 2)
    train, val = judged(tmp_path)
    assert train["acc"] == val["many_to_one"] == 1.0 and train["classes"] == 3


def test_mistakes_are_named(tmp_path):
    with refuses("cannot read .*assignments.csv: No such file"):
        judged(tmp_path)
    file = tmp_path / "assignments.csv"
    file.write_text("1,2,3\n")
    with refuses("first line is not path,cluster,distance"):
        judged(tmp_path)
    file.write_text("path,cluster,distance\na/1,0,0.5\na/2,x,0.5\n")
    with refuses("line 3: expected path,cluster,distance, clusters from 0"):
        judged(tmp_path)
    for odd in (10**7, 2**63, 10**4000, -1):
        file.write_text(f"path,cluster,distance\na/1,0,0.5\nb/2,{odd},0.5\n")
        with refuses("line 3: expected path,cluster,distance, clusters from 0 to 9999999"):
            judged(tmp_path)
    write_csv(file, ["1.png", "2.png"], [0, 1])
    with refuses("no class sub-folders .* give --labels"):
        judged(tmp_path)
    (tmp_path / "labels.csv").write_text("path,label\nother.png,a\n")
    with refuses("labels.csv names none of the 2 images in .*, e.g. 1.png"):
        judged(tmp_path, "--labels", tmp_path / "labels.csv")
    (tmp_path / "results.json").write_text("[")
    with refuses("results.json: not valid JSON"):
        judged(tmp_path)


def test_without_draws_there_are_no_intervals(tmp_path):
    write_csv(tmp_path / "assignments.csv", PATHS, [0, 0, 0, 1, 1, 2])
    args = eval_clusters.get_parser().parse_args([str(tmp_path), "--bootstrap", "0"])
    assert "intervals" not in eval_clusters.main(args)[0]
