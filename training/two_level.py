"""DeeperCluster's training: which views a rank is dealt, and the sub-classifiers that go with them."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import distributed
from data import ImageList
from data.sampling import ShareSampler, uniform_draws
from models.two_level import SubClassifiers
from training.optim import sgd
from util import UserError, derive_seed


def levels(super_classes: int, turns: int, k: int) -> tuple[int, int]:
    """(super-clusters, sub-classes in each); UserError where the flags do not fit each other."""
    if super_classes % turns:
        raise UserError(f"--super_classes {super_classes}: with rotations a multiple of 4, or --rotnet false")
    coarse = super_classes // turns
    if k < coarse:
        raise UserError(f"--k {k}: less than one sub-class for each of {coarse} super-clusters")
    return coarse, k // coarse


def check_precision(precision: str) -> None:
    """Refuse fp16 over processes: each would scale the gradients of its own sub-classifiers differently."""
    if precision == "fp16" and distributed.world_size() > 1:
        raise UserError("--precision fp16: not in several processes; give bf16, tf32 or fp32")


def check_enough(clusters: int, most: int, images: ImageList) -> None:
    """Refuse more clusters than images, of which at most `most` are used."""
    if clusters > min(len(images), most):
        raise UserError(
            f"--k {clusters}: more clusters than images, of {images.name} there are "
            f"{min(len(images), most)}; 20 or more a cluster are advised"
        )
    if len(images) < 2:
        raise UserError(f"{images.name}: {len(images)} image is not enough to cluster")


def filled_super_clusters(ids: np.ndarray, fine: int) -> np.ndarray:
    """The super-clusters that hold images, ascending; ids (N,): super-cluster * fine + sub-class."""
    return np.unique(ids // fine)


def global_batches(draws: int, batch: int) -> list[range]:
    """The draws of each step of an epoch, as training/run.py takes them."""
    sampler = ShareSampler(np.empty(draws, np.int8), batch)
    starts = range(0, sampler.steps * batch, batch)
    return [range(start, start + total) for start, (total, _) in zip(starts, sampler.shares())]


def classes_of(rows: range, classes: int) -> np.ndarray:
    """The classes of these draws of an epoch, in order, (len(rows),) int64.

    Dealt out in turn over the whole epoch, so that every batch and the epoch have as many of each, to one.
    """
    return np.sort(np.arange(rows.start, rows.stop) % classes)


def held_classes(classes: int, batch: int, draws: int, rank: int, ranks: int) -> range:
    """The classes of the rows that a rank is dealt, in the global batches of an epoch of so many draws."""
    batches = global_batches(draws, batch)
    found: set[int] = set()
    for rows in [*batches[:classes], batches[-1]]:  # what a batch begins with repeats after so many
        own = classes_of(rows, classes)[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]
        found |= {int(which) for which in own[[0, -1]]} if len(own) else set()
    return range(min(found), max(found) + 1) if found else range(0)


def by_super_class(
    ids: np.ndarray, fine: int, active: np.ndarray, turns: int, total: int, batch: int, seed: int
) -> np.ndarray:
    """The draws of an epoch, (total, 2) int64: image and quarter turns, ordered by class in every batch.

    ids (N,): the cluster of each image, super-cluster * fine + sub-class; active: the super-clusters that
    hold images. The classes are (super-cluster, turn) pairs, each of which gets as many draws as any other,
    to one; within one they are uniform over its sub-classes. Draws of different classes, and of other seeds,
    are independent.
    """
    classes = len(active) * turns
    class_ids = np.concatenate([classes_of(rows, classes) for rows in global_batches(total, batch)])
    draws = np.empty((total, 2), np.int64)
    for which in range(classes):
        places = np.flatnonzero(class_ids == which)
        members = np.flatnonzero(ids // fine == active[which // turns])
        drawn = uniform_draws(ids[members] % fine, len(places), derive_seed(seed, "class", which))
        draws[places, 0], draws[places, 1] = members[drawn], which % turns
    return draws


class SubHeads:
    """The sub-classifiers of this rank with their optimiser; a part of a run.

    classes: number of active super-classes, held by the ranks that are dealt their views; their gradients are
    summed over those alone. `make` makes them anew.
    """

    def __init__(self, device: torch.device, lr: float, momentum: float, weight_decay: float) -> None:
        self.device, self._sgd = device, (lr, momentum, weight_decay)
        self.module: SubClassifiers | None = None
        self.optimizer: torch.optim.SGD | None = None
        self._shape: dict[str, int] = {}
        self._groups: list[tuple[int, Any]] = []

    def make(self, dim: int, outputs: int, classes: int, batch: int, draws: int, seed: int) -> None:
        """Fresh sub-classifiers of `outputs` sub-classes for each of the classes; on every rank at once."""
        self._shape = {"dim": dim, "outputs": outputs, "classes": classes, "batch": batch, "draws": draws}
        size = distributed.world_size()
        every = [held_classes(classes, batch, draws, r, size) for r in range(size)]
        held = every[distributed.rank()]
        self.module = SubClassifiers(dim, outputs, held, seed).to(self.device)
        self.optimizer = sgd(self.module.parameters(), *self._sgd)
        holders = [[r for r in range(size) if s in every[r]] for s in range(classes)]
        self._owned = [s for s in held if holders[s][0] == distributed.rank()]
        # All ranks make all groups, in the same order, as torch wants it.
        groups = [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in holders]
        self._groups = [(held.index(s), groups[s]) for s in held if groups[s] is not None]

    def scale(self, place: torch.Tensor, total: int) -> torch.Tensor:
        """Views of the global batch for each one of a class, (classes,) float32; on every rank at once.

        place (B,): the class of each of this rank's views; total: views of all ranks.
        """
        own = torch.bincount(place, minlength=self._shape["classes"])
        return total / distributed.all_reduce(own).clamp(min=1)

    def reduce(self, _: int = 0) -> None:
        """Gradients of a classifier: the sum over the ranks that hold it, over the number of all ranks."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            for place, group in self._groups:
                dist.all_reduce(parameter.grad[place], group=group)
            parameter.grad /= distributed.world_size()

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, every classifier once: call it on every one."""
        if self.module is None:
            return {"shape": {}}
        places = [self.module.held.index(s) for s in self._owned]
        state: dict[str, Any] = {"shape": dict(self._shape)}
        for name, parameter in self.module.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            moved = torch.zeros_like(parameter) if momentum is None else momentum
            state[name], state[f"{name} momentum"] = (
                self._gather(tensor.detach()[places]) for tensor in (parameter, moved)
            )
            state["stepped"] = momentum is not None
        return state

    def _gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        whole = distributed.gather_rows(np.ascontiguousarray(rows.cpu().numpy()))
        return None if whole is None else torch.from_numpy(whole)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The classifiers as they were, on any number of ranks."""
        if not state["shape"]:
            return
        self.make(seed=0, **state["shape"])
        held = slice(self.module.held.start, self.module.held.stop)
        for name, parameter in self.module.named_parameters():
            with torch.no_grad():
                parameter.copy_(state[name][held])
            if state["stepped"]:
                self.optimizer.state[parameter]["momentum_buffer"] = state[f"{name} momentum"][held].to(
                    self.device
                )


