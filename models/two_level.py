"""DeeperCluster's heads: a classifier over super-classes, and one for each over its sub-classes.

Caron et al., ICCV 2019, section 3.3. The super-classifier is the head of the network, and averaged over all
ranks. A rank holds only the sub-classifiers of the views that it is dealt.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.parallel import at_least_float32
from util import derive_seed


class SuperClassifier(nn.Linear):
    """Features (B, D) -> (logits over super-classes (B, S), the features). PyTorch's initialisation."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(features), features


def super_classifier(dim: int, super_classes: int, seed: int) -> SuperClassifier:
    """A fresh one, whatever happened before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SuperClassifier(dim, super_classes)


class SubClassifiers(nn.Module):
    """A linear classifier of `classes` outputs for each of the super-classes `held`.

    The weights of super-class s depend on (seed, s) alone: PyTorch's default, uniform in +- 1 / sqrt(dim).
    """

    def __init__(self, dim: int, classes: int, held: range, seed: int) -> None:
        super().__init__()
        self.held = held
        self.weight = nn.Parameter(torch.empty(len(held), classes, dim))
        self.bias = nn.Parameter(torch.empty(len(held), classes))
        bound = 1 / math.sqrt(dim)
        with torch.no_grad():
            for place, s in enumerate(held):
                generator = torch.Generator().manual_seed(derive_seed(seed, "sub-classifier", s))
                self.weight[place].uniform_(-bound, bound, generator=generator)
                self.bias[place].uniform_(-bound, bound, generator=generator)

    def forward(
        self, features: torch.Tensor, super_class: torch.Tensor, target: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each view among the sub-classes of its super-class: (sum, hits (B,) bool).

        features (B, D), super_class and target (B,) int64; scale (S,): the gradient that the classifier of a
        super-class gets is so many times that of the sum; the one of the features is not scaled.
        """
        total = at_least_float32(features.new_zeros(()))
        hits = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        for s in super_class.unique().tolist():
            rows = (super_class == s).nonzero()[:, 0]
            place = self.held.index(s)
            weight = ScaleGradient.apply(self.weight[place], scale[s])
            bias = ScaleGradient.apply(self.bias[place], scale[s])
            logits = at_least_float32(F.linear(features[rows], weight, bias))
            total = total + F.cross_entropy(logits, target[rows], reduction="sum")
            hits[rows] = logits.detach().argmax(1) == target[rows]
        return total, hits


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor.to(gradient.dtype), None
