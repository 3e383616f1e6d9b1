"""The report: its charts, words and warnings, both files, and logs of every kind and damage."""

import json
import math
import re
import shutil
import time
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.helpers import ROOT, refuses
from visu import charts, report, summary
from visu import records as run_records


def record(epoch, k=100, loss=3.0, largest=200, classes=True, **more):
    line = {
        "epoch": epoch,
        "seconds": {"features": 9.0, "pca": 6.0, "clustering": 1.0, "train": 34.0, "total": 50.0},
        "clustering_loss": 3000.0 - epoch,
        "clusters": {"number": k, "nonempty": k, "min": 11, "median": 35.0, "max": largest, "entropy": 4.4},
        "loss": loss,
        "loss_over_log_k": loss / math.log(max(k, 2)),
        "peak_memory_gib": 1.5,
    }
    if epoch > 0:
        line |= {"nmi_previous": 0.71, "ami_previous": 0.63}
    if classes:
        line |= {"nmi_classes": 0.62, "ami_classes": 0.59}
    return line | more


def config(**args):
    defaults = {"dir": "images", "arch": "alexnet", "clustering": "Kmeans", "nmb_cluster": 100, "epochs": 3}
    return {
        "args": defaults | args,
        "images": {"root": "images", "number": 4000, "classes": None},
        "versions": {"torch": "2"},
        "command": ["main.py", "<images> & more"],
    }


