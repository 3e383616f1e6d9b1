"""Optimisers and learning rates. A schedule is a function of the steps done: it gives the next one's rate."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from training.schema import check_optimizer

Schedule = Callable[[int], float]


def sgd(
    parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD over those of the parameters that train (not Sobel)."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load momentum and the like; learning rate, decay and momentum's factor stay those of the optimiser.

    Raises ValueError where what was saved has another shape than its parameter: fused steps do not look.
    """
    check_optimizer("its state", state)
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        if i >= len(parameters):
            raise ValueError(f"it has a parameter number {i}, here are {len(parameters)}")
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or name == "step":  # which Adam counts in a tensor
                continue
            if value.shape != parameters[i].shape or value.dtype != parameters[i].dtype:
                is_not = f"{tuple(value.shape)} {value.dtype}, not {tuple(parameters[i].shape)}"
                raise ValueError(f"{name} of parameter {i} is {is_not} {parameters[i].dtype}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def set_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give every group of the optimisers this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def stepped(lr: float, gamma: float, at: Sequence[int], epoch: int) -> float:
    """The rate of an epoch, counted from 0: lr, times gamma for each of the epochs `at` that has begun."""
    return lr * gamma ** sum(epoch >= start for start in at)


def bottou(lr: float, weight_decay: float) -> Schedule:
    """lr / sqrt(1 + lr * weight_decay * steps): Bottou, 'Stochastic Gradient Descent Tricks', 2012."""
    return lambda steps: lr / math.sqrt(1 + lr * weight_decay * steps)


def halved(lr: float, every: int) -> Schedule:
    """lr, halved after every so many steps."""
    return lambda steps: lr * 0.5 ** (steps // every)


def cosine_by_epoch(lr: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """lr / 2 * (1 + cos(pi e / epochs)) all through epoch e, counted from 0: SwAV's linear probe."""
    return lambda steps: lr / 2 * (1 + math.cos(math.pi * (steps // steps_per_epoch) / epochs))


def in_steps(lr: float, drops: Iterable[int], warmup: int) -> Schedule:
    """lr, a tenth after each of the steps in drops; over the first `warmup` steps it rises from lr / 1000.

    As torchvision's reference training of detectors.
    """
    drops = sorted(drops)

    def rate(steps: int) -> float:
        rising = 0.001 + 0.999 * steps / warmup if steps < warmup else 1.0
        return lr * rising * 0.1 ** sum(steps >= drop for drop in drops)

    return rate


def polynomial(lr: float, steps_in_all: int, power: float = 0.9) -> Schedule:
    """lr * (1 - steps / steps_in_all)**power: torchvision's reference training of segmentation."""
    return lambda steps: lr * max(1 - steps / steps_in_all, 0.0) ** power


def cosine(
    base: float, final: float, epochs: int, warmup: int, start: float, steps_per_epoch: int
) -> Schedule:
    """Linear from start to base over the warm-up epochs, then a cosine to final: Caron et al., NeurIPS 2020.

    Both ends of the warm-up belong to it: its last step has the rate base, and so has the first one of the
    cosine, whose T steps are final + (base - final) / 2 * (1 + cos(pi t / T)), t from 0.
    """
    rising, falling = warmup * steps_per_epoch, (epochs - warmup) * steps_per_epoch

    def rate(steps: int) -> float:
        if steps < rising:
            return start + (base - start) * steps / max(rising - 1, 1)
        return final + (base - final) / 2 * (1 + math.cos(math.pi * (steps - rising) / max(falling, 1)))

    return rate


class LARC:
    """Layer-wise adaptive rates around SGD: You, Gitman, Ginsburg, arXiv 1708.03888, as apex computes them.

    Before the SGD step, for every parameter of norm above 0 whose gradient is not 0:
    g <- (g + wd p) * trust * |p| / (|g| + wd |p| + eps); SGD then takes no decay of its own. Other gradients
    stay as they are, without decay. Momentum runs on the scaled gradients. It can be handed to a GradScaler,
    which unscales the gradients before the step.
    """

    def __init__(self, optimizer: torch.optim.SGD, trust: float = 0.001, eps: float = 1e-8) -> None:
        self.optimizer, self.trust, self.eps = optimizer, trust, eps
        self.decay = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad
        self.state_dict = optimizer.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `restore`."""
        restore(self.optimizer, state)
        self.param_groups = self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Scale the gradients, then one step of SGD."""
        for group, decay in zip(self.optimizer.param_groups, self.decay):
            for p in group["params"]:
                if p.grad is not None:
                    self._scale(p, decay)
        self.optimizer.step()

    def _scale(self, p: torch.Tensor, decay: float) -> None:
        weight, gradient = p.norm(), p.grad.norm()
        local = self.trust * weight / (gradient + decay * weight + self.eps)
        counts = (weight > 0) & (gradient > 0)  # without a branch: a GPU need not wait for the answer
        p.grad.add_(p * torch.where(counts, decay, 0.0)).mul_(torch.where(counts, local, 1.0))
