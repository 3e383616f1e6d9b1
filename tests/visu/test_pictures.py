"""The pictures at the end of a run."""

import pytest

import main
from tests import small_run
from tests.visu.test_gallery import page_of
from util import UserError
from visu import report


def train(photos, exp):
    """One epoch that ends with its pictures."""
    flags = f"{photos} --exp {exp} --arch tiny --image-size {small_run.SIZE} --k 5 --batch 16 --workers 0"
    main.main(main.get_parser().parse_args([*flags.split(), "--device", "cpu", "--epochs", "1"]))


def test_a_run_ends_with_its_report_and_its_gallery(photos, tmp_path, capsys):
    exp = tmp_path / "exp"
    train(photos, exp)
    assert sum(cluster["size"] for cluster in page_of(exp / "clusters.html")["clusters"]) == 60
    assert '<a href="clusters.html">' in (exp / "report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert f"report: {exp}/report.html, {exp}/report.png" in out and f"{exp}/clusters.html" in out


@pytest.mark.parametrize("error", [UserError("no disk"), OSError(28, "no disk")])
def test_a_report_that_fails_does_not_undo_the_training(photos, tmp_path, capsys, monkeypatch, error):
    def fail(exp):
        raise error

    monkeypatch.setattr(report, "write_report", fail)
    train(photos, tmp_path / "exp")
    assert "no report: " in (out := capsys.readouterr().out) and "no disk" in out
    assert (tmp_path / "exp" / "checkpoint.pth.tar").is_file()
