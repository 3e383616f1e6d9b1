"""Linear classifiers on the frozen activations of a convnet: what does each convolution know of the classes?

    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --conv 3 --exp exp/linear
    python eval_linear.py --data DIR --model exp/checkpoint.pth.tar --conv 1 2 3 4 5 --exp exp/linear
    python eval_linear.py --data DIR --model random:alexnet:sobel --conv 1 2 3 4 5 --exp exp/random

DIR has train/ and val/ with the same class sub-folders. The network runs once per batch, frozen and in eval
mode; on the pooled output of each chosen convolution (after its ReLU) one linear classifier trains. The
classifiers share nothing but the batches: each is the same as when it trains alone.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import DrawSampler
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import evaluation
import models
from features import PRECISIONS, set_precision
from util import (
    Log,
    Progress,
    UserError,
    add_device_argument,
    atomic_write,
    choose_device,
    derive_seed,
    make_folder,
    run_main,
)

# AlexNet's average pooling at 224 pixels, by convolution: (window = stride, padding).
ALEXNET_POOLING = {1: (6, 3), 2: (4, 0), 3: (3, 1), 4: (3, 1), 5: (2, 0)}
MAX_VALUES = 10_000  # elsewhere: the largest pooled output under this
CHUNK = 64  # images in one forward pass; bounds the memory that VGG-16's early maps take
CENTRE, CROPS = 4, 10  # the place of the central crop among the ten
INIT_STD = 0.01  # of the classifiers' weights, as of every linear layer here

# Published top-1 by convolution, AlexNet, from memory and unverified: always printed with that mark.
PUBLISHED = {
    "ImageNet": {
        "arXiv v2": (12.9, 29.2, 38.2, 39.8, 36.1),
        "ECCV 10 crops?": (13.4, 32.3, 41.0, 39.6, 38.2),
        "random net": (11.6, 17.1, 16.9, 16.3, 14.1),
    },
    "Places": {
        "arXiv v2": (18.6, 30.8, 37.0, 37.5, 33.1),
        "ECCV 10 crops?": (19.6, 33.2, 39.2, 39.8, 34.7),
        "random net": (15.7, 20.3, 19.8, 19.1, 17.5),
    },
}
PUBLISHED_MARK = "published, from memory, unverified"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval_linear.py",
        description="Train linear classifiers on top of frozen convolutional layers of AlexNet or VGG-16.",
    )
    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--data", metavar="DATA", help="path to dataset, with train/ and val/")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="path to model (a checkpoint of main.py or one that the authors released), or "
        "random:ARCH or random:ARCH:sobel for the network that main.py --seed SEED starts from",
    )
    group.add_argument(
        "--conv",
        type=int,
        nargs="+",
        metavar="N",
        help="on top of which convolutional layer train logistic regression; several layers "
        "train side by side at little more than the cost of one (AlexNet 1-5, VGG-16 1-13)",
    )
    group.add_argument(
        "--tencrops",
        action="store_true",
        help="validation accuracy averaged over 10 crops (default: the central crop)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold this part of train/ out of training, of each class the same, and choose the best "
        "epoch on it; 0 chooses it on val/, as the authors did (default: 0)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the crops; the shorter side is first resized to 256/224 of it (default: 224)",
    )

    group = parser.add_argument_group("training of the classifiers")
    group.add_argument("--epochs", type=int, default=90, help="number of total epochs to run (default: 90)")
    group.add_argument("--batch_size", type=int, default=256, help="mini-batch size (default: 256)")
    group.add_argument(
        "--lr",
        type=float,
        default=0.01,
        help="learning rate of the first step; it falls with the steps (default: 0.01)",
    )
    group.add_argument("--momentum", type=float, default=0.9, help="momentum (default: 0.9)")
    group.add_argument(
        "--weight_decay", "--wd", type=float, default=-4, help="weight decay pow (default: -4)"
    )
    group.add_argument("--seed", type=int, default=31, help="random seed (default: 31)")

    group = parser.add_argument_group("files")
    group.add_argument("--exp", default="exp", metavar="EXP", help="exp folder (default: exp)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the classifiers in EXP exactly; layers that have none there start afresh",
    )

    group = parser.add_argument_group("machine and output")
    group.add_argument("--workers", type=int, default=4, help="number of data loading workers (default: 4)")
    add_device_argument(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="arithmetic of the convnet; tf32 (CUDA) and bf16 (CUDA, CPUs with AMX) are faster and "
        "slightly less exact; the classifiers are fp32 always (default: fp32)",
    )
    group.add_argument("--verbose", action="store_true", help="chatty")
    return parser


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and evaluate; returns one dict a layer, as in results.json. Files go into args.exp."""
    check_arguments(args)
    device = choose_device(args.device)
    train, held_out, val = open_images(args)
    net, convs = open_network(args)
    exp = make_folder(args.exp)
    log = Log(exp / "eval_linear.log")
    trunk = Trunk(net, convs, args.image_size, device, args.precision)
    fingerprint = trunk.fingerprint()
    settings = run_settings(args, fingerprint, train, held_out, val)
    probes = open_probes(args, trunk, settings, len(train.class_names), exp)
    splits = {"val": val} if held_out is None else {"val": val, "held_out": held_out}
    announce(args, trunk, {"train": train, **splits}, log)

    for epoch in range(min(probe.epoch for probe in probes), args.epochs):
        # After a kill between two files, or with a layer that is new, some classifiers are epochs ahead.
        behind = [probe for probe in probes if probe.epoch == epoch]
        records = {"train": train_epoch(trunk, behind, train, args, epoch, log)}
        for name, images in splits.items():
            records[name] = evaluate(trunk, behind, images, args, f"epoch {epoch} {name}", log)
        for i, probe in enumerate(behind):
            probe.finish_epoch({name: tallies[i] for name, tallies in records.items()}, exp)
            log(f"epoch {epoch} conv{probe.conv}  " + "  ".join(
                f"{name} loss {tallies[i]['loss']:.4f} prec@1 {tallies[i]['prec@1']:.2f} "
                f"prec@5 {tallies[i]['prec@5']:.2f}" for name, tallies in records.items()
            ))  # fmt: skip

    if trunk.fingerprint() != fingerprint:
        raise RuntimeError("the frozen network moved during the run: these results are of no network")
    return report(args, trunk, probes, {"train": train, **splits}, log)


