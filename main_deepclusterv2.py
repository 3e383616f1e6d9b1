"""Unsupervised training of a convnet by DeepCluster-v2 (Caron et al., NeurIPS 2020, appendix).

    METHOD=deepclusterv2 ./main.sh                    the demo: train on the embedded photographs
    python main_deepclusterv2.py DIR --exp exp --epochs 400 --nmb_crops 2 4 --size_crops 160 96 \\
        --min_scale_crops 0.08 0.05 --max_scale_crops 1 0.14
    torchrun --nproc-per-node=8 main_deepclusterv2.py DIR --exp exp --batch_size 32 --resume auto

The embeddings that images had in the last epoch are clustered by spherical k-means, once for each head; the
centroids are the classifier of the next epoch, and every crop of an image has to find the image's cluster.
"""

import argparse

from commandline import Parser, add_multicrop, add_multicrop_training, at_least


def get_parser() -> Parser:
    """The flags of main_deepclusterv2.py; those that SwAV has too are in commandline.py."""
    parser = Parser(__doc__)
    add_multicrop(parser)
    group = parser.add_argument_group("clustering")
    group.add_argument(
        "--nmb_prototypes",
        type=at_least(2),
        nargs="+",
        default=[3000, 3000, 3000],
        help="clusters of each head, about ten times the number of classes; fewer where the loss stays at "
        "ln K",
    )
    add_multicrop_training(parser, freeze=10**10)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from functools import partial

import torch
from torch.nn import functional as F

from clustering import kmeans
from data.sampling import shuffled
from features import ToPoints
from models.network import Network
from training import multicrop
from training.labels import PseudoLabels
from training.memory import Bank
from training.run import Run
from util import UserError, run_main
from visu.pictures import finish

KMEANS_ITERATIONS = 10
FIXED = ("nmb_prototypes", *multicrop.FIXED)


def main(args: argparse.Namespace) -> None:
    """Train; everything that is learnt is written into args.exp. Under torchrun, one of several processes."""
    with Run(args, "deepclusterv2", FIXED) as run:
        images, net, view = multicrop.open_run(run, args.nmb_prototypes)
        check_enough(len(images), args.nmb_prototypes)
        steps = len(images) // run.batch
        optimizer, schedule = multicrop.optimizer_and_schedule(run, net, steps)
        bank = Bank(len(images), len(args.crops_for_assign), args.feat_dim)
        labels = PseudoLabels(run.exp, images, run.log, vars(args), run.origin)
        use = multicrop.PrototypeUse(args.nmb_prototypes[0], vars(args), run.log)
        run.keep(images=images, net=net, optimizer=optimizer, bank=bank, labels=labels, use=use)
        if bank.empty:  # batch statistics, no gradient, in the order of the first epoch
            draws = shuffled(len(images), run.seed("order", 0))
            run.look_pass(net, view, draws, partial(fill, bank, args.crops_for_assign))
        freeze = partial(multicrop.freeze_prototypes, net.prototypes, args.freeze_prototypes_niters)
        step_loss = partial(loss, args.crops_for_assign, args.temperature, bank, labels, use)
        for epoch in run.epochs(args.epochs):
            if labels.epoch != epoch:  # else resumed in the middle of it
                bank.settle()
                with run.timed("clustering"):
                    found = [
                        kmeans(bank.crop(h), k, run.seed("clustering", epoch, h), niter=KMEANS_ITERATIONS,
                               spherical=True, device=run.device)
                        for h, k in enumerate(args.nmb_prototypes)
                    ]  # fmt: skip
                labels.take(epoch, *found, net=net, layer="embedding", to_points=ToPoints(None, l2=True))
                net.prototypes.set([torch.from_numpy(a.centroids) for a in found])
            draws = shuffled(len(images), run.seed("order", epoch))[: steps * run.batch]
            run.train_pass(net, [optimizer], view, draws, step_loss, schedule=schedule, after_backward=freeze)
            figures = labels.figures() | use.finish() | {"lr": schedule(run.iteration - 1)}
            run.finish_epoch(labels.log_k, **figures)
        finish(run, images, labels)


def fill(bank: Bank, assign: list[int], net: Network, crops: list[torch.Tensor], index: torch.Tensor) -> None:
    """Embeddings of the crops `assign`, one crop at a time, go into the bank."""
    bank.put(index, torch.stack([net([crops[v]])[0] for v in assign]))


def loss(
    assign: list[int],
    temperature: float,
    bank: Bank,
    labels: PseudoLabels,
    use: multicrop.PrototypeUse,
    net: Network,
    crops: list[torch.Tensor],
    index: torch.Tensor,
) -> torch.Tensor:
    """Every crop has to find the cluster of its image: summed over the B images, mean over crops and heads.

    crops: V tensors (B, 3, S_v, S_v). The embeddings of the crops `assign` go into the bank as they are now.
    """
    z, heads = net(crops)
    z = z.unflatten(0, (len(crops), -1))  # (V, B, D)
    bank.put(index, z[assign])
    for v in assign:
        use.see(heads[0].unflatten(0, (len(crops), -1))[v], z[v])
    targets = [labels.of(index, z.device, head=h) for h in range(len(heads))]
    return sum(
        prototype_loss(scores, target, len(crops), temperature) for scores, target in zip(heads, targets)
    ) / len(heads)


def prototype_loss(
    scores: torch.Tensor, target: torch.Tensor, crops: int, temperature: float
) -> torch.Tensor:
    """Cross-entropy of scores (V * B, k), crop-major, and the images' clusters (B,): mean over V, sum over B.

    Images of cluster -100 count neither in the loss nor in its gradient.
    """
    every = target.repeat(crops)
    return F.cross_entropy(scores / temperature, every, reduction="sum", ignore_index=-100) / crops


def check_enough(images: int, prototypes: list[int]) -> None:
    """Refuse more clusters than images."""
    if max(prototypes) > images:
        raise UserError(
            f"--nmb_prototypes {max(prototypes)}: more clusters than the {images} images; give about ten "
            "times the number of classes that you expect"
        )


if __name__ == "__main__":
    run_main(main, ARGS)
