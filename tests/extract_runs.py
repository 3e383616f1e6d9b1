"""Calls of extract.py with the tiny network, and what they should give."""

import numpy as np
import pytest
import torch

import data
import extract
from models import weights
from tests import small_run
from tests.small_run import SIZE


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """images/: 48 crops of 4 photographs; exp/: a run of two epochs on them."""
    root = tmp_path_factory.mktemp("work")
    small_run.train(small_run.write_crops(root / "images"), root / "exp")
    return root


def run(work, out, *flags, model="exp/checkpoint.pth.tar", images=None):
    network = [] if model is None else ["--model", str(work / model)]
    source = [str(images or work / "images")]
    arguments = [*source, "--out", str(out), *network, "--workers", "0", "--device", "cpu", *map(str, flags)]
    return extract.main(extract.get_parser().parse_args(arguments))


def plain(work, layer, model="exp/checkpoint.pth.tar", size=SIZE):
    """One image at a time in float64, batch norm as it stands: (N, ...)."""
    net = weights.load(work / model).double()
    view = data.PlainView(data.list_images(work / "images"), data.central_crop(size))
    with torch.no_grad():
        rows = [net.activations(data.normalise(view[i][0][None]).double(), [layer])[layer] for i in range(48)]
    return torch.cat(rows).numpy()


def close(a, b):
    return a.shape == b.shape and np.abs(a - b).max() <= 2e-5 * np.abs(b).max()
