"""Who may write into EXP, and which checkpoint a run goes on from."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys

import pytest

import checkpoint
from tests.helpers import ROOT, refuses
from tests.runs import ENVIRONMENT, assert_same_run, log_of, start, train, wait_for
from training.folder import Folder, origin_of, runs_beside
from util import Log


def find(exp, resume="auto"):
    """(the checkpoint that is found, what was said)."""
    said = []
    return Folder(exp, "checkpoint.pth.tar").find(resume, said.append), said


def test_auto_takes_the_furthest_by_what_the_files_say(whole, tmp_path):
    """Not by their times: an archive was unpacked, a file touched, a clock set back."""
    exp = shutil.copytree(whole, tmp_path / "exp")
    os.utime(exp / "checkpoints" / "checkpoint_0.pth.tar", (2**32, 2**32))
    os.utime(exp / "checkpoint.pth.tar", (1, 1))
    assert find(exp) == (str(exp / "checkpoint.pth.tar"), [])
    (exp / "checkpoint.pth.tar").unlink()
    assert find(exp)[0] == str(exp / "checkpoints" / "checkpoint_3.pth.tar")


def test_auto_on_a_finished_run_stays_finished(photos, whole, tmp_path, capsys):
    exp = shutil.copytree(whole, tmp_path / "exp")
    os.utime(exp / "checkpoints" / "checkpoint_0.pth.tar", (2**32, 2**32))
    train(photos, exp, "--resume", "auto")
    assert "has its 3 epochs" in capsys.readouterr().out
    assert_same_run(exp, whole)


def spoil(path):
    """The last bytes of a file are gone."""
    path.write_bytes(path.read_bytes()[:-100])


def test_auto_passes_over_broken_and_foreign_files_with_a_warning(photos, whole, tmp_path, capsys):
    exp = shutil.copytree(whole, tmp_path / "exp")
    spoil(exp / "checkpoint.pth.tar")
    (exp / "checkpoints" / "checkpoint_9.pth.tar").write_text("my notes")
    checkpoint.save(exp / "checkpoints" / "checkpoint_8.pth.tar", {"epoch": "two", "iteration": 3})
    state = checkpoint.read(exp / "checkpoints" / "checkpoint_3.pth.tar")
    state["state_dict"]["features.0.weight"][0] = float("nan")
    checkpoint.save(exp / "checkpoints" / "checkpoint_3.pth.tar", state)
    train(photos, exp, "--resume", "auto", "--checkpoints", 3)
    said = capsys.readouterr().out
    assert said.count("warning: passed over") == 4 and "Traceback" not in said
    assert "checkpoint_2.pth.tar in epoch 1 after 6" in said
    assert_same_run(exp, whole)


def test_auto_begins_and_goes_on(photos, tmp_path, whole, capsys):
    exp = train(photos, tmp_path / "exp", "--resume", "auto", "--epochs", 1, "--checkpoints", 3)
    said = capsys.readouterr().out
    assert "resuming" not in said and "this is a new run" in said
    (exp / "checkpoint.pth.tar").unlink()
    train(photos, exp, "--resume", "auto", "--checkpoints", 3)
    assert "checkpoint_1.pth.tar in epoch 0 after 3" in capsys.readouterr().out
    assert_same_run(exp, whole)


def test_after_going_back_auto_does_not_take_the_old_future(photos, whole, tmp_path, monkeypatch):
    """Back to iteration 3 with another learning rate, killed soon after: auto goes on with that."""
    exp = shutil.copytree(whole, tmp_path / "exp")
    again = ("--lr", 0.01, "--checkpoints", 3)
    middle = exp / "checkpoints" / "checkpoint_1.pth.tar"
    train(photos, exp, *again, "--epochs", 1, "--resume", middle)
    assert (exp / "checkpoints" / "checkpoint_2.pth.tar.replaced").is_file()
    train(photos, exp, *again, "--resume", "auto")
    other = train(photos, tmp_path / "other", *again, "--resume", whole / "checkpoints/checkpoint_1.pth.tar")
    assert_same_run(exp, other)
    assert log_of(exp)[2]["loss"] != log_of(whole)[2]["loss"]


def test_a_new_run_beside_checkpoints_is_refused_also_where_they_are_broken(photos, whole, tmp_path):
    exp = shutil.copytree(whole, tmp_path / "exp")
    spoil(exp / "checkpoint.pth.tar")
    with refuses(r"holds another run.*--resume"):
        train(photos, exp)


def test_a_checkpoint_belongs_to_the_folder_above():
    assert origin_of("a/exp/checkpoints/checkpoint_3.pth.tar").name == "exp"
    assert origin_of("a/exp/checkpoint.pth.tar").name == "exp"


# ------------------------------------------------------------------------------- the lock


def test_a_second_process_in_the_same_folder_is_refused_and_readers_are_not(photos, tmp_path):
    exp = tmp_path / "exp"
    first = start(photos, exp, "--epochs", 1000, "--checkpoints", 1)
    wait_for(exp / "checkpoint.pth.tar", first)
    for flags in ((), ("--resume", "auto")):
        with refuses(rf"in use by process {first.pid} on \S+; choose another folder"):
            train(photos, exp, *flags)
    train(photos, tmp_path / "reader", "--epochs", 1, "--init", exp / "checkpoints" / "checkpoint_0.pth.tar")
    first.kill()
    first.communicate()
    epochs = checkpoint.read(exp / "checkpoint.pth.tar")["epoch"] + 1
    train(photos, exp, "--resume", "auto", "--epochs", epochs)  # it died with its process
    assert len(log_of(exp)) == epochs


def test_the_second_process_ends_with_exit_code_2(photos, tmp_path):
    folder = Folder(tmp_path / "exp", "checkpoint.pth.tar")
    folder.open()
    second = start(photos, tmp_path / "exp")
    said, _ = second.communicate(timeout=120)
    folder.close()
    assert (
        second.returncode == 2 and f"in use by process {os.getpid()}" in said and len(said.splitlines()) == 1
    )


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    """A forked child: loaders' workers live on for seconds when the main process is killed."""
    code = (
        "import os, time; from training.folder import Folder\n"
        f"Folder({str(tmp_path)!r}, 'checkpoint.pth.tar').open()\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60)\n"
        "print(child, flush=True); time.sleep(60)\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stdout=pipe, text=True
    )
    child = int(process.stdout.readline())
    with refuses("in use"):
        Folder(tmp_path, "checkpoint.pth.tar").open()
    process.kill()
    process.wait()
    folder = Folder(tmp_path, "checkpoint.pth.tar")
    folder.open()
    folder.close()
    os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    Folder(tmp_path, "checkpoint.pth.tar").open()


