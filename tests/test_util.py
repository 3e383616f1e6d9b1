"""Seeds, files, progress, the device, the end of a script."""

import argparse
import io
import os
import sys

import pytest
import torch

import util
from tests.helpers import refuses
from util import UserError


def test_seeds_depend_on_every_item_and_on_nothing_else():
    seeds = [
        util.derive_seed(31, "crop", 0, 1),
        util.derive_seed(31, "crop", 1, 0),
        util.derive_seed(31, "head", 0, 1),
        util.derive_seed(30, "crop", 0, 1),
    ]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(5)
    assert util.derive_seed(31, "crop", 0, 1) == seeds[0]
    assert util.derive_seed(31, "crop") == 5995406631238704700  # an old run's draws stay what they were


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError), util.atomic_write(path) as file:
        file.write("half")
        raise ValueError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with util.atomic_write(path) as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with (
        pytest.raises(UserError, match=r"cannot write .*missing"),
        util.atomic_write(tmp_path / "missing" / "b"),
    ):
        pass


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "a[1].txt"
    for name in ("a[1].txt.tmp-7", "a[1].txt.tmp-8", "a1.txt.tmp-9"):
        (tmp_path / name).write_text("half")
    with open(tmp_path / "a[1].txt.tmp-8") as held:
        assert util.try_lock(held)
        with util.atomic_write(path) as file:
            file.write("new")
            util.clear_left_over(path)  # as another process would
    assert sorted(os.listdir(tmp_path)) == ["a1.txt.tmp-9", "a[1].txt", "a[1].txt.tmp-8"]


def test_a_rename_is_made_to_last_by_its_folder(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(util, "sync_folder", done.append)
    (tmp_path / "b").write_text("b")
    util.rename(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "b" and done == [tmp_path]


def test_a_read_only_file_system_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refuses("permission denied"):
        util.make_folder(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: argparse.Namespace(f_flag=os.ST_RDONLY))
    with refuses("it is on a read-only file system"):
        util.make_folder(tmp_path)


def test_the_last_line_is_one_whatever_a_file_is_called(capsys):
    with pytest.raises(SystemExit):
        util.fail("a\nb\x1b[2J\u2028\x85 ü.jpg " + "c" * 10**6)
    line = capsys.readouterr().err
    assert (
        line.startswith("a\\nb\\x1b[2J\\u2028\\x85 ü.jpg ccc")
        and len(line.splitlines()) == 1
        and len(line) < 3000
    )


def test_progress_says_how_much_how_fast_and_how_long_still(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(util.time, "monotonic", lambda: now[0])
    progress = util.Progress(1281167, "features")
    now[0] += 10
    progress.update(14310)
    assert progress.line("x") == "features 14310/1281167  1431 img/s  eta 14:45  x"
    now[0] += 10
    assert progress.line().endswith("716 img/s  eta 29:31")


def test_plain_lines_come_now_and_then_where_there_is_no_terminal(monkeypatch, capsys, tmp_path):
    now = [0.0]
    monkeypatch.setattr(util.time, "monotonic", lambda: now[0])
    progress = util.Progress(100, "features", log=util.Log(tmp_path / "log"), every=30)
    for _ in range(100):
        now[0] += 1
        progress.update(1)
    progress.close("done")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["31/100", "62/100", "93/100", "100/100"]
    assert lines[-1] == "features 100/100 in 1:40, 1.00 img/s  done"
    written = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in written] == lines


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = util.Progress(10, "features", log=util.Log())
    progress.update(3)
    progress.close()
    out = capsys.readouterr().out
    assert out.startswith("\r\033[Kfeatures 3/10") and out.count("\n") == 1


def test_meter_is_weighted_by_the_number_of_items():
    meter = util.AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert meter.avg == 2.0


def test_clock():
    assert [util.clock(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]


def test_device_defaults_to_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert util.choose_device(None) == torch.device("cpu")
    with pytest.raises(UserError, match=r"use --device cpu"):
        util.choose_device("cuda")
    for name in ("gpu", "mps"):
        with pytest.raises(UserError, match=name):
            util.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert util.choose_device(None) == torch.device("cuda")
    with pytest.raises(UserError, match=r"has 2 GPU"):
        util.choose_device("cuda:2")


# ---------------------------------------------------------------------------------------- precision


def test_precisions_that_make_no_sense_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("tf32", "fp16"):
        with refuses(f"--precision {name}: for CUDA GPUs only"):
            util.set_precision(name, cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    with refuses(r"--precision bf16: .*AMX.*AVX512-BF16"):
        util.set_precision("bf16", cpu)


@pytest.mark.parametrize("has", ["amx_bf16", "avx512_bf16"])
def test_bf16_is_allowed_where_the_processor_has_it(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    with util.set_precision("bf16", torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_fp32_is_exact_and_a_network_can_be_exported_after_it():
    """torch.export reads the TF32 switches in a way that fails when only its newer ones were set."""
    with util.set_precision("fp32", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.mkldnn.enabled


# ---------------------------------------------------------------------------------------- how a script ends


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("--lr 0: no"), 2, "--lr 0: no"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (util.Preempted("stopped, go on with --resume auto"), 75, "--resume auto"),
        (util.Interrupted("stopped, go on with --resume auto"), 130, "--resume auto"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_script_is_one_line_and_a_code(monkeypatch, capsys, error, code, line):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py"])
    with pytest.raises(SystemExit) as end:
        util.run_main(main, argparse.Namespace())
    assert end.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("main.py: ") and line in err and err.count("\n") == 1


def test_what_is_no_mistake_of_the_user_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        util.run_main(lambda _: 1 / 0, argparse.Namespace())


def test_text_that_the_terminal_lacks_is_escaped_and_a_closed_output_is_told(monkeypatch, tmp_path):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert util.say("Müller/\udce9.png", ascii_only)
    ascii_only.seek(0)
    assert ascii_only.read() == "M\\xfcller/\\ufffd.png\n"
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert not util.say("x")
    monkeypatch.setattr(sys, "stdout", None)
    log = util.Log(tmp_path / "log")
    log("one")
    log("two")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == ["note: standard output is closed; going on, with this file alone", "one", "two"]


def test_a_folder_is_made_and_one_that_cannot_be_is_named(tmp_path):
    assert util.make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with refuses("cannot make the folder .*file"):
        util.make_folder(tmp_path / "file")
