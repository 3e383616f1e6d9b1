"""What a network needs to compute in several processes what it does in one: batch norm, dropout.

A step's batch, the global batch, is dealt out to the ranks in consecutive rows. Batch norm takes its
statistics over all of them; dropout draws the mask of all of them and uses the rank's own rows.
"""

from dataclasses import dataclass

import torch
from torch import nn

import distributed


@dataclass
class Share:
    """Which rows of the global batch this rank holds in the step that is being made."""

    total: int = 0
    rows: range = range(0)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class AllReduce(torch.autograd.Function):
    """The sum over ranks; the gradient of what went in is the sum of those of what came out."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(gradient.contiguous().clone())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of a training step over the images of all ranks, on CPU and CUDA (torch's own is CUDA only).

    Of maps (B, C, H, W) and of vectors (B, C).

    Ranks may hold different numbers of images, also none. In eval mode it is nn.BatchNorm.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"batch norm of maps or vectors, not of {x.dim()} dimensions")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        wide = at_least_float32(x)
        over = (0, 2, 3)[: x.dim() - 1]  # all but the channels
        per_channel = (1, -1, 1, 1)[: x.dim()]
        pixels = wide.new_tensor([x.numel() / x.shape[1]])
        total = AllReduce.apply(torch.cat([wide.sum(over), pixels]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(per_channel)
        variance = AllReduce.apply(centred.square().sum(over)) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = centred * scale.view(per_channel) + self.bias.view(per_channel)
        return y.to(x.dtype)


class SharedDropout(nn.Dropout):
    """Dropout whose mask is this rank's rows of the mask that one process would draw for the global batch.

    All ranks must have seeded torch alike before the step. Of several crops, which follow one another, each
    has a mask of its own.
    """

    def __init__(self, p: float, share: Share) -> None:
        super().__init__(p)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = 1 - self.p
        rows = self.share.rows
        crops = len(x) // max(len(rows), 1)
        mask = torch.empty((crops * self.share.total, *x.shape[1:]), dtype=x.dtype, device=x.device)
        if (
            x.dim() == 4 and not x.is_contiguous()
        ):  # numbers are drawn in the order in which maps lie in memory
            mask = mask.to(memory_format=torch.channels_last)
        mask = mask.bernoulli_(keep).unflatten(0, (crops, self.share.total))
        return x * mask[:, rows.start : rows.stop].flatten(0, 1).div_(keep)


def share_among_ranks(net: nn.Module, share: Share, sync_bn: bool) -> None:
    """Put SharedDropout, with sync_bn SyncBatchNorm too, in place of torch's; names and weights stay."""
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Dropout:
                setattr(module, name, SharedDropout(layer.p, share).train(layer.training))
            elif sync_bn and isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                over_ranks = SyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
                over_ranks.load_state_dict(layer.state_dict())
                setattr(module, name, over_ranks.train(layer.training))