# ------------------------------------------------------------------------------- before any long work


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    if not args.data:
        raise UserError("--data is missing: give a folder with train/ and val/")
    if not args.conv:
        raise UserError("--conv is missing: give one or several convolutional layers, e.g. --conv 1 2 3 4 5")
    for name, smallest in (
        ("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0), ("image_size", 16)
    ):  # fmt: skip
        if getattr(args, name) < smallest:
            flag = name.replace("image_size", "image-size")
            raise UserError(f"--{flag} {getattr(args, name)}: must be at least {smallest}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise UserError(f"--lr {args.lr}: must be a positive number (the authors: 0.01)")
    if not 0 <= args.momentum < 1:
        raise UserError(f"--momentum {args.momentum}: must be in [0, 1) (the authors: 0.9)")
    if not -100 <= args.weight_decay <= 0:
        raise UserError(f"--weight_decay {args.weight_decay}: must be a power of ten such as -4, for 10**-4")
    if not 0 <= args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: must be in [0, 1), e.g. 0.05")


def open_images(args: argparse.Namespace) -> tuple[data.ImageList, data.ImageList | None, data.ImageList]:
    """(train, held-out part of train or None, val), their headers checked."""
    train, val = evaluation.open_train_val(args.data)
    for images in (train, val):
        broken = data.check_headers(images, workers=max(args.workers, 1))
        if broken:
            i, reason = broken[0]
            raise UserError(
                f"{images.path(i)}: {reason} ({len(broken)} such in {images.root}); remove or mend"
            )
    held = held_out_mask(train.classes, args.val_fraction, args.seed)
    if args.val_fraction > 0 and not held.any():
        raise UserError(f"--val-fraction {args.val_fraction}: no class has images enough to hold one out")
    return train.keep(~held), train.keep(held) if held.any() else None, val


def held_out_mask(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool: of each class in (N,) int64 `classes` a random `fraction`, rounded, never all of it."""
    rng = np.random.default_rng(derive_seed(seed, "held out"))
    mask = np.zeros(len(classes), dtype=bool)
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        count = min(max(round(fraction * len(members)), fraction > 0), len(members) - 1)
        mask[rng.permutation(members)[:count]] = True
    return mask


def open_network(args: argparse.Namespace) -> tuple[models.DeepClusterNet, list[int]]:
    """The network of --model on the CPU, and the layers of --conv in order, checked to be in it."""
    if args.model and args.model.startswith("random:"):
        net = random_network(args.model, args.seed)
    else:
        net = evaluation.open_network(args.model, [])
    for conv in args.conv:
        if not 1 <= conv <= net.num_convs:
            raise UserError(
                f"--conv {conv}: {net.arch} has no such layer; it has convolutions 1 to {net.num_convs}"
            )
    return net, sorted(set(args.conv))


def random_network(spec: str, seed: int) -> models.DeepClusterNet:
    """The network of `random:ARCH` or `random:ARCH:sobel`: the one that main.py --seed starts from."""
    arch, _, sobel = spec.removeprefix("random:").partition(":")
    if arch not in models.ARCHITECTURES or sobel not in ("", "sobel"):
        raise UserError(
            f"--model {spec}: random networks are random:ARCH or random:ARCH:sobel, ARCH one of "
            f"{', '.join(models.ARCHITECTURES)}"
        )
    return models.build(arch, sobel == "sobel", seed=derive_seed(seed, "weights"))


def run_settings(
    args: argparse.Namespace,
    fingerprint: str,
    train: data.ImageList,
    held_out: data.ImageList | None,
    val: data.ImageList,
) -> dict[str, Any]:
    """What a classifier depends on, the number of epochs aside: a resumed run must have the same."""
    names = ("batch_size", "lr", "momentum", "weight_decay", "seed", "image_size", "tencrops", "val_fraction")
    return {
        **{name: getattr(args, name) for name in names},
        "precision": args.precision,
        "network": fingerprint,
        "train images": train.digest(),
        "held-out images": None if held_out is None else held_out.digest(),
        "val images": val.digest(),
    }


def announce(args: argparse.Namespace, trunk: "Trunk", splits: dict[str, data.ImageList], log: Log) -> None:
    """Say what is about to happen."""
    sizes = ", ".join(f"{len(images)} {name}" for name, images in splits.items())
    values = "  ".join(f"conv{conv} {number}" for conv, number in trunk.values.items())
    log(f"{args.data}: {sizes} images, {len(splits['train'].class_names)} classes")
    log(f"{args.model} frozen on {trunk.device} at {args.image_size} px ({args.precision}); values: {values}")
    if args.verbose:
        log("settings: " + "  ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


# ------------------------------------------------------------------------------- the frozen part


def make_pooling(arch: str, conv: int, shape: torch.Size) -> nn.Module:
    """The average pooling between convolution `conv`, whose map is `shape` (C, H, W), and the classifier.

    AlexNet at 224 pixels: the authors' windows (padding counts as zeros), which leave 9600 or 9216 values.
    These are the largest squares under 10,000. VGG-16, and AlexNet at sizes where the windows would leave
    another number: adaptive average pooling to the largest square under 10,000, not larger than the map.
    (At 64 pixels the windows would see 4 x 4 of conv 2's 7 x 7 places and 2 x 2 of conv 5's 3 x 3.)
    """
    channels, side = shape[0], min(shape[1:])
    largest = math.isqrt((MAX_VALUES - 1) // channels)
    if arch == "alexnet":
        window, padding = ALEXNET_POOLING[conv]
        if (side + 2 * padding - window) // window + 1 == largest:
            return nn.AvgPool2d(window, window, padding)
    return nn.AdaptiveAvgPool2d(min(side, largest))


class Trunk:
    """The network, frozen and in eval mode, with a pooling after each of the chosen convolutions."""

    def __init__(
        self, net: models.DeepClusterNet, convs: list[int], size: int, device: torch.device, precision: str
    ) -> None:
        self.net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = device
        self.autocast = set_precision(precision, device)
        self.names = {conv: f"conv{conv}" for conv in convs}
        with torch.no_grad():
            maps = self.net.activations(torch.zeros(1, 3, size, size, device=device), self.names.values())
        self.pools = {
            conv: make_pooling(net.arch, conv, maps[name].shape[1:]) for conv, name in self.names.items()
        }
        self.values = {conv: pool(maps[self.names[conv]]).numel() for conv, pool in self.pools.items()}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, convs: Iterable[int]) -> dict[int, torch.Tensor]:
        """uint8 images (B, 3, S, S) -> for each convolution (B, values) float32, by one forward pass."""
        convs = list(convs)
        parts: dict[int, list[torch.Tensor]] = {conv: [] for conv in convs}
        for chunk in images.split(CHUNK):
            x = data.normalise(chunk.to(self.device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)
            with self.autocast:
                maps = self.net.activations(x, [self.names[conv] for conv in convs])
            for conv in convs:
                parts[conv].append(self.pools[conv](maps[self.names[conv]].float()).flatten(1))
        return {conv: torch.cat(rows) for conv, rows in parts.items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 of every weight and statistic of the network, by name."""
        digest = hashlib.sha256()
        for name, value in self.net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------- a classifier


def learning_rate(lr: float, weight_decay: float, step: int) -> float:
    """The learning rate after `step` steps: lr / sqrt(1 + lr * weight_decay * step) (Bottou 2012)."""
    return lr / math.sqrt(1 + lr * weight_decay * step)


class Probe:
    """The linear classifier on one convolution: weights, optimiser, log; `epoch` counts the epochs done.

    Its initial weights, N(0, 0.01) with bias 0, depend on (seed, layer) alone.
    """

    def __init__(self, conv: int, values: int, classes: int, args: argparse.Namespace, device: torch.device):
        self.conv, self.lr, self.weight_decay = conv, args.lr, 10.0**args.weight_decay
        self.criterion = (
            "held_out" if args.val_fraction > 0 else "val"
        )  # the split that chooses the best epoch
        self.linear = nn.Linear(values, classes)
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "probe", conv))
        with torch.no_grad():
            self.linear.weight.normal_(0.0, INIT_STD, generator=generator)
            self.linear.bias.zero_()
        self.linear.to(device)
        self.optimizer = torch.optim.SGD(
            self.linear.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=self.weight_decay,
            fused=True,  # one walk over ten million weights instead of four
        )
        self.epoch = self.steps = 0
        self.log: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}

    def step(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One step of SGD on rows (B, values) of classes target (B,).

        Returns (loss summed over the batch, hits@1, hits@5) of before the step, (3,) float64 on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.lr, self.weight_decay, self.steps)
        logits = self.linear(rows)
        loss = F.cross_entropy(logits, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return count(loss.detach() * len(target), logits.detach(), target)

    @torch.no_grad()
    def judge(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """rows (B * crops, values), the crops of an image together -> the three sums as in `step`.

        With ten crops the hits are those of the mean softmax, and the loss is that of the central crop.
        """
        logits = self.linear(rows).unflatten(0, (len(target), -1))  # (B, crops, classes)
        single = logits.shape[1] == 1
        scores = logits[:, 0] if single else logits.softmax(dim=2).mean(dim=1)
        loss = F.cross_entropy(logits[:, 0 if single else CENTRE], target, reduction="sum")
        return count(loss, scores, target)

    @property
    def best(self) -> dict[str, Any]:
        """The log record of the epoch with the highest prec@1 on the split that chooses, the earliest one."""
        return max(self.log, key=lambda record: record[self.criterion]["prec@1"])

    def finish_epoch(self, record: dict[str, Any], exp: Path) -> None:
        """Log the epoch; write conv<N>_log.jsonl, conv<N>_best.pth.tar (if it is) and conv<N>_last.pth.tar.

        The last file comes last: a run that is killed before it does this epoch again.
        """
        self.log.append({"epoch": self.epoch, "steps": self.steps, **record})
        self.epoch += 1
        with atomic_write(exp / f"conv{self.conv}_log.jsonl") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in self.log)
        if self.best is self.log[-1]:
            checkpoint.save(exp / f"conv{self.conv}_best.pth.tar", self.state())
        checkpoint.save(last_file(exp, self.conv), self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; `epoch` is the one to go on with."""
        return {
            "epoch": self.epoch,
            "layer": f"conv{self.conv}",
            "state_dict": self.linear.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "log": self.log,
            "best_epoch": self.best["epoch"],
            "protocol": self.settings,
        }

    def restore(self, path: Path) -> None:
        """Go on after the checkpoint at path; UserError where it is of another run or another thing."""
        saved = checkpoint.read(path)
        if saved.get("layer") != f"conv{self.conv}" or not isinstance(saved.get("protocol"), dict):
            raise UserError(f"{path}: not a classifier on conv{self.conv} that this program wrote")
        for name, value in self.settings.items():
            was = saved["protocol"].get(name)
            if was != value:
                numbers = "" if isinstance(value, str) else f" ({was}, now {value})"
                raise UserError(
                    f"--resume: {path} was trained with other {name}{numbers}; give the same, or a new --exp"
                )
        self.linear.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.steps, self.log = saved["epoch"], saved["steps"], saved["log"]


def last_file(exp: Path, conv: int) -> Path:
    return exp / f"conv{conv}_last.pth.tar"


def open_probes(
    args: argparse.Namespace, trunk: Trunk, settings: dict[str, Any], classes: int, exp: Path
) -> list[Probe]:
    """A classifier for each convolution of the trunk: fresh ones, or with --resume those in exp."""
    present = [conv for conv in trunk.values if last_file(exp, conv).exists()]
    if present and not args.resume:
        raise UserError(
            f"--exp {exp}: holds a classifier on conv{present[0]}; continue it with --resume, or choose "
            "another folder"
        )
    if args.resume and not present:
        raise UserError(f"--resume: no {last_file(exp, args.conv[0])} to continue; leave --resume out")
    probes = [Probe(conv, values, classes, args, trunk.device) for conv, values in trunk.values.items()]
    for probe in probes:
        probe.settings = settings
        if probe.conv in present:
            probe.restore(last_file(exp, probe.conv))
    return probes


# ------------------------------------------------------------------------------- one pass


def count(loss: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(summed loss, images whose class scores highest, among the five highest) as (3,) float64.

    scores (B, classes), target (B,). With fewer than five classes the last counts among all of them.
    """
    highest = scores.topk(min(5, scores.shape[1]), dim=1).indices
    found = highest == target[:, None]
    return torch.stack([loss.double(), found[:, 0].sum(), found.sum()])


class Tally:
    """Sums over a split for several classifiers at once."""

    def __init__(self) -> None:
        self.sums: np.ndarray | float = 0.0
        self.images = 0

    def add(self, sums: list[torch.Tensor], n: int) -> None:
        """Count n more images: for each classifier what `count` gave. One transfer from the device."""
        self.sums = self.sums + torch.stack(sums).cpu().numpy()
        self.images += n

    def records(self) -> list[dict[str, float]]:
        """For each classifier the mean loss and the precisions in percent."""
        means = (self.sums / self.images).tolist()
        return [{"loss": loss, "prec@1": 100 * first, "prec@5": 100 * five} for loss, first, five in means]


def train_epoch(
    trunk: Trunk, probes: list[Probe], images: data.ImageList, args: argparse.Namespace, epoch: int, log: Log
) -> list[dict[str, float]]:
    """One shuffled pass over images, one step a batch for every classifier; a record for each of them.

    The order depends on (seed, epoch), a crop on (seed, epoch, position). Raises UserError at a loss that is
    not finite.
    """
    view = data.TrainView(images, args.image_size, args.seed, epoch, data.probe_train_crop(args.image_size))
    order = np.random.default_rng(derive_seed(args.seed, "probe order", epoch)).permutation(len(images))
    loader = data.make_loader(
        view, args.batch_size, args.workers, DrawSampler(order), pin_memory=trunk.device.type == "cuda"
    )
    labels = torch.from_numpy(images.classes)
    progress, tally = Progress(len(images), f"epoch {epoch} train", log=log), Tally()
    for batch, (views, index) in enumerate(loader):
        rows = trunk(views, [probe.conv for probe in probes])
        target = labels[index].to(trunk.device, non_blocking=True)
        tally.add([probe.step(rows[probe.conv], target) for probe in probes], len(index))
        losses = [record["loss"] for record in tally.records()]
        for probe, loss in zip(probes, losses):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss on conv{probe.conv} is {loss} at iteration {batch} of epoch {epoch}: start "
                    "again with a lower --lr"
                )
        note = " ".join(f"{loss:.3f}" for loss in losses)
        progress.update(len(index), f"loss {note}")
        if args.verbose and batch and batch % 100 == 0:
            log(f"epoch {epoch} iteration {batch} mean loss {note}")
    progress.close()
    return tally.records()


def evaluate(
    trunk: Trunk, probes: list[Probe], images: data.ImageList, args: argparse.Namespace, label: str, log: Log
) -> list[dict[str, float]]:
    """One pass over images, on the central crop or on ten crops; a record for each classifier."""
    size = args.image_size
    view = data.CentralView(images, size, data.ten_crops(size) if args.tencrops else None)
    batch = max(args.batch_size // CROPS, 1) if args.tencrops else args.batch_size
    loader = data.make_loader(view, batch, args.workers, pin_memory=trunk.device.type == "cuda")
    labels = torch.from_numpy(images.classes)
    progress, tally = Progress(len(images), label, log=log), Tally()
    for views, index in loader:
        if (index < 0).any():
            broken = int(-1 - index[index < 0][0])
            raise UserError(f"{images.path(broken)}: {data.broken_reason(images, broken)}; remove or mend it")
        rows = trunk(views.reshape(-1, 3, size, size), [probe.conv for probe in probes])
        target = labels[index].to(trunk.device, non_blocking=True)
        tally.add([probe.judge(rows[probe.conv], target) for probe in probes], len(index))
        progress.update(len(index))
    progress.close()
    return tally.records()


# ------------------------------------------------------------------------------- the result


def report(
    args: argparse.Namespace, trunk: Trunk, probes: list[Probe], splits: dict[str, data.ImageList], log: Log
) -> list[dict[str, Any]]:
    """Print the table by layer, put it with the protocol into EXP/results.json, and return it."""
    results = [
        {
            "layer": f"conv{probe.conv}",
            "values": trunk.values[probe.conv],
            "last": probe.log[-1],
            "best": probe.best,
            "best chosen on": probe.criterion,
        }
        for probe in probes
    ]
    crops = f"{CROPS} crops, mean softmax" if args.tencrops else "central crop"
    chosen = (
        f"held-out {args.val_fraction:g} of train" if args.val_fraction > 0 else "val, the split reported"
    )
    log("")
    for line in table(results, published_columns(trunk.net.arch, len(splits["train"].class_names))):
        log(line)
    log(f"prec@1 / prec@5 in % on val ({crops}); in brackets the epoch, counted from 0")
    warning = "" if args.val_fraction > 0 else ": as the authors did, a little optimistic (--val-fraction)"
    log(f"best epoch chosen on {chosen}{warning}")
    for line in published_notes(trunk.net.arch, len(splits["train"].class_names)):
        log(line)
    protocol = {
        "data": args.data,
        **{f"{name} images": len(images) for name, images in splits.items()},
        "classes": len(splits["train"].class_names),
        "network": f"{args.model} ({trunk.net.arch}{' with Sobel' if trunk.net.sobel is not None else ''})",
        "frozen": "all of it, batch-norm statistics too (checked)",
        "layers": "+".join(result["layer"] for result in results),
        "image size": args.image_size,
        "split reported": "val",
        "crops": crops,
        "epochs": max(probe.epoch for probe in probes),
        "best epoch chosen on": chosen,
        "batch": args.batch_size,
        "lr": f"{args.lr:g} / sqrt(1 + {args.lr:g} * weight decay * steps)",
        "momentum": args.momentum,
        "weight decay": 10.0**args.weight_decay,
        "seed": args.seed,
        "precision": args.precision,
    }
    evaluation.report(args.exp, "linear", protocol, results)
    return results


def published_columns(arch: str, classes: int) -> dict[str, tuple[float, ...]]:
    """Title -> published top-1 by convolution to print beside ours; none for VGG-16."""
    if arch != "alexnet":
        return {}
    name = published_data(classes)
    return {f"{title}*": row for title, row in PUBLISHED[name].items()}


def published_data(classes: int) -> str:
    """The data set whose published figures go with so many classes: ImageNet unless it is Places205."""
    return "Places" if classes == 205 else "ImageNet"


def published_notes(arch: str, classes: int) -> list[str]:
    """What the published columns are, and what of it is verified."""
    if arch != "alexnet":
        return [f"no published figures by layer for {arch}"]
    name = published_data(classes)
    known = {"ImageNet": 1000, "Places": 205}[name]
    other = "" if classes == known else f"; this run has {classes} classes, so they are not comparable"
    notes = [f"* top-1 on {name}, DeepCluster and a random network: {PUBLISHED_MARK}{other}"]
    if name == "ImageNet":
        notes.append("  37.88 top-1 on ImageNet: the released AlexNet as measured by VISSL (layer not said)")
    return notes


def table(results: list[dict[str, Any]], published: dict[str, tuple[float, ...]]) -> list[str]:
    """The lines of the table: a layer a line, ours on the left, the published columns on the right."""

    def cell(record: dict[str, Any]) -> str:
        val = record["val"]
        return f"{val['prec@1']:.2f} / {val['prec@5']:.2f} ({record['epoch']})"

    lines = [
        f"{'layer':<8}{'values':>7}{'last epoch':>22}{'best epoch':>22}  "
        + "".join(f"{title:>17}" for title in published)
    ]
    for result in results:
        conv = int(result["layer"].removeprefix("conv"))
        lines.append(
            f"{result['layer']:<8}{result['values']:>7}{cell(result['last']):>22}{cell(result['best']):>22}  "
            + "".join(f"{row[conv - 1]:>17}" for row in published.values())
        )
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
