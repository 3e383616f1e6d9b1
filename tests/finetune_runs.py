"""Short runs of the evaluations that fine-tune a whole network, on four photographs, to be compared."""

import os
import signal
from pathlib import Path

import pytest

import checkpoint
import eval_semisup
from evaluation import finetune
from tests import small_run
from tests.helpers import equal

COMMON = "--image-size 32 --workers 0 --device cpu"


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """train/ with 20 and val/ with 4 crops of each of four photographs."""
    root = tmp_path_factory.mktemp("labelled")
    small_run.write_crops(root / "train", each=20)
    small_run.write_crops(root / "val", each=4, first=50)
    return root


def call(script, *words):
    """The script's main on these words; those in one string are parted at blanks."""
    flags = [flag for word in words for flag in (word.split() if isinstance(word, str) else [str(word)])]
    return script.main(script.get_parser().parse_args([*flags, *COMMON.split()]))


def semisup(data: Path, exp: Path, *flags):
    """eval_semisup.py on the toy network, 8 images, three steps an epoch."""
    settings = "--model random:toy --epochs 2 --batch 3 --decay_epochs 1 --lr_last_layer 0.05"
    return call(eval_semisup, "--data", data, "--exp", exp, settings, *flags)


def assert_same_run(one: Path, other: Path, method: str, but: tuple[str, ...] = ()) -> None:
    """Checkpoints, networks of the best epochs, figures: bit for bit."""
    files = sorted(path.name for path in one.glob(f"{method}*.pth.tar"))
    assert files == sorted(path.name for path in other.glob(f"{method}*.pth.tar")) and len(files) > 1
    for file in files:
        a, b = (checkpoint.read(exp / file) for exp in (one, other))
        assert a.keys() == b.keys()
        for name in a.keys() - {"args", "record", *but}:
            assert equal(a[name], b[name]), (file, name)


def signal_at(step: int, monkeypatch) -> None:
    """SIGTERM comes in this step of a run, counted from 1; the run ends after the next one."""
    loss, steps = finetune.loss, []

    def with_signal(*args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(finetune, "loss", with_signal)