def test_files_of_dead_processes_are_cleared_and_those_of_living_ones_are_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    dead = [tmp_path / f"checkpoint.pth.tar.tmp-{process.pid}"]
    dead += [
        tmp_path / "checkpoints" / f"checkpoint_3.pth.tar.tmp-{process.pid}",
        tmp_path / "clusters.tmp-x",
    ]
    living = tmp_path / f"config.json.tmp-{os.getppid()}"
    (tmp_path / "checkpoints").mkdir()
    for path in (*dead, living):
        path.write_text("")
    folder = Folder(tmp_path, "checkpoint.pth.tar")
    folder.open()
    folder.close()
    assert living.exists() and not any(path.exists() for path in dead)
    assert runs_beside(str(os.getppid())) and not runs_beside(str(process.pid)) and not runs_beside("9" * 30)


def test_two_methods_may_work_in_one_folder(tmp_path):
    folders = [Folder(tmp_path, name) for name in ("checkpoint.pth.tar", "eval_linear.pth.tar")]
    for folder in folders:
        folder.open()
    for folder in folders:
        folder.close()


def test_nothing_is_said_where_there_is_nothing(tmp_path):
    assert find(tmp_path, None) == (None, [])
    assert Folder(tmp_path, "checkpoint.pth.tar").find("auto", Log(quiet=True)) is None


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "eval_linear.pth.tar"])
def test_checkpoints_are_those_of_the_method(tmp_path, name):
    folder = Folder(tmp_path, name)
    (tmp_path / name).write_text("")
    folder.periodic(3).write_text("")
    (tmp_path / "checkpoints" / "other_1.pth.tar").write_text("")
    assert [path.name for path in folder.checkpoints()] == [name, name.replace(".pth", "_3.pth")]
