"""What stands on a network: the projection head and the prototypes of SwAV and DeepCluster-v2."""

from collections.abc import Sequence

import torch
from torch import nn

from models.parallel import at_least_float32

Embedded = tuple[torch.Tensor, list[torch.Tensor]]  # embeddings, and scores for each set of prototypes


def projection(inputs: int, hidden: int, outputs: int, seed: int | None = None) -> nn.Module:
    """Linear, batch norm, ReLU, linear; with hidden 0 one linear layer. PyTorch's default initialisation."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        if hidden == 0:
            return nn.Linear(inputs, outputs)
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )


class Normalise(nn.Module):
    """Rows (B, D) divided by their L2 norm, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(at_least_float32(x), dim=1)


class Prototypes(nn.Module):
    """Sets of prototypes, rows of norm 1: embeddings (B, D) -> scores (B, k), cosines, for each set.

    Parameter names are those of released files: `weight` for one number, `prototypes<h>.weight` for a list.
    """

    def __init__(self, dim: int, counts: int | Sequence[int]) -> None:
        super().__init__()
        if isinstance(counts, int):
            self.weight = nn.Parameter(nn.Linear(dim, counts, bias=False).weight.detach())
        else:
            for h, count in enumerate(counts):
                self.add_module(f"prototypes{h}", nn.Linear(dim, count, bias=False))

    def sets(self) -> list[nn.Parameter]:
        """The prototypes of each set, (k, D)."""
        return list(self.parameters())

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring every prototype to norm 1, in place; one of norm 0 stays."""
        for weight in self.sets():
            weight.copy_(nn.functional.normalize(weight, dim=1))

    @torch.no_grad()
    def set(self, centroids: Sequence[torch.Tensor]) -> None:
        """Each set becomes these centroids (k, D)."""
        for weight, rows in zip(self.sets(), centroids, strict=True):
            weight.copy_(rows)

    def forward(self, z: torch.Tensor) -> list[torch.Tensor]:
        """In float32 whatever autocast says: convergence depends on it."""
        with torch.autocast(z.device.type, enabled=False):
            return [
                nn.functional.linear(at_least_float32(z), at_least_float32(weight)) for weight in self.sets()
            ]


def build_prototypes(dim: int, counts: int | Sequence[int], seed: int | None = None) -> Prototypes:
    """Prototypes as they start: PyTorch's default initialisation, from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return Prototypes(dim, counts)
