"""Embeddings that a method remembers: SwAV's queue, DeepCluster-v2's bank. Both are parts of a run."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

import distributed


class Queue:
    """The embeddings of the last batches, newest first, for each crop that gives codes (SwAV, section 4).

    length: embeddings of all ranks, a multiple of the global batch; 0: no queue. A rank keeps those of its
    own rows. It is used once it is full, `length / batch` steps after it was first filled into.
    """

    def __init__(self, length: int, batch: int, crops: int, dim: int, device: torch.device) -> None:
        """batch: of all ranks; crops: how many give codes."""
        self.slots, self.batch = length // batch, batch
        mine = range(batch * distributed.rank() // distributed.world_size(),
                     batch * (distributed.rank() + 1) // distributed.world_size())  # fmt: skip
        self._rows = slice(mine.start, mine.stop)
        self._kept = torch.zeros((crops, self.slots, len(mine), dim), device=device)  # of this rank
        self.filled = 0  # slots, the newest first
        self.on = False

    @property
    def full(self) -> bool:
        """Whether it is in use."""
        return self.on and 0 < self.slots == self.filled

    def of(self, crop: int) -> torch.Tensor:
        """This rank's embeddings (slots * B_r, D) of the crop-th one that gives codes; none unless full."""
        return self._kept[crop].flatten(0, 1) if self.full else self._kept[crop, :0].flatten(0, 1)

    @torch.no_grad()
    def put(self, z: torch.Tensor) -> None:
        """The embeddings (crops, B_r, D) of a batch go to the front, the oldest out; none where it is off."""
        if not self.on or self.slots == 0:
            return
        self._kept = torch.cat([z[:, None].to(self._kept.dtype), self._kept[:, :-1]], dim=1)
        self.filled = min(self.filled + 1, self.slots)

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks: call it on every one."""
        filled = self._kept[:, : self.filled].cpu().transpose(1, 2).transpose(0, 1)  # (B_r, crops, filled, D)
        whole = distributed.gather_rows(np.ascontiguousarray(filled.numpy()))
        return {"embeddings": None if whole is None else torch.from_numpy(whole), "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of this rank, whatever the number of ranks was. ValueError for another shape."""
        whole = state["embeddings"]
        crops, slots, _, dim = self._kept.shape
        if whole.shape[0] != self.batch or whole.shape[1] != crops or whole.shape[3] != dim:
            raise ValueError(f"a queue of {tuple(whole.shape)}, not of batches of {self.batch}")
        self.filled = min(whole.shape[2], slots)
        mine = whole[self._rows, :, : self.filled].permute(1, 2, 0, 3)
        self._kept[:, : self.filled] = mine.to(self._kept.device)


class Bank:
    """The last embeddings of every image, for some of its crops (DeepCluster-v2).

    A rank owns the images distributed.share_of(number); what it sees of others' goes to them in `settle`.
    """

    def __init__(self, number: int, crops: int, dim: int) -> None:
        self.number, self._own = number, distributed.share_of(number)
        self._kept = torch.zeros((len(self._own), crops, dim))
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.empty = True

    def put(self, index: torch.Tensor, z: torch.Tensor) -> None:
        """Remember the embeddings z (crops, B, D) of the images index (B,), as they came out of a step.

        Until they are settled an image comes once, as in an epoch.
        """
        self._seen.append((index.cpu(), z.detach().float().cpu().transpose(0, 1)))

    def settle(self) -> None:
        """What was seen since the last time goes to the ranks that own the images; on every rank at once."""
        index = torch.cat([torch.zeros(0, dtype=torch.int64), *[i for i, _ in self._seen]]).numpy()
        rows = torch.cat([torch.zeros((0, *self._kept.shape[1:])), *[z for _, z in self._seen]]).numpy()
        self._seen = []
        for source in range(distributed.world_size()):
            theirs, values = distributed.from_rank(source, index), distributed.from_rank(source, rows)
            mine = (theirs >= self._own.start) & (theirs < self._own.stop)
            self._kept[theirs[mine] - self._own.start] = torch.from_numpy(values[mine])
        self.empty = False

    def crop(self, which: int) -> np.ndarray:
        """The embeddings (n_r, D) float32 of this rank's images, of the which-th crop modulo those kept."""
        return normalize(self._kept[:, which % self._kept.shape[1]], dim=1).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, and settled: call it on every one."""
        self.settle()
        whole = distributed.gather_rows(self._kept.numpy())
        return {"embeddings": None if whole is None else torch.from_numpy(whole)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of this rank's images. ValueError for other images or another shape."""
        whole = state["embeddings"]
        if whole.shape != (self.number, *self._kept.shape[1:]):
            raise ValueError(f"a bank of {tuple(whole.shape)} for {self.number} images")
        self._kept = whole[self._own.start : self._own.stop].clone()
        self.empty = False
