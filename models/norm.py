"""Batch norm whose statistics are as exact in channels_last on a CPU as in any other layout.

There torch adds the values of a channel one after the other in float32, so that the variance of a large
batch comes out too small (benchmarks/batch_norm.py). Here blocks of a thousand values are added, and what
they give is joined in float64.
"""

import torch
from torch import nn
from torch.nn import functional as F

LONG = 8192  # values of a channel: of no more the sums are torch's own matter
BLOCK = 1024  # values of a channel that are added at a time


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, but for the statistics of large channels_last batches in float32 on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not sums_are_long(x):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y


def sums_are_long(x: torch.Tensor) -> bool:
    """Whether torch would add more than LONG values of a channel naively."""
    layout = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return plain and layout and x.numel() > LONG * x.shape[1]


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) float32 of maps (B, C, H, W) in channels_last, by blocks.

    Variances of blocks are joined as in Chan, Golub, LeVeque, 'Updating formulae ...', 1979.
    """
    channels = x.shape[1]
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # the same memory
    # torch's own kernel runs twice over a block, which is in the cache the second time.
    found = [torch.batch_norm_update_stats(block, None, None, 0.0) for block in rows.split(BLOCK)]
    counts = torch.tensor([len(block) for block in rows.split(BLOCK)], dtype=torch.float64)[:, None]
    means, variances = (torch.stack(part).double() for part in zip(*found))
    mean = (means * counts).sum(0) / counts.sum()
    variance = ((variances + (means - mean).square()) * counts).sum(0) / counts.sum()
    return mean.float(), variance.float()


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of the batch's own statistics, handed out too."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, variance = statistics(x)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        needed = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, needed
        )
        return *found, None
