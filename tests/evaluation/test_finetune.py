"""Fine-tuning: schedules at epochs computed by hand, two learning rates, a training that begins again."""

import numpy as np
import pytest
import torch

import models
from data import ImageList, PlainView, RandomView, central_crop, list_images, ten_crops, to_input, train_crop
from data.sampling import shuffled
from evaluation import finetune
from evaluation.few_labels import drawn_mask
from evaluation.finetune import Plan, Tuned
from evaluation.probe import Tally, make_linear
from features import Pass
from models import weights
from tests.finetune_runs import labelled, semisup  # noqa: F401
from util import Log, derive_seed

CPU = torch.device("cpu")
SEED = 31
# What the protocols say: Caron et al., ICCV 2019 (everything at one rate) and NeurIPS 2020 (10 %, 1 %).
ALL = Plan(100, 0.1, 0.1, 0.1, [30, 60, 90], 1e-4, 0.9, 224)
TEN = Plan(20, 0.01, 0.2, 0.2, [12, 16], 0.0, 0.9, 224)
ONE = Plan(20, 0.02, 5.0, 0.2, [12, 16], 0.0, 0.9, 224)


@pytest.mark.parametrize(
    "plan, epoch, rates",
    [
        (ALL, 0, (0.1, 0.1)), (ALL, 29, (0.1, 0.1)), (ALL, 30, (0.01, 0.01)), (ALL, 59, (0.01, 0.01)),
        (ALL, 60, (1e-3, 1e-3)), (ALL, 89, (1e-3, 1e-3)), (ALL, 90, (1e-4, 1e-4)), (ALL, 99, (1e-4, 1e-4)),
        (TEN, 11, (0.01, 0.2)), (TEN, 12, (0.002, 0.04)), (TEN, 15, (0.002, 0.04)), (TEN, 16, (4e-4, 0.008)),
        (ONE, 0, (0.02, 5.0)), (ONE, 12, (0.004, 1.0)), (ONE, 19, (8e-4, 0.2)),
    ],
)  # fmt: skip
def test_rates_fall_as_an_epoch_begins(plan, epoch, rates):
    assert plan.rates(epoch) == pytest.approx(rates)


def test_the_first_step_moves_network_and_head_each_at_its_own_rate(labelled, tmp_path, monkeypatch):  # noqa: F811
    """One step on all images, computed here by autograd from the same crops; the head starts as PyTorch's."""
    saved = {}
    monkeypatch.setattr(finetune, "save_best", lambda path, net, *_: saved.update(net.state_dict()))
    flags = "--labels_perc 10 --epochs 1 --batch 64 --lr 0.01 --lr_last_layer 0.2"
    semisup(labelled, tmp_path / "exp", flags)

    train = list_images(labelled / "train")
    few = train.keep(drawn_mask(train.classes, 10, derive_seed(SEED, "few labels", 0)))
    net = weights.load("random:toy", seed=SEED).train()
    net.set_head(4)
    net.top_layer = make_linear(24, 4, derive_seed(SEED, "head", 0))
    assert net.top_layer.bias.any() and net.top_layer.weight.abs().max() <= 24**-0.5
    order = shuffled(len(few), derive_seed(SEED, "order", 0))
    view = RandomView(few, train_crop(32)).at(SEED, 0)
    crops = [view.view(derive_seed(SEED, "crop", 0, place), int(i)) for place, i in enumerate(order)]
    logits = net(to_input(torch.stack(crops), CPU))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(few.classes[order])).backward()
    assert len(few) == 8
    for name, p in net.named_parameters():
        rate = 0.2 if name.startswith("top_layer") else 0.01
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(saved[name], p.detach() - rate * p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_training_that_begins_again_is_as_it_was_but_for_its_head():
    net = models.build("toy", seed=1)
    tuned = Tuned(net, 5, TEN, again=True)
    tuned.begin(7)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    net.train()(x).square().mean().backward()
    for optimizer in tuned.optimizers:
        optimizer.step()
    assert not torch.equal(net.body[1].running_mean, first["body.1.running_mean"])
    tuned.begin(8)
    for name, value in net.state_dict().items():
        assert torch.equal(value, first[name]) == (not name.startswith("top_layer")), name
    assert not any(optimizer.state for optimizer in tuned.optimizers)
    tuned.begin(7)
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


def test_everything_but_sobel_trains_and_each_parameter_once():
    net = models.build("tiny", sobel=True, seed=1)
    tuned = Tuned(net, 5, TEN)
    groups = [{p for group in o.param_groups for p in group["params"]} for o in tuned.optimizers]
    assert groups[1] == set(net.top_layer.parameters()) and not groups[0] & groups[1]
    sobel = set(net.sobel.parameters())
    assert groups[0] | groups[1] == set(net.parameters()) - sobel


def test_a_pass_over_val_counts_what_one_image_at_a_time_gives(labelled):  # noqa: F811
    images: ImageList = list_images(labelled / "val")
    net = models.build("toy", num_clusters=4, seed=3).eval()
    torch.nn.init.normal_(net.top_layer.weight, generator=torch.Generator().manual_seed(1))
    for crop in (central_crop(32), ten_crops(32)):
        record, broken = finetune.judge_images(net, images, crop, Pass(5, 0, CPU), "val", Log(quiet=True))
        hits, losses = [], []
        with torch.no_grad():
            for i in range(len(images)):
                views = PlainView(images, crop)[i][0]
                logits = net(to_input(views.reshape(-1, 3, 32, 32), CPU)).double()
                hits.append(logits.softmax(1).mean(0).argmax().item() == images.classes[i])
                central = logits[4 if len(logits) == 10 else 0]
                losses.append(-central.log_softmax(0)[images.classes[i]].item())
        assert broken == [] and record["prec@1"] == pytest.approx(100 * np.mean(hits))
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert record["prec@5"] == 100  # of four classes


def test_the_loss_is_a_sum_and_the_tally_counts_it():
    tally, net = Tally(1), torch.nn.Identity()
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([1, 0, 1, 0])  # of four images, of which the batch holds 1, 0, 2
    value = finetune.loss(labels, tally, net, scores, torch.tensor([1, 0, 2]))
    expected = sum(np.log1p(np.exp(-margin)) for margin in (2.0, 1.0, -3.0))
    assert value.item() == pytest.approx(expected)
    assert tally.records()[0]["loss"] == pytest.approx(expected / 3)
    assert tally.records()[0]["prec@1"] == pytest.approx(200 / 3)