def write_run(exp, records, configuration=None):
    exp.mkdir(exist_ok=True)
    (exp / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if configuration is not None:
        (exp / "config.json").write_text(json.dumps(configuration))
    return exp


def axes_of(name, records):
    """The axes that the panel of this name drew."""
    (panel,) = [panel for panel in charts.panels_of(records) if panel.name == name]
    with matplotlib.rc_context(charts.STYLE):
        axes = Figure().subplots()
        charts.draw(axes, panel, records)
    return axes


def panel_names(records):
    return [panel.name for panel in charts.panels_of(records)]


def same_ids_nowhere(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    return len(ids) == len(set(ids))


# ---------------------------------------------------------------------------------------- the charts


def test_convnet_loss_stands_against_log_k_of_each_epoch():
    records = [record(5, k=300, loss=5.0), record(6, k=500, loss=4.0)]  # PIC, resumed
    loss, reference = axes_of("loss", records).lines
    assert loss.get_xdata().tolist() == [5, 6] and loss.get_ydata().tolist() == [5.0, 4.0]
    assert reference.get_ydata().tolist() == pytest.approx([math.log(300), math.log(500)])
    assert "log k" in reference.get_label()


def test_first_epoch_has_a_gap_against_the_previous_one():
    nmi, ami = axes_of("previous", [record(0), record(1), record(2)]).lines
    assert np.isnan(nmi.get_ydata()[0]) and nmi.get_ydata()[1:].tolist() == [0.71, 0.71]
    assert ami.get_ydata()[1:].tolist() == [0.63, 0.63]


def test_panels_are_those_of_which_the_log_holds_numbers():
    whole = ["loss", "clustering-loss", "cluster-sizes", "previous", "classes", "seconds"]
    assert panel_names([record(0), record(1)]) == whole
    assert panel_names([record(0, classes=False)]) == ["loss", "clustering-loss", "cluster-sizes", "seconds"]
    swav = {
        "epoch": 0,
        "loss": 6.1,
        "loss_over_log_k": 0.9,
        "lr": 0.3,
        "seconds": {"train": 5.0, "total": 5.0},
    }
    assert panel_names([swav]) == ["loss", "lr", "seconds"]
    assert panel_names([{"epoch": 0, "accuracy_rotation": 0.4}]) == ["rotation"]
    assert panel_names([{"epoch": 0}]) == []


def test_numbers_that_no_panel_knows_get_a_line_under_their_name():
    records = [{"epoch": e, "queue_share": e / 4, "note": "text"} for e in range(3)]
    assert panel_names(records) == ["other-0"]
    axes = axes_of("other-0", records)
    assert axes.get_title(loc="left") == "Queue share"
    assert axes.lines[0].get_ydata().tolist() == [0, 0.25, 0.5]


def test_loss_stands_against_what_the_run_compared_it_to():
    """SwAV has no clusters in its log, but a loss of guessing."""
    records = [{"epoch": e, "loss": 5.0, "loss_over_log_k": 5.0 / math.log(3000)} for e in range(2)]
    _, guess = axes_of("loss", records).lines
    assert guess.get_ydata().tolist() == pytest.approx([math.log(3000)] * 2)
    assert "of log k = 8.006" in " ".join(summary.words(records, {}))
    assert len(axes_of("loss", [{"epoch": 0, "loss": 5.0}]).lines) == 1


def test_seconds_are_stacked_to_the_total_in_a_fitting_unit():
    axes = axes_of("seconds", [record(0), record(1)])
    tops = {}
    for bar in axes.patches:
        tops.setdefault(round(bar.get_x(), 3), []).append((bar.get_y(), bar.get_height()))
    assert axes.get_ylabel() == "seconds" and len(tops) == 2
    for parts in tops.values():
        assert [height for _, height in parts] == [9, 6, 1, 34]
        assert [bottom for bottom, _ in parts] == [0, 9, 15, 16]
    slow = record(0, seconds={"features": 3600.0, "train": 9000.0, "total": 12600.0})
    axes = axes_of("seconds", [slow])
    assert axes.get_ylabel() == "hours" and [bar.get_height() for bar in axes.patches] == [1.0, 2.5]


def test_cluster_sizes_reach_from_the_smallest_to_the_largest():
    axes = axes_of("cluster-sizes", [record(0), record(1, largest=400)])
    box = axes.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (11, 400) and axes.get_yscale() == "log"
    (bar,) = axes_of("cluster-sizes", [record(0)]).patches
    assert (bar.get_y(), bar.get_y() + bar.get_height()) == (11, 200)


@pytest.mark.parametrize("epochs", [1, 2, 7, 200])
def test_epochs_are_whole_numbers(epochs):
    axes = axes_of("clustering-loss", [record(e) for e in range(epochs)])
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)


# ---------------------------------------------------------------------------------------- words and warnings


def test_last_numbers_in_words():
    text = " ".join(summary.words([record(0), record(1, loss=2.5)], config()))
    assert "2 epochs of 3 done on 4,000 images; the last is epoch 1." in text
    assert "training loss is 2.500, 54% of log k = 4.605" in text
    assert "100 of 100 clusters are filled, with 11 to 200 images (5.0% of the images), median 35." in text
    assert "previous epoch: NMI 0.710, AMI 0.630" in text and "the classes: NMI 0.620, AMI 0.590" in text
    assert "took 50.0 s, 68% of it training" in text


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(e) for e in range(3)], []),
        ([record(0, largest=2001)], ["collapse: the largest cluster holds 2,001 of 4,000"]),
        ([record(0, largest=3000), record(1)], ["in an earlier epoch"]),
        ([record(e, loss=4.59) for e in range(2)], []),  # at log k, but still warming up
        ([record(e, loss=4.59) for e in range(3)], ["stuck at log k = 4.605"]),
        ([record(e, loss=8.0) for e in range(3)], ["far above log k = 4.605, .* diverges; try a lower --lr"]),
        ([record(0, k=1, largest=4000, loss_over_log_k=0.0) | {"loss": 0.0}], ["only one cluster"]),
        (
            [record(0, clusters={"number": 100, "nonempty": 60, "min": 1, "median": 5, "max": 9})],
            ["40 of 100"],
        ),
    ],
)
def test_warnings_are_said_when_they_should_be(records, expected):
    found = summary.warnings_of(records, config())
    assert len(found) == len(expected)
    assert all(re.search(part, line) for part, line in zip(expected, found))


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("records", "panels", "height"),
    [
        ([record(0, classes=False)], 4, 1050),
        ([record(e, k=90 + e) for e in range(200)], 6, 1050),
        ([record(e) for e in range(4, 7)], 6, 1050),
        ([record(e, lr=0.1) for e in range(60)], 7, 1480),
        ([{"epoch": 0, "loss": 1.0, "clusters": {"number": 4, "min": 1, "median": 2, "max": 3}}], 2, 650),
    ],
    ids=["one epoch, no classes", "200 epochs, k varies", "starts at 4", "more", "hardly anything"],
)
def test_both_files_are_written_for_every_kind_of_run(tmp_path, records, panels, height):
    exp = write_run(tmp_path / "exp", records, config())
    png, page = report.write_report(exp)
    with Image.open(png) as image:
        assert image.size == (1600, height) and image.format == "PNG"
        grey = np.asarray(image.convert("L"))
    assert grey[0, 0] == 255 and 0.02 < (grey < 250).mean() < 0.6
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == panels == text.count("<figure") and same_ids_nowhere(text)
    assert len(re.findall(r"<tr><th scope=\"row\">\d+</th>", text)) == len(records)
    assert sorted(p.name for p in exp.iterdir()) == ["config.json", "log.jsonl", "report.html", "report.png"]


