"""Fine-tuning of a whole network with labels: the loop of every evaluation that trains all of it.

    tuned = Tuned(run.network(net, sync_bn=True), len(train.class_names), plan, again=len(subsets) > 1)
    histories = finetune(run, tuned, plan, subsets, judge, protocol)

A run is one training, or several one after the other, which differ in their images: each begins with the same
network under a fresh head. Randomness comes from (seed, epoch of the run, position), so that the first of
several is, bit for bit, the one that runs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import distributed
from data import ImageList, PlainView, RandomView, Transform, make_loader, train_crop
from data.sampling import ShareSampler, shuffled
from evaluation.probe import History, Tally, count, judge, make_linear, rows_of_crops
from features import Pass, activations_of
from models.network import Network
from models.parallel import at_least_float32
from training import logs
from training.optim import set_rate, sgd, stepped
from training.run import Run
from util import Log, Progress, UserError

NETWORK = "network"  # the one line that History keeps here
Record = dict[str, float]  # loss, prec@1 and prec@5 in percent


@dataclass(frozen=True)
class Plan:
    """How a network is fine-tuned: by SGD, one rate for the network and one for its head.

    Both rates are multiplied by gamma as each of decay_epochs begins, counted from 0.
    """

    epochs: int
    lr: float
    lr_head: float
    gamma: float
    decay_epochs: Sequence[int]
    weight_decay: float
    momentum: float
    image_size: int

    def rates(self, epoch: int) -> tuple[float, float]:
        """(rate of the network, rate of its head) in an epoch."""
        return tuple(stepped(lr, self.gamma, self.decay_epochs, epoch) for lr in (self.lr, self.lr_head))

    def describe(self) -> dict[str, Any]:
        """Its lines of the protocol."""
        at = f", times {self.gamma:g} at epochs {' '.join(map(str, self.decay_epochs))}"
        return {
            "image size": self.image_size,
            "train crops": "random, 8 to 100 % of the area, flipped or not",
            "lr": f"{self.lr:g}, head {self.lr_head:g}" + (at if self.decay_epochs else ""),
            "weight decay": self.weight_decay,
            "momentum": self.momentum,
            "batch norm": "trained, statistics over the batches of all processes",
        }


class Tuned:
    """A network, on its device, under a head for `classes`, with an optimiser for each of the two.

    again: it may begin again as it was given, for which its weights are held twice.
    """

    def __init__(self, net: Network, classes: int, plan: Plan, again: bool = False) -> None:
        net.set_head(classes, seed=0)  # `begin` draws it
        self.net, self.names = net, ("optimizer", "head")
        how = (plan.momentum, plan.weight_decay)
        self.optimizers = [
            sgd(parameters, lr, *how)
            for parameters, lr in zip((net.body_parameters(), net.top_layer.parameters()), plan.rates(0))
        ]
        self.given = {name: value.clone() for name, value in net.state_dict().items()} if again else None

    def begin(self, seed: int) -> None:
        """The network as it was given, a head as PyTorch draws it from this seed, no momentum."""
        if self.given is not None:
            self.net.load_state_dict(self.given)
        head = self.net.top_layer
        head.load_state_dict(make_linear(head.in_features, head.out_features, seed).state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def set_rates(self, rates: tuple[float, float]) -> None:
        """Of the network and of its head."""
        for optimizer, rate in zip(self.optimizers, rates):
            set_rate([optimizer], rate)


def finetune(
    run: Run,
    tuned: Tuned,
    plan: Plan,
    subsets: Sequence[ImageList],
    judged: Callable[[str], Record],
    protocol: dict[str, Any],
) -> list[History]:
    """Train on each of the subsets in turn, from where the run stands; what each of them came to.

    judged(label): a pass over the images that are reported, after each epoch. Writes the network of each best
    epoch to METHOD_best.pth.tar, of several subsets to METHOD_best_<number>.pth.tar.
    """
    tally, histories = Tally(1), [History([NETWORK], "val") for _ in subsets]
    run.keep(net=tuned.net, **dict(zip(tuned.names, tuned.optimizers)), tally=tally)
    run.keep(**{f"history_{number}": history for number, history in enumerate(histories)})
    files = best_files(run.method, len(subsets))
    if run.resumed:
        for name in files:
            distributed.on_main(logs.take_over, name, run.origin, run.exp)
    for epoch in run.epochs(plan.epochs * len(subsets)):
        number, own = divmod(epoch, plan.epochs)  # own: of this training
        images, history = subsets[number], histories[number]
        if own == 0 and run.position == 0:
            tuned.begin(run.seed("head", number))
        tuned.set_rates(plan.rates(own))
        order = shuffled(len(images), run.seed("order", epoch))
        step_loss = partial(loss, torch.from_numpy(images.classes), tally)
        view = RandomView(images, train_crop(plan.image_size))
        run.train_pass(tuned.net, tuned.optimizers, view, order, step_loss)
        steps = (own + 1) * len(ShareSampler(np.arange(len(images)), run.batch))
        history.add(own, steps, {"train": tally.records(), "val": [judged(f"epoch {epoch} val")]})
        tally.clear()
        of = f"is epoch {own} of training {number} (0 to {len(subsets) - 1})  " if len(subsets) > 1 else ""
        run.log(f"epoch {epoch} {of}{history.line(NETWORK)}")
        if history.best(NETWORK) is history.last(NETWORK) and run.is_main:
            save_best(run.exp / files[number], tuned.net, history, images, vars(run.args), protocol)
        run.finish_epoch(training=number, **{s: history.last(NETWORK)[s] for s in ("train", "val")})
    return histories


def best_files(method: str, number: int) -> list[str]:
    """The names of the files of the best epochs of so many trainings."""
    return (
        [f"{method}_best.pth.tar"] if number == 1 else [f"{method}_best_{i}.pth.tar" for i in range(number)]
    )


def save_best(
    path: Path,
    net: Network,
    history: History,
    images: ImageList,
    settings: dict[str, Any],
    protocol: dict[str, Any],
) -> None:
    """The network after the last epoch, the best one so far, in a file that everything here opens."""
    checkpoint.save(path, {
        "arch": net.arch,
        "state_dict": net.state_dict(),
        "epoch": history.last(NETWORK)["epoch"] + 1,
        "record": history.last(NETWORK),
        "class_names": images.class_names,
        "bits": images.bits,
        "args": settings,
        "inputs": net.inputs.state_dict(),
        "protocol": protocol,
    })  # fmt: skip


def loss(
    labels: torch.Tensor, tally: Tally, net: nn.Module, x: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the classes of the images index (B,), summed over them; x (B, 3, S, S).

    labels (N,) int64. The tally counts what was got right, on the random crops, in train mode.
    """
    target = labels[index].to(x.device, non_blocking=True)
    logits = at_least_float32(net(x))
    value = F.cross_entropy(logits, target, reduction="sum")
    tally.add(count(value.detach(), logits.detach(), target)[None])
    return value


