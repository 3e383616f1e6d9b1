"""Unsupervised training of a convnet by SwAV (Caron et al., NeurIPS 2020).

    METHOD=swav ./main.sh                             the demo: train on the embedded photographs
    python main_swav.py DIR --exp exp --epochs 200 --batch_size 256 --base_lr 0.6 --final_lr 0.0006 \\
        --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1 0.14
    torchrun --nproc-per-node=8 main_swav.py DIR --exp exp --batch_size 32 --resume auto

Each crop of an image predicts the code of another crop. Codes are the scores to the prototypes, spread
evenly over the prototypes by Sinkhorn's iteration: clustering online, a batch at a time.
"""

import argparse

from commandline import Parser, add_multicrop, add_multicrop_training, at_least, positive


def get_parser() -> Parser:
    """The flags of main_swav.py; those that DeepCluster-v2 has too are in commandline.py."""
    parser = Parser(__doc__)
    add_multicrop(parser)
    group = parser.add_argument_group("codes")
    group.add_argument(
        "--nmb_prototypes",
        type=at_least(2),
        nargs="+",
        default=[3000],
        help="prototypes, about ten times the number of classes; several numbers: several heads. Fewer "
        "where the loss stays at ln K",
    )
    group.add_argument(
        "--epsilon",
        type=positive,
        default=0.05,
        help="smoothness of the codes: lower it (0.03) when training collapses",
    )
    group.add_argument(
        "--sinkhorn_iterations", type=at_least(1), default=3, help="iterations of Sinkhorn's algorithm"
    )
    group.add_argument(
        "--queue_length",
        type=at_least(0),
        default=0,
        help="embeddings of earlier batches that take part in the codes, of all processes together; for "
        "small batches, 0: none; shorten it or start it later when it makes training worse",
    )
    group.add_argument(
        "--epoch_queue_starts", type=at_least(0), default=15, help="the queue is filled from this epoch on"
    )
    add_multicrop_training(parser, freeze=313)
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from algorithms.sinkhorn import sinkhorn
from data.sampling import shuffled
from models.heads import Prototypes
from models.network import Network
from training import multicrop
from training.labels import PseudoLabels
from training.memory import Queue
from training.run import Run
from util import UserError, run_main
from visu.pictures import finish

FIXED = (
    "nmb_prototypes", "epsilon", "sinkhorn_iterations", "queue_length", "epoch_queue_starts", *multicrop.FIXED
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train; everything that is learnt is written into args.exp. Under torchrun, one of several processes."""
    with Run(args, "swav", FIXED) as run:
        counts = args.nmb_prototypes
        images, net, view = multicrop.open_run(run, counts[0] if len(counts) == 1 else counts)
        steps = len(images) // run.batch
        optimizer, schedule = multicrop.optimizer_and_schedule(run, net, steps)
        length = whole_batches(args.queue_length, run.batch)
        queue = Queue(length, run.batch, len(args.crops_for_assign), args.feat_dim, run.device)
        use = multicrop.PrototypeUse(counts[0], vars(args), run.log)
        run.keep(images=images, net=net, optimizer=optimizer, queue=queue, use=use)
        tell_of_queue(run, length, max(counts), args.epoch_queue_starts * steps + queue.slots)
        codes = partial(sinkhorn, epsilon=args.epsilon, niter=args.sinkhorn_iterations)
        step_loss = partial(loss, args.crops_for_assign, args.temperature, codes, net.prototypes, queue, use)
        freeze = partial(multicrop.freeze_prototypes, net.prototypes, args.freeze_prototypes_niters)
        for epoch in run.epochs(args.epochs):
            queue.on = epoch >= args.epoch_queue_starts
            draws = shuffled(len(images), run.seed("order", epoch))[: steps * run.batch]
            run.train_pass(net, [optimizer], view, draws, step_loss, schedule=schedule, after_backward=freeze)
            figures = use.finish() | {"lr": schedule(run.iteration - 1), "queue_in_use": queue.full}
            run.finish_epoch(math.log(counts[0]), **figures)
        labels = PseudoLabels(run.exp, images, run.log, vars(args))
        multicrop.assign_to_prototypes(run, images, net, labels, args.size_crops[0])
        finish(run, images, labels)


def loss(
    assign: list[int],
    temperature: float,
    codes_of: Callable[[torch.Tensor], torch.Tensor],
    prototypes: Prototypes,
    queue: Queue,
    use: multicrop.PrototypeUse,
    net: Network,
    crops: list[torch.Tensor],
    index: torch.Tensor,
) -> torch.Tensor:
    """Every crop predicts the codes of the crops `assign` of its image: summed over the B images.

    crops: V tensors (B, 3, S_v, S_v). codes_of: scores -> codes. Mean over heads, over the crops that give
    codes, and over the others.
    """
    prototypes.normalise()
    z, heads = net(crops)
    z = z.unflatten(0, (len(crops), -1))  # (V, B, D)
    total = z.new_zeros(())
    for scores, weight in zip(heads, prototypes.sets()):
        scores = scores.unflatten(0, (len(crops), -1))  # (V, B, k)
        codes = []
        for place, v in enumerate(assign):
            before = queue.of(place).to(weight.dtype) @ weight.detach().T  # by today's prototypes
            every = torch.cat([before.to(scores.dtype), scores[v].detach()])
            codes.append(codes_of(every)[len(before) :])
        total = total + swapped_loss(scores, codes, assign, temperature) / len(heads)
    for v in assign:
        use.see(heads[0].unflatten(0, (len(crops), -1))[v], z[v])
    queue.put(z[assign].detach())
    return total


def swapped_loss(
    scores: torch.Tensor, codes: list[torch.Tensor], assign: list[int], temperature: float
) -> torch.Tensor:
    """Cross-entropy between the codes of a crop and what the other crops say, summed over the images.

    scores (V, B, k) of all crops; codes (B, k) of each crop in `assign`: Caron et al., NeurIPS 2020, equation
    2, for V crops. Mean over `assign`, and over the V - 1 other crops of each.
    """
    log_said = F.log_softmax(scores / temperature, dim=2)
    total = scores.new_zeros(())
    for v, code in zip(assign, codes):
        others = [w for w in range(len(scores)) if w != v]
        total = total - (code * log_said[others].sum(0)).sum() / len(others)
    return total / len(assign)


def whole_batches(length: int, batch: int) -> int:
    """The length of the queue cut to whole batches; UserError where it would hold none."""
    if 0 < length < batch:
        raise UserError(
            f"--queue_length {length}: less than the global batch {batch}; give a multiple of it, or 0"
        )
    return length - length % batch


def tell_of_queue(run: Run, length: int, prototypes: int, first: int) -> None:
    """When the queue is used first, and whether codes have samples enough to spread over the prototypes."""
    if length:
        run.log(f"a queue of {length} embeddings, used from iteration {first} on; compare the loss before it")
    if length + run.batch < prototypes:
        run.log(
            f"note: batch and queue hold {length + run.batch} samples for {prototypes} prototypes; a longer "
            "--queue_length or fewer --nmb_prototypes spread codes better"
        )


if __name__ == "__main__":
    run_main(main, ARGS)
