"""Unsupervised training of a convnet by DeeperCluster (Caron et al., ICCV 2019): rotations times clusters.

    METHOD=deepercluster ./main.sh                    the demo: train on the embedded photographs
    python main_deepercluster.py DIR --sobel true --exp exp --k 320000 --super_classes 16
    python main_deepercluster.py DIR --super_classes 4 --k 1          RotNet: rotations alone
    python main_deepercluster.py DIR --super_classes 1 --rotnet false DeepCluster with this schedule

Every few epochs all images are clustered at two levels; then a view, turned by a multiple of 90 degrees, has
to tell its super-class, which is its super-cluster and its rotation, and in that its sub-class.
"""

import argparse

from commandline import (
    Parser,
    add_crop_cache,
    add_data,
    add_image_size,
    add_method_files,
    add_method_machine,
    add_old_flags,
    at_least,
    positive,
    within,
    word,
)


def get_parser() -> Parser:
    """The flags of main_deepercluster.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_data(parser)
    parser.add_argument("--data_path", dest="dir", metavar="DIR", default=argparse.SUPPRESS, help="DIR too")
    parser.add_argument(
        "--size_dataset", type=at_least(2), default=10_000_000, help="use so many images, the first ones"
    )
    add_network(parser.add_argument_group("network"))
    add_clustering(parser.add_argument_group("clustering"))
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=positive, default=0.1, help="learning rate, of a global batch of 3072")
    group.add_argument("--wd", type=within(0, 1), default=1e-5, help="weight decay (itself, not its power)")
    group.add_argument("--nepochs", dest="epochs", type=at_least(1), default=100, help="number of epochs")
    group.add_argument("--batch_size", type=at_least(1), default=48, help="views of one process in a step")
    group = parser.add_argument_group("files")
    add_method_files(group)
    add_crop_cache(group)
    group.add_argument("--dump_path", dest="exp", metavar="EXP", default=argparse.SUPPRESS, help="--exp too")
    group.add_argument(
        "--checkpoint_freq", type=at_least(1), default=1, help="epochs between two checkpoints that are kept"
    )
    group = parser.add_argument_group("machine")
    add_method_machine(group)
    parser.set_defaults(workers=8)
    add_old_flags(group, OLD_FLAGS)
    return parser


def add_network(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--arch",
        default="vgg16wide",
        metavar="ARCH",
        help="CNN architecture, of main.py's or vgg16wide, VGG-16 in the geometry of DeeperCluster's own",
    )
    group.add_argument("--sobel", type=word, default=False, metavar="BOOL", help="Sobel filtering in front")
    group.add_argument(
        "--pretrained", "--init", dest="init", metavar="PATH", help="weights to start from (not the heads)"
    )
    add_image_size(group)


def add_clustering(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--reassignment", type=at_least(1), default=3, help="epochs between two clusterings; 1 for small sets"
    )
    group.add_argument(
        "--dim_pca",
        type=at_least(1),
        default=4096,
        help="dimensions of the whitened features; a fifteenth of the number of images at most",
    )
    group.add_argument(
        "--k",
        type=at_least(1),
        default=10000,
        help="sub-classes of all super-clusters; 20 images or more each",
    )
    group.add_argument(
        "--super_classes",
        type=at_least(1),
        default=4,
        help="super-classes: with rotations four times the super-clusters",
    )
    group.add_argument(
        "--rotnet", type=word, default=True, metavar="BOOL", help="turn the views and predict by how much"
    )
    group.add_argument("--niter", type=at_least(1), default=10, help="iterations of k-means")
    group.add_argument("--warm_restart", type=word, default=False, metavar="BOOL", help=argparse.SUPPRESS)


# Of the authors' command line, without an effect.
OLD_FLAGS = (
    "--use_faiss", "--epoch", "--start_iter", "--world-size", "--dist-url", "--rank", "--local_rank",
    "--debug_slurm",
)  # fmt: skip


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

import clustering
import models
from data import ImageList, PlainView, RandomView, central_crop, open_cache, train_crop, turned
from features import ToPoints
from models.parallel import Share, at_least_float32
from models.two_level import super_classifier
from training import two_level
from training.announce import announce, tell_old_flags
from training.labels import PseudoLabels
from training.optim import sgd
from training.run import Run
from util import UserError, run_main
from visu.pictures import finish

MOMENTUM = 0.9
FIXED = (
    "arch", "sobel", "seed", "image_size", "reassignment", "dim_pca", "k", "super_classes",
    "rotnet", "niter", "scaled_decoding",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train; everything that is learnt is written into args.exp. Under torchrun, one of several processes."""
    turns = 4 if args.rotnet else 1
    coarse, fine = two_level.levels(args.super_classes, turns, args.k)
    with Run(args, "deepercluster", FIXED) as run:
        images = open_images(run, coarse * fine)
        net = models.build(args.arch, args.sobel, seed=run.seed("weights"))
        net = run.network(net, args.init, sync_bn=True)  # a rank sees few super-classes in a step: a must
        new_top = partial(super_classifier, net.feature_dim, coarse * turns)
        net.top_layer = new_top(run.seed("super", 0)).to(run.device)
        body = sgd(net.body_parameters(), args.lr, MOMENTUM, args.wd)
        top = sgd(net.top_layer.parameters(), args.lr, MOMENTUM, args.wd)
        labels = PseudoLabels(run.exp, images, run.log, vars(args), run.origin)
        heads, hits = two_level.SubHeads(run.device, args.lr, MOMENTUM, args.wd), two_level.Hits()
        run.keep(images=images, net=net, body=body, top=top, labels=labels, heads=heads, hits=hits)
        what = f"{net} at {args.image_size} px, {coarse} super-cluster(s) of {fine}, {turns} turn(s)"
        announce(run, images, f"{what}, global batch {run.batch}")

        plain = PlainView(
            images, central_crop(args.image_size), open_cache(args.crop_cache, images, args.image_size)
        )
        random = RandomView(images, train_crop(args.image_size), then=turned)
        for epoch in run.epochs(args.epochs):
            due = epoch % args.reassignment == 0 and labels.epoch != epoch
            if due:
                cluster = partial(clustering.kmeans_two_level, coarse=coarse, fine=fine, niter=args.niter)
                relabel(run, net, plain, labels, cluster, args.dim_pca, rotations_only=coarse * fine == 1)
            active = two_level.filled_super_clusters(labels.ids, fine)
            if due:
                heads.make(
                    net.feature_dim, fine, len(active) * turns, run.batch, len(images), run.seed("sub", epoch)
                )
                if coarse > 1 and epoch > 0:  # without super-clusters it tells rotations alone, and goes on
                    net.top_layer = new_top(run.seed("super", epoch)).to(run.device)
                    top = sgd(net.top_layer.parameters(), args.lr, MOMENTUM, args.wd)
                    run.keep(top=top)
            seed = run.seed("sampling", epoch)
            draws = two_level.by_super_class(labels.ids, fine, active, turns, len(images), run.batch, seed)
            step_loss = partial(loss, labels, active, fine, turns, heads, hits, run.share)
            optimizers = [body, top, heads.optimizer]
            run.train_pass(net, optimizers, random, draws, step_loss, after_backward=heads.reduce)
            run.finish_epoch(
                np.log(max(coarse * turns, 2)) + np.log(fine), **labels.figures(), **hits.finish()
            )
        finish(run, images, labels)


