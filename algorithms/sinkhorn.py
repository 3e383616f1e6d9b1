"""Scores -> codes: a few steps of Sinkhorn and Knopp's iteration, over the samples of all ranks."""

import math

import torch

import distributed


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, epsilon: float, niter: int = 3) -> torch.Tensor:
    """Codes (B, k) float32 of samples with scores (B, k), here those of this rank; each code sums to 1.

    `niter` (at least 1) truncates max over Q of Tr(Q^T scores) + epsilon H(Q), where every prototype carries
    an equal share of the samples of all ranks: Caron et al., NeurIPS 2020, section 3.1, equation 3; Cuturi,
    NIPS 2013. In an iteration each prototype's column is first brought to 1/k of all samples of all ranks,
    then each sample's row to 1; that the samples come last makes codes sum to 1 exactly. Computed with
    logarithms in float32, so that no epsilon overflows and no prototype vanishes. Ranks may hold different
    numbers of samples, also none; each iteration sends k numbers a rank.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    log_codes = scores / epsilon
    for _ in range(niter):
        log_codes = log_codes - (_log_sums_of_all(log_codes) + math.log(scores.shape[1]))
        log_codes = log_codes - log_codes.logsumexp(dim=1, keepdim=True)
    return log_codes.exp()


def _log_sums_of_all(log_codes: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over the samples of all ranks, (k,)."""
    own = log_codes.logsumexp(dim=0) if len(log_codes) else log_codes.new_full(log_codes.shape[1:], -math.inf)
    if distributed.world_size() == 1:
        return own
    # Infinities do not survive a sum with the zeros of other ranks: -inf is sent as the smallest number.
    every = own.new_zeros((distributed.world_size(), len(own)))
    every[distributed.rank()] = own.clamp(min=torch.finfo(own.dtype).min)
    return distributed.all_reduce(every).logsumexp(dim=0)
