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


class AllReduce(torch.autograd.Function):
    """The sum over ranks; the gradient of what went in is the sum of those of what came out."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(gradient.contiguous().clone())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of a training step over the images of all ranks, on CPU and CUDA (torch's own is CUDA only).

    Ranks may hold different numbers of images, also none. In eval mode it is nn.BatchNorm2d.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        pixels = wide.new_tensor([x.shape[0] * x.shape[2] * x.shape[3]])
        total = AllReduce.apply(torch.cat([wide.sum((0, 2, 3)), pixels]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(-1, 1, 1)
        variance = AllReduce.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return y.to(x.dtype)


class SharedDropout(nn.Dropout):
    """Dropout whose mask is this rank's rows of the mask that one process would draw for the global batch.

    All ranks must have seeded torch alike before the step.
    """

    def __init__(self, p: float, share: Share) -> None:
        super().__init__(p)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = 1 - self.p
        mask = torch.empty((self.share.total, *x.shape[1:]), dtype=x.dtype, device=x.device).bernoulli_(keep)
        rows = self.share.rows
        return x * mask[rows.start : rows.stop].div_(keep)


def share_among_ranks(net: nn.Module, share: Share, sync_bn: bool) -> None:
    """Put SharedDropout, with sync_bn SyncBatchNorm2d too, in place of torch's; names and weights stay."""
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Dropout:
                setattr(module, name, SharedDropout(layer.p, share).train(layer.training))
            elif sync_bn and type(layer) is nn.BatchNorm2d:
                over_ranks = SyncBatchNorm2d(layer.num_features, layer.eps, layer.momentum)
                over_ranks.load_state_dict(layer.state_dict())
                setattr(module, name, over_ranks.train(layer.training))
