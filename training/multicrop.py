"""What SwAV and DeepCluster-v2 have in common around their losses: settings, images, network, optimiser."""

import math
from typing import Any

import numpy as np
import torch

import clustering
import distributed
import models
from algorithms.nearest import assign
from commandline import OLD_FLAGS
from data import ImageList, PlainView, RandomView, central_crop
from data.colours import Colours
from data.multicrop import MultiCrop
from features import ToPoints
from models.heads import Prototypes
from models.network import Network
from training.announce import announce, tell_old_flags
from training.labels import PseudoLabels
from training.logs import cures_of
from training.optim import LARC, Schedule, cosine, sgd
from training.run import Run
from util import Log, UserError

ALIKE = 0.99  # mean cosine of embeddings that tell images apart no more
PAPERS_RATE = 4.8 / 4096  # of an image in the global batch
FIXED = (
    "arch", "sobel", "nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops", "crops_for_assign",
    "temperature", "feat_dim", "hidden_mlp", "base_lr", "final_lr", "warmup_epochs",
    "start_warmup", "freeze_prototypes_niters", "seed", "scaled_decoding", "jitter_strength", "blur", "larc",
)  # fmt: skip


def open_run(run: Run, prototypes: int | list[int]) -> tuple[ImageList, Network, RandomView]:
    """The images, the network with its projection head and prototypes, and the view of several crops."""
    args = run.args
    lists = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
    check_crops({name: getattr(args, name) for name in lists}, args.crops_for_assign)
    tell_old_flags(run, OLD_FLAGS)
    images = run.open_images()
    if len(images) < run.batch:
        raise UserError(
            f"--batch_size {args.batch_size}: a global batch of {run.batch} is more than the {len(images)} "
            f"images of {images.name}, no step would be made; give less"
        )
    net = models.build(args.arch, args.sobel, seed=run.seed("weights"))
    net.set_embedding(args.hidden_mlp, args.feat_dim, prototypes, run.seed("head"))
    net = run.network(net, args.init, args.sync_bn != "none")
    colours = Colours(strength=args.jitter_strength, blur=args.blur)
    crops = MultiCrop(args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops, colours)
    sizes = " + ".join(f"{n} x {size}" for n, size in zip(args.nmb_crops, args.size_crops))
    what = (
        f"{net}, crops {sizes} px, prototypes {prototypes}, global batch {run.batch}, "
        f"{len(images) // run.batch} steps an epoch, epochs {run.epoch} to {args.epochs}; base_lr "
        f"{args.base_lr:g}, by linear scaling of the paper's it would be {PAPERS_RATE * run.batch:.3g}"
    )
    announce(run, images, what)
    return images, net, RandomView(images, crops)


def check_crops(groups: dict[str, list[float]], assign: list[int]) -> None:
    """Refuse lists of crops, by the names of their flags, that do not fit each other."""
    if len({len(values) for values in groups.values()}) > 1:
        found = ", ".join(f"--{name} {len(values)}" for name, values in groups.items())
        raise UserError(f"the lists of crops need one entry a group each; they have {found}")
    for low, high in zip(groups["min_scale_crops"], groups["max_scale_crops"]):
        if low > high:
            raise UserError(f"--min_scale_crops {low}: larger than --max_scale_crops {high}")
    number = sum(groups["nmb_crops"])
    if number < 2:
        raise UserError(f"--nmb_crops {number}: at least two crops, of which one predicts the other")
    for v in assign:
        if v >= number:
            raise UserError(f"--crops_for_assign {v}: there are {number} crops, counted from 0")


