"""The comparison: its page and picture for few and many runs, seeds as one, awkward names, broken files."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import eval_knn
from tests import small_run
from tests.helpers import refuses
from tests.test_methods import train
from tests.visu.test_report import AWKWARD, awkward_records, config, record, write_run
from visu import compare, curves, run_groups

PROBE = {"epoch": 3, "steps": 9, "train": {"loss": 0.5, "prec@1": 99.0, "prec@5": 99.5}}


def knn(value, baseline=None, model="m.pth.tar"):
    """What eval_knn.py writes of one layer, with the network that the run started from."""
    rows = [{"network": "model", "layer": "conv5", "size": "9", "knn": {"10": value}, "ami": 0.25}]
    if baseline is not None:
        rows.insert(0, rows[0] | {"network": "baseline", "knn": {"10": baseline}})
    protocol = {"model": model, "baseline": "EXP/checkpoints/checkpoint_0.pth.tar", "classes": 20}
    return {"knn": {"protocol": protocol, "results": rows, "command": []}}


def linear(top1, network="m.pth.tar (alexnet)", classes=20):
    probe = PROBE | {"val": {"loss": 2.0, "prec@1": top1, "prec@5": 80.0}}
    rows = [{"layer": "conv3", "values": 99, "last": probe, "best": probe, "best chosen on": "val"}]
    return {"linear": {"protocol": {"network": network, "classes": classes}, "results": rows}}


def make_run(exp, epochs=3, found=None, line=lambda e: {"epoch": e, "nmi_classes": 0.5}, **settings):
    settings = {"seed": 31, "lr": 0.05} | settings
    exp.parent.mkdir(exist_ok=True)
    write_run(exp, [line(e) for e in range(epochs)], config(**settings))
    if found is not None:
        (exp / "results.json").write_text(json.dumps(found))
    return exp


def compared(exps, out):
    """The text of the page of these runs."""
    compare.main(compare.get_parser().parse_args([*map(str, exps), "--out", str(out)]))
    return (out / "compare.html").read_text(encoding="utf-8")


def part(page, begin, end):
    return page[page.index(begin) :].split(end, 1)[0]


def row_of(page, name):
    """The cells of the first row of this name, without tags."""
    cells = part(page, f'<th scope="row">{name}</th>', "</tr>").split("<td>")[1:]
    return [re.sub(r"<[^>]+>", " ", cell).strip() for cell in cells]


# ---------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("number", [1, 3, 8])
def test_page_and_picture_of_so_many_runs(tmp_path, number):
    exps = [
        make_run(tmp_path / f"run{'abcdefgh'[i]}", found=knn(0.5 + i / 100), line=record, lr=0.1 + i)
        for i in range(number)
    ]
    page = compared(exps, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.html", "compare.png"]
    with Image.open(tmp_path / "out" / "compare.png") as image:
        assert image.size[0] == 1600
        grey = np.asarray(image.convert("L"))
    assert grey[0, 0] == 255 and 0.01 < (grey < 250).mean() < 0.6
    assert row_of(page, "conv5 kNN@10") == [f"{0.5 + i / 100:.3f}" for i in range(number)]
    key = re.findall(
        r"var\(--(\w+)\);stroke:[^>]*><path[^>]*stroke-dasharray=\"([^\"]*)\"",
        part(page, '<ul class="key">', "</ul>"),
    )
    assert len(key) == len(set(key)) == number
    assert len({colour for colour, _ in key}) == len({dashes for _, dashes in key}) == number
    assert page.count("<figure>") == 8 and "<script" not in page and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)


def test_runs_that_differ_by_seed_alone_are_one_with_mean_and_range(tmp_path):
    seeds = {31: 0.6, 32: 0.7, 33: 0.65}
    exps = [
        make_run(tmp_path / f"base_s{s}", found=knn(x, x / 2), seed=s, workers=s) for s, x in seeds.items()
    ]
    exps.append(make_run(tmp_path / "other", found=knn(0.4), lr=0.1))
    page = compared(exps, tmp_path / "out")
    assert "<h1>4 runs of 2 settings</h1>" in page and "base (mean of 3 seeds)" in page
    mean, other = row_of(page, "conv5 kNN@10")
    assert mean.split() == "0.650 (0.600 to 0.700) random 0.325 (0.300 to 0.350)".split() and other == "0.400"
    runs = part(page, '<div class="scroll folders"', "</table>")
    assert "<td>31, 32, 33</td>" in runs and runs.count("base_s3") == 3
    entries = run_groups.group(run_groups.read_runs(exps))
    epochs, values = curves.series(entries[0], curves.CURVES[0])
    assert epochs.tolist() == [0, 1, 2] and values.shape == (3, 3)


def test_curves_of_seeds_are_over_the_epochs_that_all_have(tmp_path):
    line = lambda e: {"epoch": e, "nmi_classes": e / 1e4}  # noqa: E731
    exps = [make_run(tmp_path / f"s{n}", epochs=n, seed=n, line=line) for n in (1500, 2100)]
    (entry,) = run_groups.group(run_groups.read_runs(exps))
    epochs, values = curves.series(entry, curves.CURVES[0])
    assert len(epochs) == 1000 and (epochs[0], epochs[-1]) == (0, 1499)
    assert np.array_equal(values, np.array([epochs, epochs]) / 1e4)


def test_settings_that_differ_stand_first_and_equal_ones_are_folded(tmp_path):
    exps = [make_run(tmp_path / name, lr=lr, momentum=0.9, workers=lr) for name, lr in (("a", 1), ("b", 2))]
    page = compared(exps, tmp_path / "out")
    shown, *folded = part(page, "<h2>Settings that differ", "</body>").split("<details>")
    assert (
        row_of(shown, "lr") == ["1", "2"] and '"row">momentum' not in shown and '"row">workers' not in shown
    )
    assert row_of(folded[-1], "momentum") == ["0.9"] and row_of(folded[0], "workers") == ["1", "2"]
    assert "exp" not in re.findall(r'<th scope="row">([^<]+)</th>', page)


def test_the_picture_tells_what_differs_among_the_runs_that_have_it(tmp_path):
    exps = [make_run(tmp_path / name, nmb_cluster=k) for name, k in (("a", 60), ("b", 90), ("c", 0))]
    for exp, drop in zip(exps, ((), (), ("nmb_cluster",))):
        written = json.loads((exp / "config.json").read_text())
        written["args"] = {name: x for name, x in written["args"].items() if name not in drop}
        (exp / "config.json").write_text(json.dumps(written))
    entries = run_groups.group(run_groups.read_runs(exps))
    text = compare.text_of_picture(entries, run_groups.compare_settings(entries)[0])
    assert "nmb_cluster 60 | 90 | –" in " ".join(text.split())


def test_protocols_that_differ_are_told_beside_the_figures(tmp_path):
    a = make_run(tmp_path / "a", found=linear(40.0, f"{tmp_path}/a/checkpoint.pth.tar (alexnet)"))
    b = make_run(tmp_path / "b", found=linear(41.0, f"{tmp_path}/b/checkpoint.pth.tar (alexnet)", 10), lr=1)
    page = compared([a, b], tmp_path / "out")
    differ, equal = part(page, "Where their protocols differ", "</section>").split("<details>")
    assert row_of(differ, "classes") == ["20", "10"] and '"row">network' not in differ
    assert row_of(equal, "network") == ["EXP/checkpoint.pth.tar (alexnet)"]
    assert row_of(page, "conv3 best prec@1") == ["40.00", "41.00"]


def test_published_figures_are_marked_with_their_source(tmp_path):
    run = make_run(tmp_path / "a", found=linear(40.0))
    page = compared([run], tmp_path / "out")
    rows = part(page, "<h4>Published", "</table>")
    assert "37.88" in rows and "<td>vissl: MODEL_ZOO.md</td>" in rows
    assert re.search(r"16.3 14.1</td><td>mem \(quoted from memory, unverified: do not cite\)", rows)
    assert (
        "not measured here" in rows and "ImageNet has 1,000 classes, the images of these runs have 20" in rows
    )
    assert "SwAV" not in rows  # neither of this method nor of this network


def test_folders_that_hold_evaluations_alone_are_compared(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.json").write_text(json.dumps(linear(40.0, "a.pth.tar (resnet50)", 1000)))
    page = compared([tmp_path / "a"], tmp_path / "out")
    assert row_of(page, "conv3 last prec@1") == ["40.00"] and "No log.jsonl with an epoch" in page
    rows = part(page, "<h4>Published", "</table>")
    assert "<td>75.2 [75.18]</td>" in rows and "37.88" not in rows and "ImageNet has" not in rows


def test_figures_of_classes_are_folded_and_means_are_not(tmp_path):
    found = {"mAP": 50.0, "AP": {"cat": 40.0, "dog": None}}
    of_detection = {"AP50": 60.0, "AP": 30.0, "by class": {"AP50": {"cat": 55.0}}}
    kinds = {"eval_voc_classif": {"results": found}, "eval_voc_detection": {"results": of_detection}}
    page = compared([make_run(tmp_path / "a", found=kinds)], tmp_path / "out")
    of_class, of_boxes = page.split('<section class="evaluation">')[1:]
    for section, first, folded in (
        (of_class, ["mAP"], ["AP cat"]),
        (of_boxes, ["AP50", "AP"], ["by class AP50 cat"]),
    ):
        shown, *hidden = section.split("<details>")
        assert re.findall(r'<th scope="row">([^<]+)<', shown.split("<h4>Published")[0]) == first
        assert re.findall(r'<th scope="row">([^<]+)<', hidden[0])[: len(folded)] == folded


def test_names_are_escaped_wherever_they_stand(tmp_path):
    name = '<img src=x onerror="1">{{title}}$x_1$ =cmd|calc'
    found = {"<u>k</u>": {"protocol": {"<i>": "<s>"}, "results": {"<q>": 1.0, "kind": {"<em>": 2}}}}
    exps = [
        make_run(tmp_path / name, found=found, dir="<b>", **{"<tt>": 1}),
        make_run(tmp_path / "_under", found={"<u>k</u>": {"results": {"<q>": 3}}}, lr=2, **{"<tt>": 2}),
    ]
    page = compared(exps, tmp_path / "out")
    for tag in ("img", "u", "i", "s", "q", "em", "b", "tt"):
        assert not re.search(rf"<{tag}[ >]", page), tag
    assert "onerror=&quot;1&quot;&gt;{{title}}$x_<wbr>1$ =cmd|calc" in page


def test_random_networks_stand_below_and_runs_without_the_evaluation_are_named(tmp_path):
    a = make_run(tmp_path / "a", found=linear(40.0))
    for name in ("random", "fold0"):
        (a / name).mkdir()
    (a / "fold0" / "results.json").write_text(json.dumps(linear(77.0)))
    (a / "random" / "results.json").write_text(json.dumps(linear(20.0, "random:alexnet (alexnet)")))
    page = compared([a, make_run(tmp_path / "b", lr=1)], tmp_path / "out")
    assert row_of(page, "conv3 best prec@1")[0].split() == ["40.00", "random", "20.00"]
    assert "Not evaluated so: b." in page and "77.00" not in page


# ---------------------------------------------------------------------------------------- broken things


def test_broken_files_are_named_and_the_rest_counts(tmp_path, capsys):
    good, log, conf, found = (
        make_run(tmp_path / n, found=knn(0.5), lr=len(n)) for n in ("g", "lo", "con", "foun")
    )
    with open(log / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    (conf / "config.json").write_text("{")
    (found / "results.json").write_text("[1]")
    empty = make_run(tmp_path / "empty", epochs=0, found=knn(0.3))
    page = compared([good, log, conf, found, empty], tmp_path / "out")
    warnings = part(page, '<details class="warning"', "</details>")
    assert "line 4 of lo/log.jsonl cannot be read; the others count" in warnings
    assert "con/config.json: not valid JSON; its settings are left out" in warnings
    assert "foun/results.json: not valid JSON of results by evaluator" in warnings
    assert "empty/log.jsonl: no epoch is complete yet" in warnings and warnings.count("<li>") == 4
    assert row_of(page, "conv5 kNN@10") == ["0.500", "0.500", "0.500", "0.300"]
    assert "warning: " in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(tmp_path):
    good = make_run(tmp_path / "good")
    with refuses("nowhere: no such folder"):
        compared([good, tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "pictures").mkdir()
    with refuses("pictures: no run, it has neither log.jsonl nor results.json"):
        compared([good, tmp_path / "pictures"], tmp_path / "out")
    write_run(tmp_path / "young", [])
    with refuses("young/log.jsonl: no epoch is complete yet"):
        compared([tmp_path / "young"], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    with refuses("--out .*good: is the folder of a run"):
        compared([good], good)
    with refuses("--out .*young: is the folder of a run"):
        compared([good], tmp_path / "young")
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    with refuses("holds the template"):
        compared([good], compare.TEMPLATE.parent)
    with refuses("required: EXP"):
        compare.get_parser().parse_args([])
    assert not (tmp_path / "out").exists()


def test_warnings_of_training_name_their_run(tmp_path):
    stuck = [make_run(tmp_path / n, line=lambda e: record(e, loss=4.6), lr=n) for n in ("a", "b/c", "b/d")]
    entries = run_groups.group(run_groups.read_runs(stuck))
    names = [warning.split(": the loss 4.600 is stuck")[0] for warning in compare.warnings_of(entries)]
    assert names == ["a", "c", "d"]


def test_logs_and_results_of_any_shape_are_compared_all_the_same(tmp_path):
    a = write_run(tmp_path / "a", awkward_records(AWKWARD), config())
    b = write_run(tmp_path / "b", [{"epoch": 0}], config(lr=2))
    kinds = {f"kind{i}": {"results": x, "protocol": x} for i, x in enumerate(AWKWARD)}
    (a / "results.json").write_text(json.dumps(kinds | {"none": 3, "list": [1]}))
    page = compared([a, b], tmp_path / "out")
    assert "<b>" not in page and "<h1>2 runs</h1>" in page


# ---------------------------------------------------------------------------------------- real runs


def test_runs_of_several_methods_with_an_evaluation(finished, photos, tmp_path):
    swav, deeper = (train(m, photos, tmp_path / m, epochs=2) for m in ("swav", "deepercluster"))
    data = tmp_path / "data"
    for i, split in enumerate(("train", "val")):
        small_run.write_crops(data / split, pictures=3, each=6, first=6 * i)
    flags = (
        f"--data {data} --model {swav}/checkpoint.pth.tar --baseline {swav}/checkpoints/checkpoint_0.pth.tar"
    )
    more = f"--exp {swav} --k 3 --image-size 32 --workers 0 --device cpu --bootstrap 0"
    rows = eval_knn.main(eval_knn.get_parser().parse_args(f"{flags} {more}".split()))
    page = compared([finished, swav, deeper], tmp_path / "out")
    assert "<h1>3 runs</h1>" in page
    own = next(row for row in rows if row["network"] == "model")
    start = next(row for row in rows if row["network"] == "baseline" and row["layer"] == own["layer"])
    (cell,) = row_of(page, f"{own['layer']} kNN@3")
    assert cell.split() == [f"{own['knn']['3']:.3f}", "random", f"{start['knn']['3']:.3f}"]
    titles = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert {"Loss / log k (1: nothing learnt)", "NMI to the classes", "Seconds of an epoch"} <= set(titles)
    assert "accuracy_rotation" in part(page, "In each run", "</p>")  # of DeeperCluster alone
    assert row_of(part(page, "<h2>Settings that differ", "</body>"), "method") == [
        "deepcluster", "swav", "deepercluster"
    ]  # fmt: skip
