"""Views of the images, a data set each, and the loader that makes batches of them.

    PlainView    the same view of every image, for features and evaluations; tells which cannot be decoded
    RandomView   a random view, for training, whose randomness depends on (seed, epoch, position) alone

Items are uint8 and carry the index of their image; `to_input` is what the network is given.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from data.cache import CropCache
from data.crops import Transform
from data.decode import ImageError
from data.images import ImageList
from models.inputs import IMAGENET_MEAN, IMAGENET_STD
from util import derive_seed

Views = torch.Tensor | list[torch.Tensor]


class Batch(NamedTuple):
    """What a loader yields: views (B, ..., 3, S, S) uint8 of the images index (B,) int64.

    broken: indexes of images that could not be decoded and have no row. more: what else a draw holds, (B,)
    int64 each.
    """

    views: Views
    index: torch.Tensor
    broken: list[int]
    more: tuple[torch.Tensor, ...] = ()


class PlainView(Dataset):
    """Item i: (transform of image i, i), or (None, i) where it cannot be decoded.

    A cache of the transform's views, which gives those that it holds and takes in the others, is optional.
    """

    def __init__(self, images: ImageList, transform: Transform, cache: CropCache | None = None):
        if cache is not None and len(cache) != len(images):
            raise ValueError(f"a crop cache of {len(cache)} images does not fit {len(images)}")
        self.images, self.transform, self.cache = images, transform, cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor | None, int]:
        view = None if self.cache is None else self.cache.read(i)
        if view is None:
            try:
                view = self.transform(self.images.decode(i))
            except ImageError:
                return None, i
            if self.cache is not None:
                self.cache.write(i, view)
        return view, i


@dataclass(frozen=True)
class RandomView(Dataset):
    """Item (position, i, ...): (random view of image i, i, ...), as `at(seed, epoch)` draws it.

    transform draws from torch's generator, which is seeded by (seed, epoch, position in the epoch): nothing
    depends on workers, order or history. then(view, ...) is told what else a draw
    holds. Raises ImageError for an image that cannot be decoded.
    """

    images: ImageList
    transform: Transform
    then: Callable[..., torch.Tensor] | None = None
    seed: int = 0
    epoch: int = 0

    def at(self, seed: int, epoch: int) -> "RandomView":
        """This view of an epoch."""
        return replace(self, seed=seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: Sequence[int]) -> tuple:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[Sequence[int]]) -> list[tuple]:
        """The items of a batch, as a loader asks for them."""
        # All seeds first: between two images each would take five times as long.
        seeds = [derive_seed(self.seed, "crop", self.epoch, position) for position, *_ in items]
        with torch.inference_mode():  # torch prepares nothing for gradients
            return [(self.view(seed, *rest), *rest) for seed, (_, *rest) in zip(seeds, items)]

    def view(self, seed: int, i: int, *more: int) -> Views:
        """The view of image i that this seed gives."""
        found = seeded(self.transform, self.images.decode(i), seed)
        return found if self.then is None else self.then(found, *more)


def turned(view: torch.Tensor, turns: int) -> torch.Tensor:
    """The view (3, S, S) turned counter-clockwise by so many quarters, exactly."""
    return torch.rot90(view, turns, (-2, -1))


def mirrored(view: torch.Tensor, flip: int) -> torch.Tensor:
    """The view (3, H, W), its left and right exchanged where flip is 1."""
    return view.flip(-1) if flip else view


def seeded(transform: Transform, image: torch.Tensor, seed: int) -> Views:
    """transform(image) with torch's generator on the CPU seeded for it alone."""
    # As torch.random.fork_rng and manual_seed, but those would also seed CUDA.
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        return transform(image)
    finally:
        torch.set_rng_state(before)


# ---------------------------------------------------------------------------------------- loading


def make_loader(
    view: Dataset,
    batch: int,
    workers: int,
    device: torch.device,
    sampler: Sampler | Iterable | None = None,
    batch_sampler: Sampler | None = None,
) -> DataLoader:
    """A loader of Batch for a device.

    In the order of the data set, or of the sampler, the last batch may be short; or in the batches of
    batch_sampler.
    """
    return DataLoader(
        view,
        batch_size=1 if batch_sampler is not None else batch,
        sampler=sampler,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=init_worker,
    )


def collate(items: list[tuple]) -> Batch:
    """Items (view or None, i, ...) -> a Batch; a view of several tensors becomes a list of stacks."""
    broken = [item[1] for item in items if item[0] is None]
    items = [item for item in items if item[0] is not None]
    views = [item[0] for item in items]
    if views and isinstance(views[0], list | tuple):
        stacked: Views = [_stack(list(group)) for group in zip(*views)]
    else:
        stacked = _stack(views)
    columns = [torch.tensor(column, dtype=torch.int64) for column in zip(*(item[1:] for item in items))]
    index, *more = columns or [torch.zeros(0, dtype=torch.int64)]
    return Batch(stacked, index, broken, tuple(more))


def _stack(views: list[torch.Tensor]) -> torch.Tensor:
    """Stack views as they lie in memory, (H, W, 3): no transposition here, nor later in the convolutions.

    Views of different sizes, whole images, get zeros at the bottom and at the right.
    """
    if not views:
        return torch.zeros(0, dtype=torch.uint8)
    if len({view.shape for view in views}) > 1:
        height, width = (max(view.shape[side] for view in views) for side in (-2, -1))
        views = [pad(view, (0, width - view.shape[-1], 0, height - view.shape[-2])) for view in views]
    whole = [view.movedim(-3, -1) for view in views]
    return default_collate(whole).movedim(-1, -3)


def init_worker(_: int) -> None:
    """Leave signals to the main process, which may have a checkpoint to write.

    But not the SIGTERM of the main process itself: at its exit it sends one to each worker that is left over,
    and waits for it. (torch has already set the worker to one thread.)
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


# ---------------------------------------------------------------------------------------- what a network sees


def to_input(
    views: Views,
    device: torch.device,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Views:
    """uint8 views (B, 3, S, S), or a list of such, -> normalised float32 on the device, channels last.

    What stands behind the three colours, such as a mask, keeps its values.
    """
    if isinstance(views, list):
        return [to_input(group, device, mean, std) for group in views]
    views = views.to(device, non_blocking=True)
    if views.dim() == 4 and views.shape[1] > 3:
        x = torch.cat([normalise(views[:, :3], mean, std), views[:, 3:].float()], 1)
    else:
        x = normalise(views, mean, std)
    return x.contiguous(memory_format=torch.channels_last)


def normalise(
    batch: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """uint8 (..., 3, S, S) -> float32 normalised by mean and std, same device and memory layout.

    (x / 255 - mean) / std as one multiply-add, x * scale + bias.
    """
    means = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    stds = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    scale = (1 / (255 * stds)).to(batch.device, torch.float32)
    bias = (-means / stds).to(batch.device, torch.float32)
    return batch.to(torch.float32, copy=True).mul_(scale).add_(bias)
