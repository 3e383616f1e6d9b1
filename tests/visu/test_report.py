import json
import math
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from util import UserError
from visu import charts, report


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


def axes_of(panel, records):
    """The axes that a panel drew."""
    with matplotlib.rc_context(charts.STYLE):
        axes = Figure().subplots()
        charts.draw(axes, panel, records)
    return axes


def same_ids_nowhere(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    return len(ids) == len(set(ids))


# ---------------------------------------------------------------------------------------- the charts


def test_convnet_loss_stands_against_log_k_of_each_epoch():
    records = [record(5, k=300, loss=5.0), record(6, k=500, loss=4.0)]  # PIC, resumed
    loss, reference = axes_of(charts.convnet_loss, records).lines
    assert loss.get_xdata().tolist() == [5, 6] and loss.get_ydata().tolist() == [5.0, 4.0]
    assert reference.get_ydata().tolist() == pytest.approx([math.log(300), math.log(500)])
    assert "log k" in reference.get_label()


def test_first_epoch_has_a_gap_against_the_previous_one():
    nmi, ami = axes_of(charts.with_previous, [record(0), record(1), record(2)]).lines
    assert np.isnan(nmi.get_ydata()[0]) and nmi.get_ydata()[1:].tolist() == [0.71, 0.71]
    assert ami.get_ydata()[1:].tolist() == [0.63, 0.63]


def test_what_a_run_lacks_is_said_instead_of_drawn():
    one = [record(0, classes=False)]
    for panel, text in (
        (charts.with_previous, "needs two epochs"),
        (charts.with_classes, "no class folders"),
    ):
        axes = axes_of(panel, one)
        assert not axes.lines and any(text in t.get_text() for t in axes.texts)


def test_seconds_are_stacked_to_the_total_in_a_fitting_unit():
    axes = axes_of(charts.seconds, [record(0), record(1)])
    tops = {}
    for bar in axes.patches:
        tops.setdefault(round(bar.get_x(), 3), []).append((bar.get_y(), bar.get_height()))
    assert axes.get_ylabel() == "seconds" and len(tops) == 2
    for parts in tops.values():
        assert [height for _, height in parts] == [9, 6, 1, 34]
        assert [bottom for bottom, _ in parts] == [0, 9, 15, 16]
    slow = record(0, seconds={"features": 3600.0, "train": 9000.0, "total": 12600.0})
    axes = axes_of(charts.seconds, [slow])
    assert axes.get_ylabel() == "hours" and [bar.get_height() for bar in axes.patches] == [1.0, 2.5]


def test_cluster_sizes_reach_from_the_smallest_to_the_largest():
    axes = axes_of(charts.cluster_sizes, [record(0), record(1, largest=400)])
    box = axes.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (11, 400) and axes.get_yscale() == "log"
    (bar,) = axes_of(charts.cluster_sizes, [record(0)]).patches
    assert (bar.get_y(), bar.get_y() + bar.get_height()) == (11, 200)


@pytest.mark.parametrize("epochs", [1, 2, 7, 200])
def test_epochs_are_whole_numbers(epochs):
    axes = axes_of(charts.clustering_loss, [record(e) for e in range(epochs)])
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)


# ---------------------------------------------------------------------------------------- words and warnings


def test_last_numbers_in_words():
    text = " ".join(report.words([record(0), record(1, loss=2.5)], config()))
    assert "2 epochs of 3 done on 4,000 images; the last is epoch 1." in text
    assert "loss is 2.500, 54% of log k = 4.605" in text
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
        ([record(e, loss=4.59) for e in range(3)], ["100% of log k"]),
        ([record(0, k=1, largest=4000, loss_over_log_k=0.0) | {"loss": 0.0}], ["only one cluster"]),
        (
            [record(0, clusters={"number": 100, "nonempty": 60, "min": 1, "median": 5, "max": 9})],
            ["40 of 100"],
        ),
    ],
)
def test_warnings_are_said_when_they_should_be(records, expected):
    found = report.warnings_of(records, config())
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found))


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "records",
    [
        [record(0, classes=False)],
        [record(e, k=90 + e) for e in range(200)],
        [record(e) for e in range(4, 7)],
        [
            {
                "epoch": 0,
                "loss": 1.0,
                "clusters": {"number": 4, "nonempty": 4, "min": 1, "median": 2, "max": 3},
            }
        ],
    ],
    ids=["one epoch, no classes", "200 epochs, PIC", "starts at 4", "hardly anything"],
)
def test_both_files_are_written_for_every_kind_of_run(tmp_path, records):
    exp = write_run(tmp_path / "exp", records, config())
    png, page = report.write_report(exp)
    with Image.open(png) as image:
        assert image.size == (1600, 1050) and image.format == "PNG"
        grey = np.asarray(image.convert("L"))
    assert grey[0, 0] == 255 and 0.02 < (grey < 250).mean() < 0.6
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 6 and text.count("<figure") == 6 and same_ids_nowhere(text)
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


def test_run_without_config_and_with_a_cut_last_line(tmp_path, capsys):
    exp = write_run(tmp_path / "exp", [record(0), record(1)])
    with open(exp / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "loss"')
    report.main(SimpleNamespace(exp=str(exp)))
    assert "2 epochs done; the last is epoch 1" in (exp / "report.html").read_text(encoding="utf-8")
    assert str(exp / "report.html") in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"log\.jsonl is missing"):
        report.write_report(tmp_path)
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UserError, match="no epoch is complete"):
        report.write_report(tmp_path)
    write_run(tmp_path, [record(0)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        report.write_report(tmp_path)