def open_images(run: Run, clusters: int) -> ImageList:
    """The first --size_dataset images; UserError for flags that cannot be done with them."""
    args = run.args
    if args.warm_restart:
        raise UserError("--warm_restart: is not there, as whitening differs from clustering to clustering")
    two_level.check_precision(args.precision)
    tell_old_flags(run, OLD_FLAGS)
    images = run.open_images(enough=partial(two_level.check_enough, clusters, args.size_dataset))
    if len(images) > args.size_dataset:
        images = images.keep(np.arange(len(images)) < args.size_dataset)
    return images


def relabel(
    run: Run,
    net: models.Network,
    plain: PlainView,
    labels: PseudoLabels,
    cluster,
    dim: int,
    rotations_only: bool,
) -> None:
    """New labels: features, whitening, two-level k-means; of rotations alone there is nothing to cluster."""
    if rotations_only:
        labels.set(run.epoch, clustering.one_cluster(len(plain)))
        return
    features = run.feature_pass(net, plain, net.feature)  # (n_r, D), before the last ReLU
    with run.timed("pca"):
        pca, points = clustering.preprocess(features, dim, run.device, run.log, overwrite=True)
    del features
    with run.timed("clustering"):
        found = cluster(points, seed=run.seed("clustering", run.epoch), device=run.device)
    labels.take(run.epoch, found, net=net, layer=net.feature, to_points=ToPoints(pca, l2=True))


def loss(
    labels: PseudoLabels,
    active: np.ndarray,
    fine: int,
    turns: int,
    heads: two_level.SubHeads,
    hits: two_level.Hits,
    share: Share,
    net: torch.nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    turn: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the super-classes and of the sub-classes in them, summed over the B views x.

    index (B,): the images, turn (B,): quarter turns of the views. Both terms weigh 1: section 3.3 of the
    paper. A sub-classifier gets the gradient of the mean over its own views.
    """
    ids = labels.of(index, x.device)
    cluster, sub = ids // fine, ids % fine
    super_class = cluster * turns + turn
    place = torch.searchsorted(torch.from_numpy(active).to(x.device), cluster) * turns + turn
    logits, features = net(x)
    of_super = F.cross_entropy(at_least_float32(logits), super_class, reduction="sum")
    of_sub, found = heads.module(features, place, sub, heads.scale(place, share.total))
    hits.see(logits, super_class, found, of_super, of_sub, turn, turns)
    return of_super + of_sub


if __name__ == "__main__":
    run_main(main, ARGS)