def test_page_is_self_contained_and_follows_the_dark(tmp_path):
    _, path = report.write_report(write_run(tmp_path / "exp", [record(0), record(1)], config()))
    page = path.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!#|data:)', re.sub(r'href="#', 'href="#', page))
    assert "@import" not in page and "<script" not in page
    charts_part = page[page.index('<div class="charts">') : page.index("<h2>Settings")]
    assert set(re.findall(r"#[0-9a-f]{6}\b", charts_part)) <= {"#000000"}  # colours are variables
    assert "var(--ink)" in charts_part and "var(--blue)" in charts_part
    # every reference into an SVG finds its target
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= ids


def test_page_tells_settings_and_numbers_and_escapes_them(tmp_path):
    exp = write_run(tmp_path / "<exp>{{words}}", [record(0), record(1, largest=3000)], config(sobel=True))
    page = report.write_report(exp)[1].read_text(encoding="utf-8")
    assert "&lt;exp&gt;{{words}}" in page and "<exp>" not in page
    assert '<th scope="row">nmb_cluster</th><td>100</td>' in page
    assert '<th scope="row">sobel</th><td>yes</td>' in page
    assert "&lt;images&gt; &amp; more" in page and "<images>" not in page
    assert "<td>3.0000</td>" in page and "<td>2,999</td>" in page
    assert '<p class="warning">Warning: collapse' in page
    assert "clusters.html" not in page
    (exp / "clusters.html").touch()
    assert '<a href="clusters.html">' in report.write_report(exp)[1].read_text(encoding="utf-8")


def test_warnings_show_in_the_picture(tmp_path):
    calm = report.write_report(write_run(tmp_path / "exp", [record(0)], config()))[0].read_bytes()
    alarmed = report.write_report(write_run(tmp_path / "exp", [record(0, largest=3999)], config()))[0]
    with Image.open(alarmed) as image:
        first_line = np.asarray(image.convert("L"))[60:85]
    assert calm != alarmed.read_bytes() and (first_line < 128).sum() > 300


def test_title_names_run_and_method(tmp_path):
    exp = write_run(tmp_path / "mine", [record(0)], config() | {"method": "swav"})
    assert "<h1>Run mine: swav</h1>" in report.write_report(exp)[1].read_text(encoding="utf-8")
    exp = write_run(tmp_path / "mine", [record(0)], config())
    assert "<h1>Run mine</h1>" in report.write_report(exp)[1].read_text(encoding="utf-8")


def test_settings_that_were_asked_for_come_first_and_the_others_are_folded(tmp_path):
    command = ["main.py", "images", "--k", "100", "--crop-cache=here"]
    configuration = config(crop_cache="here", momentum=0.9, workers=4) | {"command": command}
    exp = write_run(tmp_path / "exp", [record(0)], configuration)
    page = report.write_report(exp)[1].read_text(encoding="utf-8")
    first, folded = page[page.index("<h2>Settings") :].split("<details><summary>All other settings")
    for name in ("arch", "nmb_cluster", "crop_cache"):
        assert f'<th scope="row">{name}</th>' in first
    for name in ("momentum", "workers", "torch version", "command"):
        assert f'<th scope="row">{name}</th>' in folded and f'<th scope="row">{name}</th>' not in first


def test_a_number_of_clusters_that_was_not_used_is_no_setting_of_the_picture():
    assert "nmb_cluster 100" in summary.settings_line([record(0, k=100)], config())
    assert "nmb_cluster" not in summary.settings_line([record(0, k=37)], config())


