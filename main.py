"""Unsupervised training of a convnet by DeepCluster (Caron et al., ECCV 2018).

    ./main.sh                                         the demo: train on the embedded photographs
    python main.py DIR --sobel --exp exp              the paper's settings on a folder of images
    python main.py DIR --sobel --exp exp --resume auto
    torchrun --nproc-per-node=8 main.py DIR --sobel --exp exp --sync-bn --resume auto

One epoch (section 3 of the paper): features of all images -> PCA-whitening, L2 -> k-means -> the cluster ids
are the labels of one epoch of classification with a fresh head.
"""

import argparse

from commandline import (
    Parser,
    add_crop_cache,
    add_data,
    add_method_files,
    add_method_machine,
    add_network,
    at_least,
    positive,
    power_of_ten,
    within,
)


def get_parser() -> Parser:
    """The flags of main.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    add_data(parser)
    add_network(parser.add_argument_group("network"))
    add_clustering(parser.add_argument_group("clustering"))
    add_training(parser.add_argument_group("training"))
    group = parser.add_argument_group("files")
    add_method_files(group)
    add_crop_cache(group)
    add_method_machine(parser.add_argument_group("machine"))
    return parser


def add_clustering(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--clustering", choices=("Kmeans", "PIC"), default="Kmeans", help="clustering algorithm"
    )
    group.add_argument(
        "--nmb_cluster",
        "--k",
        type=at_least(2),
        default=10000,
        help="number of cluster for "
        "k-means; about ten times the number of classes that you expect, fewer where clusters stay empty or "
        "the loss stays at log k",
    )
    group.add_argument(
        "--kmeans",
        choices=("faiss", "distributed"),
        default="faiss",
        help="with several "
        "processes: faiss on the first one and all its GPUs, or Lloyd's iterations with each process keeping "
        "its rows",
    )
    group.add_argument(
        "--reassign",
        type=positive,
        default=1.0,
        help="how many epochs of training between two consecutive reassignments of clusters",
    )
    group.add_argument(
        "--sampling",
        choices=("uniform", "released"),
        default="uniform",
        help="uniform: over "
        "clusters, as in the paper; released: as the authors' code did, in proportion to cluster size",
    )
    group.add_argument(
        "--feature-dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how the features of all images are held in memory",
    )


def add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lr",
        type=positive,
        default=0.05,
        help="learning rate; lower it when the loss "
        "diverges or one cluster takes all, raise it when the loss stays at log k",
    )
    group.add_argument("--wd", type=power_of_ten, default=-5, help="weight decay pow")
    group.add_argument("--momentum", type=within(0, 1, "high"), default=0.9, help="momentum")
    group.add_argument(
        "--batch", type=at_least(1), default=256, help="mini-batch size, of all processes together"
    )
    group.add_argument("--epochs", type=at_least(1), default=200, help="number of total epochs to run")
    group.add_argument(
        "--start_epoch",
        type=at_least(0),
        default=0,
        help="manual epoch number (useful on restarts from --init)",
    )
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="batch norm over the whole batch rather than each process's part of it",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from functools import partial

import torch
from torch.nn import functional as F

import clustering
import models
from clustering import CLUSTERINGS, FINDS_K
from data import ImageList, PlainView, RandomView, central_crop, open_cache, train_crop
from data.sampling import SAMPLERS
from features import ToPoints
from training.announce import announce
from training.labels import PseudoLabels
from training.optim import sgd
from training.run import Run
from util import UserError, run_main
from visu.pictures import finish

PCA_DIM = 256  # section 3.4 of the paper: PCA-reduced to 256 dimensions, whitened, L2-normalised
FIXED = (
    "arch", "sobel", "clustering", "nmb_cluster", "seed", "batch", "reassign", "sampling", "image_size",
    "feature_dtype", "scaled_decoding",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train; everything that is learnt is written into args.exp. Under torchrun, one of several processes."""
    check(args)
    finds_k = args.clustering in FINDS_K  # its number of clusters comes out of the images, --k is not used
    cluster = CLUSTERINGS[args.clustering]
    if not finds_k:
        cluster = partial(cluster, k=args.nmb_cluster, ranks=args.kmeans == "distributed")
    fixed = [name for name in FIXED if not (finds_k and name == "nmb_cluster")]
    with Run(args, "deepcluster", fixed) as run:
        images = run.open_images(enough=partial(check_enough, k=None if finds_k else args.nmb_cluster))
        net = run.network(
            models.build(args.arch, args.sobel, seed=run.seed("weights")), args.init, args.sync_bn
        )
        labels = PseudoLabels(run.exp, images, run.log, vars(args), run.origin)
        run.keep(images=images, labels=labels)
        if labels.assignments:
            net.set_head(labels.num_clusters)
        body = sgd(net.body_parameters(), args.lr, args.momentum, 10**args.wd)
        run.keep(net=net, body=body)
        k = "" if finds_k else f", k {args.nmb_cluster}"
        what = f"{net} at {args.image_size} px, {args.clustering}{k}, {args.sampling} sampling"
        announce(run, images, what)

        cache = open_cache(args.crop_cache, images, args.image_size)
        plain = PlainView(images, central_crop(args.image_size), cache)
        random = RandomView(images, train_crop(args.image_size))
        for epoch in run.epochs(args.epochs):
            if labels.epoch != epoch:  # else resumed in the middle of it
                features = run.feature_pass(net, plain, net.feature)  # (n_r, 4096), before the last ReLU
                with run.timed("pca"):
                    pca, points = clustering.preprocess(features, PCA_DIM, run.device, run.log)  # norm 1
                del features  # N x 4096 is held only while it is clustered
                with run.timed("clustering"):
                    found = cluster(points, seed=run.seed("clustering", epoch), device=run.device)
                to_points = ToPoints(pca, l2=True, dtype=args.feature_dtype)
                labels.take(epoch, found, net=net, layer=net.feature, to_points=to_points)
                net.set_head(found.num_clusters, run.seed("head", epoch))
                run.forget("head")
            head = sgd(net.top_layer.parameters(), args.lr, 0.0, 10**args.wd)
            run.keep(head=head)
            total = max(int(args.reassign * len(images)), 1)
            draws = SAMPLERS[args.sampling](labels.ids, total, run.seed("sampling", epoch))
            run.train_pass(net, [body, head], random, draws, partial(loss, labels))
            run.finish_epoch(labels.log_k, **labels.figures())
        finish(run, images, labels)


def loss(labels: PseudoLabels, net: torch.nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the cluster ids of the images index (B,), summed over them; x (B, 3, S, S)."""
    return F.cross_entropy(net(x).float(), labels.of(index, x.device), reduction="sum")


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: the run ends at --epochs {args.epochs}")
    if args.kmeans == "distributed" and args.clustering in FINDS_K:
        raise UserError(f"--kmeans distributed: not with --clustering {args.clustering}")
    if args.resume and args.resume != "auto" and args.init:
        raise UserError("--resume and --init: a resumed run has its own weights; give one of them")
    if args.resume and args.start_epoch:
        raise UserError(
            "--start_epoch with --resume: the checkpoint knows its epoch; leave --start_epoch out"
        )


def check_enough(images: ImageList, k: int | None) -> None:
    """Refuse more clusters than images."""
    if k is not None and k > len(images):
        raise UserError(
            f"--nmb_cluster {k}: more clusters than images, {images.name} has {len(images)}; use --k with "
            "about ten times the number of classes that you expect"
        )
    if len(images) < 2:
        raise UserError(f"{images.name}: {len(images)} image is not enough to cluster")


if __name__ == "__main__":
    run_main(main, ARGS)