def judge_images(
    net: Network, images: ImageList, crop: Transform, how: Pass, label: str, log: Log
) -> tuple[Record, list[int]]:
    """One pass over labelled images, net in eval mode: (the same record on every rank, broken images).

    crop gives one view or ten of each image, whose mean softmax counts. Broken ones do not count. Raises
    UserError where what the network gives is not finite.
    """
    view, rows = PlainView(images, crop), distributed.share_of(len(images))
    progress = Progress(len(rows), label, log=log)
    labels, tally = torch.from_numpy(images.classes), Tally(1)
    counts, broken = torch.zeros(1, 4, dtype=torch.float64), []
    loader = make_loader(view, how.batch, how.workers, how.device, sampler=rows)
    for found, batch in activations_of(net, ["logits"], rows_of_crops(loader), how.device, how.precision):
        if found:
            counts += judge([found["logits"]], labels[batch.index].to(how.device)).cpu()
        broken += batch.broken
        progress.update(len(batch.index) + len(batch.broken))
    progress.close()
    tally.add(counts)
    (record,) = tally.records()
    if not np.isfinite(record["loss"]):
        raise UserError(f"{label}: the loss is {record['loss']}; start again with a lower --lr")
    return record, sorted(i for part in distributed.gather_objects(broken) for i in part)


def judge_split(
    run: Run, net: Network, images: ImageList, crop: Transform, how: Pass, skip_bad: bool, label: str
) -> Record:
    """`judge_images`; images that cannot be decoded leave the list, or end the run."""
    record, broken = judge_images(net, images, crop, how, label, run.log)
    data.leave_out(images, data.reasons(images, broken), run.exp / "bad_images.txt", skip_bad, run.log)
    return record


def announce(run: Run, protocol: dict[str, Any]) -> None:
    """Say what is about to happen."""
    images = ", ".join(f"{protocol[name]} {name}" for name in ("train images", "val images", "classes"))
    ranks = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    run.log(f"{protocol['data']}: {images}")
    run.log(f"{protocol['network']} on {run.device}{ranks}; {protocol['trained']} trains")
    run.log(f"global batch {run.batch}; lr {protocol['lr']}")


def line(record: Record, what: str) -> str:
    """A record for the log."""
    return f"{what}: prec@1 {record['prec@1']:.2f} prec@5 {record['prec@5']:.2f} loss {record['loss']:.4f}"
