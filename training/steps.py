"""One step of training: this rank's part of a global batch through loss, gradient and optimisers.

A loss is a function (net, views, indexes of their images, what else a draw holds ...) -> the sum over this
rank's images, () float. The step divides by the size of the global batch and averages over the ranks.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed
from data import to_input
from data.sampling import ShareSampler
from data.views import Batch
from models.inputs import Inputs
from models.parallel import Share
from training.optim import Schedule, set_rate
from util import UserError, set_precision

IMAGENET = Inputs()
Loss = Callable[..., torch.Tensor]


class Steps:
    """What the steps of a pass have in common.

    inputs: how the network sees images. schedule: of the learning rate, or one for each optimiser,
    None: as the optimisers have it. clip: largest norm of the gradient.
    after_backward: called with the number of steps made before, once the gradients are there.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Loss,
        device: torch.device,
        precision: str,
        scaler: torch.amp.GradScaler,
        schedule: Schedule | Sequence[Schedule] | None = None,
        clip: float | None = None,
        after_backward: Callable[[int], None] | None = None,
        inputs: Inputs = IMAGENET,
    ) -> None:
        self.net, self.optimizers, self.loss, self.device = across_ranks(net), optimizers, loss, device
        self.autocast = set_precision(precision, device)
        self.scaler, self.clip = scaler, clip
        self.schedules = [schedule] * len(optimizers) if callable(schedule) else schedule
        self.after_backward, self.inputs = after_backward, inputs

    def step(self, batch: Batch, total: int, iteration: int, stop: bool) -> tuple[float, bool]:
        """One step on this rank's rows of a global batch of `total`; `iteration` steps were made before.

        Returns (mean loss over the global batch, whether `stop` was true on any rank). Raises UserError,
        before anything is changed, where the loss or the clipped norm is not finite.
        """
        if self.schedules is not None:
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                set_rate([optimizer], schedule(iteration))
        more = [column.to(self.device, non_blocking=True) for column in batch.more]
        with self.autocast:
            x = to_input(batch.views, self.device, self.inputs.mean, self.inputs.std)
            loss = self.loss(self.net, x, batch.index, *more) / total
        summed = distributed.all_reduce(torch.tensor([loss.item(), float(stop)], dtype=torch.float64))
        value, stopped = summed.tolist()
        check_finite("loss", value, iteration)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * distributed.world_size()).backward()  # gradients are averaged over ranks
        if self.after_backward is not None:
            self.after_backward(iteration)
        if self.clip is not None:
            self._clip(iteration)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return value, stopped > 0

    def _clip(self, iteration: int) -> None:
        trained = [p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]]
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, self.clip).item()
        if not self.scaler.is_enabled():
            check_finite("norm of the gradient", norm, iteration)


def check_finite(what: str, value: float, iteration: int) -> None:
    """UserError for a number that is none."""
    if not math.isfinite(value):
        raise UserError(
            f"the {what} is {value} at iteration {iteration}; the last checkpoint is still good: resume from "
            "it with a lower --lr"
        )


def across_ranks(net: nn.Module) -> nn.Module:
    """net, or around it what averages its gradients over the ranks. Made anew for every fresh head."""
    if distributed.world_size() == 1 or not any(p.requires_grad for p in net.parameters()):
        return net
    device = next(net.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=devices, forward_sync_buffers=False)


def deal(loader: Iterable[Batch], sampler: ShareSampler, share: Share) -> Iterator[tuple[int, Batch]]:
    """(size of the global batch, this rank's part of it), at the end maybe nothing of it.

    `share` says meanwhile which part it is.
    """
    batches, last = iter(loader), None
    if threading.current_thread() is threading.main_thread():
        # A dead worker is noticed when its batch is asked for, rather than in the middle of a step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for total, rows in sampler.shares():
        share.total, share.rows = total, rows
        last = next(batches) if rows else empty_like(last, sampler)
        yield total, last


def empty_like(batch: Batch | None, sampler: ShareSampler) -> Batch:
    """A batch without images, its views of the shape of another batch's."""
    if batch is None:
        raise UserError(
            f"--batch {sampler.batch}: a rank of {sampler.ranks} gets no image; give at least {sampler.ranks}"
        )
    views = [group[:0] for group in batch.views] if isinstance(batch.views, list) else batch.views[:0]
    return Batch(views, batch.index[:0], [], tuple(column[:0] for column in batch.more))
