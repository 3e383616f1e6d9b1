"""What ends a run, and how it ends: exit codes, one line, a checkpoint where there is one to write."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import training.labels
import training.run
from tests.helpers import ROOT
from tests.runs import ENVIRONMENT, assert_same_run, log_of, start, train, wait_for
from training.run import Run
from training.signals import HANDLED, Signals
from util import Interrupted, Preempted


def default_signals():
    """For a child: also where the tests themselves run in the background, with Ctrl-C ignored."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)


def begin(images, exp, *flags, **options):
    return start(images, exp, *flags, preexec_fn=default_signals, **options)


# ------------------------------------------------------------------------------- in this process


@pytest.fixture(autouse=True)
def none_ignored():
    """Also where the tests run in the background or under nohup, which let Ctrl-C and SIGHUP be ignored."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    default_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_raised_at_once_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=signal.Signals(number).name) as stop, Signals():
        signal.raise_signal(number)
    assert stop.value.exit_code == 75 and signal.getsignal(number) == before


def test_a_signal_that_is_held_is_raised_when_the_block_ends():
    done = []
    with pytest.raises(Interrupted) as stop, Signals() as signals:
        with signals.held():
            signal.raise_signal(signal.SIGINT)
            with signals.held():
                done.append("inner")
            done.append("outer")
    assert done == ["inner", "outer"] and stop.value.exit_code == 130


def test_an_error_in_a_held_block_is_what_is_raised():
    with pytest.raises(ZeroDivisionError), Signals() as signals, signals.held():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError


class Swallower:
    """Python writes what a destructor raises to the terminal, and goes on; as it does around a fork."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr("training.signals.AGAIN", 0.05)
    with pytest.raises(Preempted), Signals():
        Swallower()
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_no_handler_of_errors_takes_a_signal_for_one():
    with pytest.raises(Preempted), Signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            raise AssertionError("swallowed") from None


def test_what_was_ignored_from_the_start_stays_ignored():
    """nohup main.py: the terminal may close."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.asked is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_that_was_just_forked_does_not_answer_for_its_parent():
    with Signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    "number, kind", [(signal.SIGUSR1, Preempted), (signal.SIGINT, Interrupted), (signal.SIGHUP, Preempted)]
)
def test_a_signal_in_training_writes_a_checkpoint_first(photos, tmp_path, whole, monkeypatch, number, kind):
    original = Run._before_step

    def spy(self):
        if self.iteration == 5:
            signal.raise_signal(number)
        return original(self)

    exp = tmp_path / "exp"
    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(Run, "_before_step", spy)
        train(photos, exp)
    saved = checkpoint.read(exp / "checkpoint.pth.tar")
    assert (saved["epoch"], saved["iteration"], saved["position"]) == (1, 6, 2)
    train(photos, exp, "--resume", "auto")
    assert_same_run(exp, whole)


def test_a_signal_elsewhere_ends_the_run_at_once(photos, tmp_path, whole, monkeypatch):
    original = training.labels.PseudoLabels.take

    def spy(self, epoch, *found, **options):
        if epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        original(self, epoch, *found, **options)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="SIGTERM"):
        patch.setattr(training.labels.PseudoLabels, "take", spy)
        train(photos, tmp_path / "exp")
    assert signal.getsignal(signal.SIGTERM) == before
    train(photos, tmp_path / "exp", "--resume", "auto")
    assert_same_run(tmp_path / "exp", whole)


@pytest.mark.parametrize("at", ["features", "checkpoint", "clustering file"])
def test_a_signal_while_something_is_decoded_or_written(photos, tmp_path, whole, monkeypatch, at):
    """It is not taken for a broken image or a full disk; a checkpoint is written to its end."""
    exp = tmp_path / "exp"
    calls = []

    def once(function, when):
        def spy(*args, **options):
            calls.append(1)
            if len(calls) == when:
                signal.raise_signal(signal.SIGTERM)
            return function(*args, **options)

        return spy

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        if at == "features":
            patch.setattr("data.images.decode_bytes", once(training.run.data.decode.decode_bytes, 7))
        else:
            patch.setattr("torch.serialization._save", once(torch.serialization._save, 3))
        flags = ("--checkpoints", 1) if at == "checkpoint" else ()
        train(photos, exp, "--skip-bad-images", *flags)
    assert not list(exp.rglob("*.tmp-*")) and not (exp / "bad_images.txt").exists()
    train(photos, exp, "--resume", "auto")
    assert_same_run(exp, whole)


# ------------------------------------------------------------------------------- as users see it


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_signals_end_with_one_line_and_their_exit_code(photos, tmp_path, workers, number, code):
    """Sent to the whole group, as a terminal does, also while workers start."""
    exp = tmp_path / "exp"
    process = begin(photos, exp, "--epochs", 1000, "--workers", workers, start_new_session=True)
    wait_for(exp / "clusters", process)
    time.sleep(0.3 * (number % 3))
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    last = said.strip().splitlines()[-1]
    assert process.returncode == code, said
    assert "--resume auto" in last and "Traceback" not in said
    assert ("interrupted" in last) == (code == 130)


def test_ctrl_c_during_the_imports_is_one_line():
    code = (
        "import commandline, time; commandline.Parser('x').parse_args()\n"
        "print('on', flush=True); time.sleep(9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, env=ENVIRONMENT, preexec_fn=default_signals, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.endswith("interrupted\n") and len(said.splitlines()) == 1


def test_a_second_ctrl_c_ends_at_once():
    code = (
        "import signal, time; from training.signals import Signals\n"
        "with Signals() as signals, signals.held():\n"
        "    print('on', flush=True)\n"
        "    for _ in range(300): time.sleep(0.1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, env=ENVIRONMENT, preexec_fn=default_signals, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 130 and said.strip().endswith("interrupted")


def test_a_closed_output_pipe_is_a_note_in_the_log(photos, tmp_path):
    exp = tmp_path / "exp"
    process = begin(photos, exp, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == 0 and said == ""
    assert len(log_of(exp)) == 3
    assert "note: standard output is closed" in (exp / "train.log").read_text()


def test_an_ascii_terminal_gets_umlauts_escaped(photos, tmp_path):
    exp = tmp_path / "exp-ü"
    process = start(photos, exp, "--epochs", 1, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "exp-\\xfc" in said
