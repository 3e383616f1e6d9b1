"""Optimisers and learning rates. A schedule is a function of the steps done: it gives the next one's rate."""

import math
from collections.abc import Callable, Iterable
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


def bottou(lr: float, weight_decay: float) -> Schedule:
    """lr / sqrt(1 + lr * weight_decay * steps): Bottou, 'Stochastic Gradient Descent Tricks', 2012."""
    return lambda steps: lr / math.sqrt(1 + lr * weight_decay * steps)


def halved(lr: float, every: int) -> Schedule:
    """lr, halved after every so many steps."""
    return lambda steps: lr * 0.5 ** (steps // every)