def test_run_without_config_and_with_broken_lines(tmp_path, capsys):
    exp = write_run(tmp_path / "exp", [record(0), record(1)])
    with open(exp / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "loss"\n' + json.dumps(record(3)) + '\n{"ep')
    report.main(SimpleNamespace(exp=str(exp)))
    page = (exp / "report.html").read_text(encoding="utf-8")
    assert "3 epochs done; the last is epoch 3" in page
    assert "lines 3, 5 (2) of exp/log.jsonl cannot be read" in page
    out = capsys.readouterr().out
    assert str(exp / "report.html") in out and "warning: lines 3, 5 (2) of exp/log.jsonl" in out


def test_twenty_thousand_epochs_take_seconds(tmp_path):
    exp = write_run(tmp_path / "exp", [record(e, loss=3.0 + e / 1e5) for e in range(20_000)], config())
    start = time.process_time()
    _, path = report.write_report(exp)
    assert time.process_time() - start < 20
    page = path.read_text(encoding="utf-8")
    assert len(page) < 5e6 and "All epochs (1,000 of 20,000)" in page
    assert "20000 epochs" in page and '<th scope="row">19999</th>' in page  # the last one is there


def test_thinned_records_keep_both_ends():
    records = [{"epoch": e} for e in range(2345)]
    kept = [record["epoch"] for record in run_records.thinned(records)]
    assert len(kept) == len(set(kept)) == 1000 and (kept[0], kept[-1]) == (0, 2344)
    assert run_records.thinned(records[:1000]) == records[:1000]


AWKWARD = [
    None, True, -1, 0, 1e308, -1e308, 10**400, math.nan, math.inf, "text", "\ud800", [], [1], {},
    {"min": "x"}, {"number": 0, "nonempty": -5, "min": 0, "median": -1, "max": 0}, {"total": 1.0},
    {"total": 0, "train": -3.0}, {"a\ud800b": 3.0, "total": 3.0},
]  # fmt: skip


def awkward_records(values):
    names = [name for name in record(1) if name != "epoch"] + ["other $x_", "<b>"]
    records = [record(1) | {name: value} for value in values for name in names]
    return records + [{"epoch": 2} | dict.fromkeys(names, value) for value in values]


@pytest.mark.parametrize("values", [AWKWARD, [0], [-1], AWKWARD[15:16], AWKWARD[17:18]], ids=range(5))
def test_a_log_of_another_shape_makes_a_report_all_the_same(tmp_path, values):
    exp = write_run(tmp_path / "exp", awkward_records(values))
    report.write_report(exp)
    assert "<b>" not in (exp / "report.html").read_text(encoding="utf-8")


def without_charts(exp):
    """The page of a report, and all that is said in it, without its charts."""
    records, broken, configuration = report.read_run(exp)
    sentences = summary.words(records, configuration)
    warnings = report.all_warnings(exp, records, broken, configuration)
    summary.settings_line(records, configuration)
    return report.fill_page(exp, "title", sentences, warnings, {}, records, configuration)


@pytest.mark.parametrize("awkward", AWKWARD, ids=range(len(AWKWARD)))
def test_settings_of_another_shape_make_a_report_or_one_line(tmp_path, awkward):
    exp = write_run(tmp_path / "exp", [record(0)], config())
    for name in config():
        changed = config() | {name: awkward}
        (exp / "config.json").write_text(json.dumps(changed))
        if isinstance(awkward, type(config()[name])):
            without_charts(exp)
        else:
            with refuses("not the settings of a run"):
                report.write_report(exp)
    changed = config(**dict.fromkeys(("arch", "epochs", "start_epoch", "nmb_cluster", "\ud800<b>"), awkward))
    changed |= {"images": {"number": awkward, "classes": awkward}, "command": [awkward, "--lr"]}
    (exp / "config.json").write_text(json.dumps(changed))
    assert "<b>" not in without_charts(exp)
    without_charts(exp).encode()


def test_a_report_of_a_real_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "exp")
    page = report.write_report(tmp_path / "exp")[1].read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "2 epochs done on 60 images" in page
    assert "<h1>Run exp: deepcluster</h1>" in page


@pytest.mark.parametrize("name", ["kmeans", "pic"])
def test_reports_of_runs_of_the_first_version(tmp_path, name):
    shutil.copytree(ROOT / "tests" / "files" / "v1" / name, tmp_path / "exp")
    assert report.write_report(tmp_path / "exp")[1].read_text(encoding="utf-8").count("<svg") == 6


def test_mistakes_are_told_in_one_line(tmp_path):
    with refuses(r"log\.jsonl is missing"):
        report.write_report(tmp_path)
    (tmp_path / "log.jsonl").touch()
    with refuses("no epoch is complete"):
        report.write_report(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(b"[1]\n\xff\xfe\n")
    with refuses("no line of it is an epoch"):
        report.write_report(tmp_path)
    write_run(tmp_path, [record(0)])
    (tmp_path / "config.json").write_text("{")
    with refuses(r"config\.json: not valid JSON"):
        report.write_report(tmp_path)
