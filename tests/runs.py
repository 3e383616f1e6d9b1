"""Runs of main.py with the tiny network, to be interrupted, resumed and compared bit for bit."""

import os
import subprocess
import sys
import time

import checkpoint
import main
from tests.helpers import ROOT, equal
from training import logs

FLAGS = (
    "--arch tiny --sobel --image-size 32 --k 8 --batch 16 --workers 0 --device cpu --lr 0.02 --epochs 3 "
    "--no-report"
)
TIMES = ("seconds", "images_per_second", "peak_memory_gib")  # of a log line: differ from run to run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def arguments(images, exp, *flags):
    return main.get_parser().parse_args([str(images), "--exp", str(exp), *FLAGS.split(), *map(str, flags)])


def train(images, exp, *flags):
    """Three epochs of 60 images, 4 steps each; exp."""
    main.main(arguments(images, exp, *flags))
    return exp


def start(images, exp, *flags, launcher=(), **options):
    """The same run as a process of its own, its output in one pipe."""
    command = [sys.executable, *launcher, "-m", "tests.tiny", str(images), "--exp", str(exp)]
    command += [*FLAGS.split(), *map(str, flags)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    options = {"env": ENVIRONMENT} | options
    return subprocess.Popen(command, cwd=ROOT, **options)


def wait_for(path, process, seconds=120):
    """Until the file is there, as long as the process runs."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.01)


def log_of(exp):
    """The log without what is of the machine."""
    lines = logs.read_lines(exp / "log.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in lines]


def assert_same_run(a, b):
    """Weights, optimisers, assignment, logs: everything but the times and the folder."""
    one, two = (checkpoint.read(exp / "checkpoint.pth.tar") for exp in (a, b))
    assert one.keys() == two.keys()
    for name in one.keys() - {"args", "record"}:
        assert equal(one[name], two[name]), name
    assert_same_labels(a, b)
    assert log_of(a) == log_of(b)


def assert_same_labels(a, b):
    assert (a / "clusters").read_bytes() == (b / "clusters").read_bytes()
    assert (a / "assignments.csv").read_bytes() == (b / "assignments.csv").read_bytes()