def optimizer_and_schedule(run: Run, net: Network, steps: int) -> tuple[LARC | torch.optim.SGD, Schedule]:
    """LARC around SGD with momentum 0.9, or SGD alone, over everything that trains; the cosine with warm-up.

    The prototypes are a group of their own, as they may be frozen at first (torch's fused SGD wants momentum
    for all of a group or for none).
    """
    args = run.args
    optimizer = sgd(net.body_parameters(), args.base_lr, 0.9, args.wd)
    prototypes = [p for p in net.prototypes.parameters() if p.requires_grad]
    if prototypes:
        optimizer.add_param_group({"params": prototypes})
    schedule = cosine(args.base_lr, args.final_lr, args.epochs, args.warmup_epochs, args.start_warmup, steps)
    return (LARC(optimizer) if args.larc else optimizer), schedule


def freeze_prototypes(prototypes: Prototypes, niters: int, iteration: int) -> None:
    """While the iteration is below niters prototypes have no gradient: no update, no decay, no momentum."""
    if iteration < niters:
        for weight in prototypes.sets():
            weight.grad = None


class PrototypeUse:
    """How the crops that give codes spread over the prototypes, in an epoch; a part of a run.

    Counts the prototype of the largest score. Tells of a collapse before hours are lost.
    """

    def __init__(self, prototypes: int, settings: dict[str, Any], log: Log) -> None:
        self._counts = torch.zeros(prototypes, dtype=torch.int64)
        self._cosines = torch.zeros(2, dtype=torch.float64)  # sum over pairs in a batch, number of pairs
        self._settings, self._log = settings, log

    def see(self, scores: torch.Tensor, z: torch.Tensor) -> None:
        """Scores (B, k) and embeddings (B, D) of a crop of this rank's images."""
        found = scores.detach().argmax(dim=1).cpu()
        self._counts += torch.bincount(found, minlength=len(self._counts))
        b, whole = len(z), z.detach().double().sum(0)
        self._cosines += torch.tensor([whole.square().sum().item() - b, b * (b - 1)], dtype=torch.float64)

    def finish(self) -> dict[str, Any]:
        """Of the epoch, the same on every rank, and starts anew.

        Share of the largest prototype, effective number of prototypes (exp of the entropy), mean cosine
        between embeddings of a batch.
        """
        counts, cosines = self.state_dict().values()
        self._counts.zero_(), self._cosines.zero_()
        shares = counts[counts > 0].double() / counts.sum()
        largest, cosine = shares.max().item(), (cosines[0] / cosines[1].clamp(min=1)).item()
        if largest > 0.5 or cosine > ALIKE:
            alike = ", and all embeddings of a batch are alike" if cosine > ALIKE else ""
            self._log(
                f"warning: collapse, one prototype has {largest:.0%} of the images{alike}; try "
                f"{cures_of(self._settings)}"
            )
        return {
            "largest_prototype": largest,
            "effective_prototypes": math.exp(-(shares * shares.log()).sum().item()),
            "mean_cosine": cosine,
        }

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks: call it on every one."""
        whole = {"counts": self._counts, "cosines": self._cosines}
        return {name: distributed.all_reduce(value.clone()) for name, value in whole.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts, self._cosines = (
            state[name].clone() if distributed.is_main() else torch.zeros_like(state[name])
            for name in ("counts", "cosines")
        )


def assign_to_prototypes(run: Run, images: ImageList, net: Network, labels: PseudoLabels, size: int) -> None:
    """Each image's nearest prototype, by its central crop in eval mode, as the labels of the finished run."""
    z = run.feature_pass(net, PlainView(images, central_crop(size)), "embedding")  # (n_r, D)
    net.prototypes.normalise()
    found = []
    for weight in net.prototypes.sets():
        centroids = weight.detach().cpu().numpy()
        own = assign(z, centroids, run.device) if len(z) else (np.zeros(0, np.int64), np.zeros(0, np.float32))
        of, far = (distributed.all_gather_rows(array) for array in own)
        found.append(clustering.Assignment(of, len(centroids), float(far.sum()), far, centroids))
    labels.take(run.epoch, *found, net=net, layer="embedding", to_points=ToPoints(None, l2=True))