class Hits:
    """How well super-classes, sub-classes and rotations are told in an epoch; a part of a run."""

    def __init__(self) -> None:
        # views; right super-class, sub-class, both, rotation; losses of both
        self._sums = torch.zeros(7, dtype=torch.float64)

    def see(
        self,
        logits: torch.Tensor,
        super_class: torch.Tensor,
        sub: torch.Tensor,
        loss_super: torch.Tensor,
        loss_sub: torch.Tensor,
        turn: torch.Tensor,
        turns: int,
    ) -> None:
        """Views of this rank: logits (B, S), super-classes (B,), whether the sub-class was told (B,)."""
        told = logits.detach().argmax(1)
        right = told == super_class
        counts = [right.sum(), sub.sum(), (right & sub).sum(), (told % turns == turn).sum()]
        sums = torch.stack([*counts, loss_super.detach(), loss_sub.detach()]).double().cpu()
        self._sums += torch.cat([torch.tensor([len(told)], dtype=torch.float64), sums])

    def finish(self) -> dict[str, float]:
        """Means over the epoch's views, the same on every rank; starts anew."""
        views, *sums = distributed.all_reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        names = (
            "accuracy_super",
            "accuracy_sub",
            "accuracy_joint",
            "accuracy_rotation",
            "loss_super",
            "loss_sub",
        )
        return {name: value / max(views, 1) for name, value in zip(names, sums)}

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks: call it on every one."""
        return {"sums": distributed.all_reduce(self._sums.clone())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = state["sums"].clone() if distributed.is_main() else torch.zeros_like(self._sums)
