"""eval_voc_classif.py goes on where it was stopped, and only with the same settings."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)

import os
import signal

import numpy as np
import pytest

import checkpoint
import eval_voc_classif as script
from tests.helpers import equal, refuses
from tests.voc_folder import make_voc
from tests.voc_runs import arguments, model, save_network, state, vocdir  # noqa: F401
from training.steps import Steps
from util import Preempted


class Stop(Exception):
    pass


@pytest.mark.parametrize("resume", ["path", "auto"])
@pytest.mark.parametrize("fc6_8", ["0", "1"])
def test_resumed_run_equals_uninterrupted_run(vocdir, tmp_path, model, fc6_8, resume):
    flags = ("--nit", "11", "--stepsize", "4", "--lr", "0.01", "--fc6_8", fc6_8, "--train_batchnorm", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = script.main(arguments(vocdir, model, whole, *flags))

    def stop_after_seven(steps, batch, total, iteration, stop, step=Steps.step):
        if iteration == 7:
            raise Stop
        return step(steps, batch, total, iteration, stop)

    # Stopped in the second epoch, after the checkpoint of iteration 6, with one more step taken and lost.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Steps, "step", stop_after_seven)
        script.main(arguments(vocdir, model, parts, *flags, "--checkpoint-every", "3"))
    saved = parts / script.CHECKPOINT
    assert checkpoint.read(saved)["iteration"] == 6
    assert not (parts / "checkpoints").exists()  # the last one alone is kept
    resume = str(saved) if resume == "path" else "auto"
    results = script.main(arguments(vocdir, model, parts, *flags, "--resume", resume))

    assert results == expected
    assert equal(state(parts), state(whole))
    scores = [np.load(exp / script.SCORES)["scores"] for exp in (whole, parts)]
    assert np.array_equal(*scores)


def test_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(vocdir, tmp_path, model):
    flags = ("--nit", "9")

    def signalled(steps, batch, total, iteration, stop, step=Steps.step):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(steps, batch, total, iteration, stop)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted, match="--resume auto"):
        patch.setattr(Steps, "step", signalled)
        script.main(arguments(vocdir, model, tmp_path / "parts", *flags))
    assert checkpoint.read(tmp_path / "parts" / script.CHECKPOINT)["iteration"] == 4
    results = script.main(arguments(vocdir, model, tmp_path / "parts", *flags, "--resume", "auto"))
    assert results == script.main(arguments(vocdir, model, tmp_path / "whole", *flags))
    assert equal(state(tmp_path / "parts"), state(tmp_path / "whole"))


# In the middle of an epoch, at its end, and where one image is left over for the last batch.
@pytest.mark.parametrize(("nit", "batch"), [("5", "7"), ("8", "7"), ("5", "23")])
def test_finished_run_goes_on_to_more_iterations(vocdir, tmp_path, model, nit, batch):
    flags = ("--batch", batch, "--nit")
    script.main(arguments(vocdir, model, tmp_path / "exp", *flags, nit))
    assert checkpoint.read(tmp_path / "exp" / script.CHECKPOINT)["iteration"] == int(nit)
    again = script.main(arguments(vocdir, model, tmp_path / "exp", *flags, nit, "--resume", "auto"))
    assert "nothing to train" in (tmp_path / "exp" / script.LOG).read_text()
    results = script.main(arguments(vocdir, model, tmp_path / "exp", *flags, "11", "--resume", "auto"))
    whole = script.main(arguments(vocdir, model, tmp_path / "whole", *flags, "11"))
    assert results == whole != again
    assert equal(state(tmp_path / "exp"), state(tmp_path / "whole"))


def test_checkpoint_goes_on_only_with_the_same_settings(vocdir, tmp_path, model):
    exp = tmp_path / "exp"
    script.main(arguments(vocdir, model, exp))
    resume = ("--resume", str(exp / script.CHECKPOINT))
    other = save_network(tmp_path / "other.pth.tar")
    for flags, words in (
        (("--batch", "8"), "batch 7, not 8"),
        (("--fc6_8", "0"), "fc6_8 1, not 0"),
        (("--train_batchnorm", "1"), "train_batchnorm 0, not 1"),
        (("--split", "trainval"), "split train, not trainval"),
        (("--seed", "1"), "seed 31, not 1"),
        (("--nit", "4"), "more than --nit 4"),
        (("--model", str(other)), r"not .*other\.pth\.tar"),
    ):
        with refuses(words):
            script.main(arguments(vocdir, model, exp, *resume, *flags))
    with refuses("other images or labels"):
        script.main(arguments(make_voc(tmp_path, number=4), model, exp, *resume))
    with refuses("not a checkpoint of a run"):
        script.main(arguments(vocdir, model, tmp_path / "new", "--resume", str(model)))
    script.main(arguments(vocdir, model, exp, *resume, "--lr", "0.002", "--nit", "6"))
    assert "lr was 0.003 and is 0.002" in (exp / script.LOG).read_text()


def test_another_run_is_not_overwritten(vocdir, tmp_path, model):
    script.main(arguments(vocdir, model, tmp_path / "exp"))
    with refuses(r"holds another run \(voc_classif.pth.tar\); continue it with --resume"):
        script.main(arguments(vocdir, model, tmp_path / "exp", "--nit", "2"))


def test_run_lies_beside_the_run_that_it_evaluates(vocdir, tmp_path, model):
    """Nothing of a training in the same folder is touched."""
    exp = tmp_path / "exp"
    for name in ("checkpoint.pth.tar", "log.jsonl", "train.log", "config.json"):
        (exp / name).parent.mkdir(exist_ok=True)
        (exp / name).write_text("of the training")
    script.main(arguments(vocdir, model, exp))
    for name in ("checkpoint.pth.tar", "log.jsonl", "train.log", "config.json"):
        assert (exp / name).read_text() == "of the training"
