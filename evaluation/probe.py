"""Linear classifiers on the frozen activations of a network: training side by side, scores.

One forward pass of the network serves all of them, and they share nothing else: each is, bit for bit, the one
that trains alone. Every evaluation by probes goes through here, so that its numbers compare.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import distributed
from data import PlainView, make_loader
from data.views import Batch
from evaluation.pooling import make_pooling
from features import Pass, activations_of, layer_shape
from models.network import HEAD_STD, Network
from util import Log, Progress, UserError, atomic_write, derive_seed

CHUNK = 64  # images in one forward pass; bounds the memory that VGG-16's early maps take
CENTRE, CROPS = 4, 10  # the place of the central crop among the ten


def choose_layers(net: Network, convs: list[int], names: list[str]) -> list[str]:
    """The layers that --conv and --layers name, each once, in the order of the network."""
    if not convs and not names:
        raise UserError(
            "--conv is missing: give one or several layers, --conv 1 2 3 4 5 or --layers NAME ..."
        )
    there = [name for name in net.maps if name.startswith("conv")]
    for conv in convs:
        if f"conv{conv}" not in there:
            others = (
                f"convolutions 1 to {len(there)}" if len(there) > 1 else " ".join(there) or "no such name"
            )
            more = "" if there == net.maps else f"; --layers takes {', '.join([*net.maps, net.output])}"
            raise UserError(f"--conv {conv}: {net.arch} has no such layer; it has {others}{more}")
    wanted = {*names, *(f"conv{conv}" for conv in convs)}
    return [name for name in net.activation_names if name in wanted]


class Frozen(nn.Module):
    """A network that stays as it is, in eval mode whatever train() asks for, with a pooling after each layer.

    values: numbers that each of the layers gives for an image of `size` pixels; shapes: before they are made
    flat. pooling: evaluation/pooling.py.
    """

    def __init__(
        self, net: Network, layers: list[str], size: int, device: torch.device, pooling: str = "grid"
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.layers, self.device = layers, device
        shapes = [layer_shape(self.net, layer, size) for layer in layers]
        self.pools = [
            make_pooling(net.arch, layer, shape, pooling, net.maps[-1])
            for layer, shape in zip(layers, shapes)
        ]
        self.shapes = [tuple(pool(torch.zeros(shape)).shape) for pool, shape in zip(self.pools, shapes)]
        self.values = [math.prod(shape) for shape in self.shapes]
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Eval mode, always: batch norm uses its statistics and does not move them."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images (B, 3, S, S) -> for each layer (B, values) float32, by one forward pass."""
        parts = [self.pool(self.net.activations(chunk, self.layers)) for chunk in x.split(CHUNK)]
        return [torch.cat(rows) for rows in zip(*parts)]

    def pool(self, found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Activations by name -> for each layer (B, values) float32."""
        return [pool(found[layer].float()).flatten(1) for layer, pool in zip(self.layers, self.pools)]


class Probes(nn.Module):
    """A linear classifier for each layer of a frozen network; what trains is `classifiers` alone.

    They start by (seed, layer) and nothing else: one of STARTS. normed: layers, maps once they are pooled,
    which go through a batch norm of their own first; it trains with the classifier.
    """

    def __init__(
        self, trunk: Frozen, classes: int, seed: int, start: str = "uniform", normed: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.trunk, self.layers = trunk, trunk.layers
        made: list[nn.Module] = [
            make_linear(values, classes, derive_seed(seed, "probe", layer), start)
            for layer, values in zip(self.layers, trunk.values)
        ]
        for i, (layer, shape) in enumerate(zip(self.layers, trunk.shapes)):
            if layer in normed:
                made[i] = nn.Sequential(
                    nn.Unflatten(1, shape), nn.BatchNorm2d(shape[0]), nn.Flatten(), made[i]
                )
        self.classifiers = nn.ModuleList(made).to(trunk.device)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images (B, 3, S, S) -> for each layer logits (B, classes) float32."""
        return self.classify(self.trunk(x))

    def classify(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """For each layer (B, values) float32 -> logits (B, classes), in float32 whatever the precision."""
        with torch.autocast(self.trunk.device.type, enabled=False):
            return [linear(x) for linear, x in zip(self.classifiers, rows)]


def make_linear(values: int, classes: int, seed: int, start: str = "uniform") -> nn.Linear:
    """nn.Linear started from this seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(values, classes)
        STARTS[start](linear)
    return linear


def uniform(linear: nn.Linear) -> None:
    """As torch initialises it."""


def normal(linear: nn.Linear) -> None:
    """Weights N(0, 0.01), bias 0."""
    nn.init.normal_(linear.weight, 0.0, HEAD_STD)
    nn.init.zeros_(linear.bias)


STARTS = {"uniform": uniform, "normal": normal}


# ---------------------------------------------------------------------------------------- what they get right


def count(loss: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(summed loss, images whose class scores highest, is among the five highest, images) as (4,) float64.

    scores (B, classes), target (B,). With fewer than five classes the third counts among all of them.
    """
    found = scores.topk(min(5, scores.shape[1]), dim=1).indices == target[:, None]
    images = loss.new_tensor(len(target), dtype=torch.float64)
    return torch.stack([loss.double(), found[:, :1].sum().double(), found.sum().double(), images])


def judge(logits: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """For each layer logits (B * crops, classes), the crops of an image together -> `count` of each, (P, 4).

    With ten crops the hits are those of the mean softmax, and the loss is that of the central crop.
    """
    counts = []
    for flat in logits:
        crops = flat.unflatten(0, (len(target), -1))  # (B, crops, classes)
        single = crops.shape[1] == 1
        scores = crops[:, 0] if single else crops.softmax(dim=2).mean(dim=1)
        loss = F.cross_entropy(crops[:, 0 if single else CENTRE], target, reduction="sum")
        counts.append(count(loss, scores, target))
    return torch.stack(counts)


class Tally:
    """Sums of `count` over a pass and over the ranks, for several classifiers; a part of the run."""

    def __init__(self, classifiers: int) -> None:
        self.sums = torch.zeros(classifiers, 4, dtype=torch.float64)

    def add(self, counts: torch.Tensor) -> None:
        """Add this rank's counts (P, 4) and those of the others; all ranks have to call it together."""
        self.sums += distributed.all_reduce(counts.cpu())

    def clear(self) -> None:
        """Begin a new pass."""
        self.sums.zero_()

    def records(self) -> list[dict[str, float]]:
        """For each classifier the mean loss and the precisions in percent."""
        means = (self.sums[:, :3] / self.sums[:, 3:].clamp(min=1)).tolist()
        return [{"loss": loss, "prec@1": 100 * first, "prec@5": 100 * five} for loss, first, five in means]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums.copy_(state["sums"])


class Counts:
    """Loss and hits of classifiers over a pass; labels: the classes (N,) int64 of its images."""

    def __init__(self, classifiers: int, labels: torch.Tensor) -> None:
        self.labels, self.counts = labels, torch.zeros(classifiers, 4, dtype=torch.float64)

    def add(self, logits: list[torch.Tensor], index: torch.Tensor) -> None:
        """Logits (B * crops, classes) of each classifier for the images index (B,)."""
        self.counts += judge(logits, self.labels[index].to(logits[0].device)).cpu()

    def records(self) -> list[dict[str, float]]:
        """Of each classifier over all ranks; all of them have to call it together."""
        tally = Tally(len(self.counts))
        tally.add(self.counts)
        return tally.records()


@torch.no_grad()
def evaluate(
    probes: Probes, view: PlainView, how: Pass, label: str, log: Log, meter: "Counts"
) -> tuple[list[dict[str, float]], list[int]]:
    """One pass over the labelled images of a view, which gives one or ten crops of each.

    Returns the meter's record for each classifier, the same on every rank, and the images that could not be
    decoded, which do not count. label: what the progress is called in the log.
    """
    probes.eval()
    trunk, rows = probes.trunk, distributed.share_of(len(view))
    progress = Progress(len(rows), label, log=log)
    loader = make_loader(view, how.batch, how.workers, how.device, sampler=rows)
    broken: list[int] = []
    batches = activations_of(trunk.net, probes.layers, rows_of_crops(loader), how.device, how.precision)
    for found, batch in batches:
        if found:
            meter.add(probes.classify(trunk.pool(found)), batch.index)
        broken += batch.broken
        progress.update(len(batch.index) + len(batch.broken))
    progress.close()
    return meter.records(), sorted(i for part in distributed.gather_objects(broken) for i in part)


def rows_of_crops(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Views (B, crops, 3, S, S) become rows (B * crops, 3, S, S), the crops of an image together."""
    for batch in batches:
        yield batch._replace(views=batch.views.flatten(0, -4)) if len(batch.index) else batch


# ---------------------------------------------------------------------------------------- what is kept


class History:
    """The records of each classifier, epoch by epoch; a part of the run.

    criterion: the split whose figure chooses the best epoch.
    """

    def __init__(self, layers: list[str], criterion: str, figure: str = "prec@1") -> None:
        self.criterion, self.figure = criterion, figure
        self.records: dict[str, list[dict[str, Any]]] = {layer: [] for layer in layers}

    def add(self, epoch: int, steps: int, splits: dict[str, list[dict[str, float]]]) -> None:
        """An epoch's records, {split: one for each classifier}; steps: made since the start."""
        for i, records in enumerate(self.records.values()):
            split = {name: of_all[i] for name, of_all in splits.items()}
            records.append({"epoch": epoch, "steps": steps, **split})

    def last(self, layer: str) -> dict[str, Any]:
        """The record of the last epoch."""
        return self.records[layer][-1]

    def best(self, layer: str) -> dict[str, Any]:
        """The record with the highest figure on the split that chooses, the earliest of such."""
        return max(self.records[layer], key=lambda record: record[self.criterion][self.figure])

    def line(self, layer: str) -> str:
        """The last epoch's figures for the log."""
        return "  ".join(
            f"{name} loss {split['loss']:.4f}" + "".join(f" {of} {x:.2f}" for of, x in figures(split).items())
            for name, split in self.last(layer).items()
            if isinstance(split, dict)
        )

    def results(self, values: list[int]) -> list[dict[str, Any]]:
        """What results.json says, a dict a layer; values: how many numbers each of the layers gives."""
        return [
            {
                "layer": layer,
                "values": number,
                "last": self.last(layer),
                "best": self.best(layer),
                "best chosen on": self.criterion,
            }
            for layer, number in zip(self.records, values)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records = {layer: list(state["records"][layer]) for layer in self.records}


def figures(split: dict[str, float]) -> dict[str, float]:
    """What a record says besides the loss, in percent."""
    return {name: value for name, value in split.items() if name != "loss"}


def table(found: list[dict[str, Any]]) -> list[str]:
    """The lines of the table, a layer a line."""

    def cell(record: dict[str, Any]) -> str:
        return f"{' / '.join(f'{x:.2f}' for x in figures(record['val']).values())} ({record['epoch']})"

    return [f"{'layer':<8}{'values':>7}{'last epoch':>22}{'best epoch':>22}"] + [
        f"{one['layer']:<8}{one['values']:>7}{cell(one['last']):>22}{cell(one['best']):>22}" for one in found
    ]


def write_classifiers(exp: Path, probes: Probes, history: History, protocol: dict[str, Any]) -> None:
    """After an epoch: <layer>_log.jsonl, <layer>_best.pth.tar where it is the best, <layer>_last.pth.tar."""
    for layer, linear in zip(probes.layers, probes.classifiers):
        records, best = history.records[layer], history.best(layer)
        with atomic_write(exp / f"{layer}_log.jsonl") as file:
            file.writelines(f"{json.dumps(record)}\n" for record in records)
        state = {
            "layer": layer,
            "state_dict": linear.state_dict(),
            "epoch": len(records),
            "steps": records[-1]["steps"],
            "log": records,
            "best_epoch": best["epoch"],
            "protocol": protocol,
        }
        if best is records[-1]:
            checkpoint.save(exp / f"{layer}_best.pth.tar", state)
        checkpoint.save(exp / f"{layer}_last.pth.tar", state)


class Fingerprint:
    """SHA-256 of every weight and statistic of a network: a run goes on, and ends, with the same one."""

    def __init__(self, net: Network) -> None:
        self.digest = self._of(net)

    @staticmethod
    def _of(net: Network) -> str:
        digest = hashlib.sha256()
        for name, value in net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check(self, net: Network) -> None:
        """RuntimeError where the frozen network is not what it was."""
        if self._of(net) != self.digest:
            raise RuntimeError("the frozen network moved during the run: these results are of no network")

    def state_dict(self) -> dict[str, str]:
        return {"sha256": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if state["sha256"] != self.digest:
            raise ValueError("the run is on another network than that of --model")
