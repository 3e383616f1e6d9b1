"""What SwAV and DeepCluster-v2 tell of a run, and what LARC does under a gradient scaler."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import assign
from tests.test_methods import images, train
from training.logs import advice, read_lines
from training.multicrop import PrototypeUse
from training.optim import LARC, sgd

images = images  # the fixture


def use_of(scores, z):
    said = []
    use = PrototypeUse(scores.shape[1], {"epsilon": 0.05, "base_lr": 1.0}, said.append)
    for part in range(2):
        use.see(scores[part::2], z[part::2])
    saved = PrototypeUse(scores.shape[1], {}, said.append)
    saved.load_state_dict(use.state_dict())
    figures = use.finish()
    assert saved.finish() == figures
    return figures, said


def test_use_of_prototypes_computed_by_hand():
    scores = torch.eye(4)[[0, 0, 1, 2]]
    figures, said = use_of(scores, torch.eye(4)[[0, 0, 0, 1]])
    assert figures["largest_prototype"] == 0.5 and not said
    assert figures["effective_prototypes"] == pytest.approx(2 * math.sqrt(2))  # of entropy 1.5 ln 2
    assert figures["mean_cosine"] == pytest.approx(0.5)  # of 1 in the first batch of two, of 0 in the second


def test_a_collapse_is_told_with_its_cures():
    _, said = use_of(torch.eye(4)[[0, 0, 0, 2]], torch.eye(4))
    assert "collapse, one prototype has 75% of the images; try --epsilon 0.03" in said[0]
    assert "alike" not in said[0] and "--freeze_prototypes_niters" in said[0] and "--lr" not in said[0]
    _, said = use_of(torch.eye(4)[[0, 0, 0, 0]], torch.eye(4)[[1, 1, 1, 1]])
    assert "100% of the images, and all embeddings of a batch are alike" in said[0]


def test_advice_names_the_flags_of_the_method():
    swav, v2 = {"base_lr": 1, "epsilon": 0.05}, {"base_lr": 1}
    assert "--epsilon 0.03" in advice(2, 8.0, 8.006, swav) and "--base_lr" in advice(2, 8.0, 8.006, swav)
    assert "--epsilon" not in advice(2, 8.0, 8.006, v2) and "--nmb_prototypes" in advice(2, 8.0, 8.006, v2)
    assert "lower --base_lr" in advice(2, 9.0, 8.006, v2) and "lower --lr" in advice(2, 9.0, 8.006)
    assert "higher --lr or a smaller --k" in advice(2, 8.0, 8.006) and advice(2, 6.0, 8.006, swav) is None


@pytest.mark.parametrize("method", ["swav", "deepclusterv2"])
def test_constant_images_end_with_the_collapse_warning(method, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(np.full((40, 40, 3), 128, np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
    flags = ["--arch", "toy", "--jitter_strength", 0]
    exp = train(method, tmp_path / "images", tmp_path / "exp", *flags)
    assert "warning: collapse" in (exp / "train.log").read_text()


@pytest.mark.parametrize("method", ["swav", "deepclusterv2"])
def test_new_images_are_assigned_by_a_run(method, images, tmp_path):
    exp = train(method, images, tmp_path / "exp", epochs=1)
    words = ["--run", str(exp), str(images), "--out", str(tmp_path / "out.csv"), "--workers", "0"]
    labels, distances = assign.main(assign.get_parser().parse_args(words))
    assert len(labels) == 60 and (distances >= 0).all()
    if method == "swav":  # whose labels are those of central crops by the network as it ended
        rows = (exp / "assignments.csv").read_text().splitlines()[1:]
        assert labels.tolist() == [int(row.split(",")[1]) for row in rows]


def test_a_run_says_what_its_batch_and_queue_mean(images, tmp_path):
    exp = train("swav", images, tmp_path / "exp", "--nmb_prototypes", 60, epochs=2)
    said = (exp / "train.log").read_text()
    assert "by linear scaling of the paper's it would be 0.0187" in said or "0.0188" in said
    assert "a queue of 32 embeddings, used from iteration 5 on" in said  # epoch 1 of 3 steps, 2 batches
    assert "48 samples for 60 prototypes" in said
    assert [line["queue_in_use"] for line in read_lines(exp / "log.jsonl")] == [False, True]


# ------------------------------------------------------------------------------------ LARC and scalers


def scaled_step(scale, gradient):
    """p, its optimiser, after a step on a loss scaled by `scale` (None: unscaled), and one more."""
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARC(sgd([p], 0.5, 0.9, 0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for g in (torch.tensor([0.6, 0.8]), gradient):
        optimizer.zero_grad()
        scaler.scale((p * g).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return p.detach(), optimizer.state_dict()["state"][0]["momentum_buffer"]


def test_a_step_under_a_scaler_is_the_one_without():
    for one, other in zip(
        scaled_step(1024.0, torch.tensor([0.1, 0.3])), scaled_step(None, torch.tensor([0.1, 0.3]))
    ):
        assert torch.allclose(one, other, rtol=1e-6)


def test_a_step_with_infinite_gradients_changes_nothing_momentum_included():
    once = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARC(sgd([once], 0.5, 0.9, 0.01))
    once.grad = torch.tensor([0.6, 0.8])
    optimizer.step()
    p, momentum = scaled_step(1024.0, torch.tensor([math.inf, 0.0]))
    assert torch.allclose(p, once) and torch.allclose(
        momentum, optimizer.state_dict()["state"][0]["momentum_buffer"]
    )


def test_every_parameter_takes_part_in_larc():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = LARC(sgd(net.parameters(), 1.0, 0.0, 0.1), trust=0.001)
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    F.mse_loss(net(torch.randn(6, 3, generator=generator)), torch.randn(6, 4, generator=generator)).backward()
    optimizer.step()
    for name, p in net.named_parameters():
        moved = (p - before[name]).norm() / before[name].norm()
        if name != "0.bias":  # whose gradient a batch norm behind it makes rounding alone
            assert 0.0003 < moved < 0.0011, name  # by the trust, biases and batch norm too
