"""Flags and defaults of the authors' command lines, as their scripts and papers' users know them."""

import pytest

import main_deepclusterv2
import main_deepercluster
import main_swav
from tests.helpers import refuses

BOTH = {
    "nmb_crops": [2], "size_crops": [224], "min_scale_crops": [0.14], "max_scale_crops": [1.0],
    "crops_for_assign": [0, 1], "temperature": 0.1, "feat_dim": 128, "epochs": 100, "batch_size": 64,
    "base_lr": 4.8, "final_lr": 0, "warmup_epochs": 10, "start_warmup": 0, "wd": 1e-6, "arch": "resnet50",
    "hidden_mlp": 2048, "workers": 10, "checkpoint_freq": 25, "sync_bn": "pytorch", "seed": 31,
}  # fmt: skip
SWAV = BOTH | {
    "epsilon": 0.05, "sinkhorn_iterations": 3, "nmb_prototypes": [3000], "queue_length": 0,
    "epoch_queue_starts": 15, "freeze_prototypes_niters": 313,
}  # fmt: skip
V2 = BOTH | {"nmb_prototypes": [3000, 3000, 3000], "freeze_prototypes_niters": 10**10}
DEEPER = {
    "size_dataset": 10_000_000, "workers": 8, "sobel": False, "init": None, "lr": 0.1, "wd": 1e-5,
    "epochs": 100, "batch_size": 48, "reassignment": 3, "dim_pca": 4096, "k": 10000, "super_classes": 4,
    "rotnet": True, "niter": 10, "warm_restart": False, "checkpoint_freq": 1,
}  # fmt: skip
SCRIPTS = {"swav": (main_swav, SWAV), "v2": (main_deepclusterv2, V2), "deeper": (main_deepercluster, DEEPER)}
LAUNCHED = {  # what has no effect here, and is accepted
    "swav": "--dist_url env:// --world_size -1 --rank 0 --local_rank 0 --syncbn_process_group_size 8 "
    "--use_pil_blur true --improve_numerical_stability true --use_fp16 true",
    "v2": "--dist_url env:// --world_size 64 --rank 0 --local_rank 0 --syncbn_process_group_size 8",
    "deeper": "--world-size 64 --dist-url env:// --rank 0 --local_rank -1 --debug_slurm false --epoch 0 "
    "--start_iter 0 --use_faiss true --warm_restart false",
}


def parse(method, *words):
    return SCRIPTS[method][0].get_parser().parse_args(["DIR", *words])


@pytest.mark.parametrize("method", SCRIPTS)
def test_flags_have_the_authors_names_and_defaults(method):
    args = vars(parse(method))
    assert {name: args[name] for name in SCRIPTS[method][1]} == SCRIPTS[method][1]


@pytest.mark.parametrize("method", SCRIPTS)
def test_old_spellings_are_accepted(method):
    args = parse(method, "--data_path", "IMAGES", "--dump_path", "OUT", *LAUNCHED[method].split())
    assert (args.dir, args.exp) == ("IMAGES", "OUT")


@pytest.mark.parametrize(
    "text, value", [("on", True), ("True", True), ("1", True), ("OFF", False), ("0", False)]
)
def test_words_for_true_and_false(text, value):
    args = parse("deeper", "--sobel", text, "--rotnet", text)
    assert args.sobel is value and args.rotnet is value
    with refuses("give true or false"):
        parse("deeper", "--sobel", "maybe")


def test_the_published_command_of_deepercluster_is_understood():
    args = parse(
        "deeper", *"--size_dataset 100000000 --workers 10 --sobel true --lr 0.1 --wd 0.00001 --nepochs 100 "
        "--batch_size 48 --reassignment 3 --dim_pca 4096 --super_classes 16 --rotnet true --k 320000 "
        "--warm_restart false --use_faiss true --niter 10 --world-size 64".split(),
    )  # fmt: skip
    assert (args.k, args.super_classes, args.wd, args.sobel, args.arch) == (
        320000,
        16,
        1e-5,
        True,
        "vgg16wide",
    )


@pytest.mark.parametrize("method", ["swav", "v2"])
@pytest.mark.parametrize(
    "flags, precision",
    [
        ("", "fp32"),
        ("--use_fp16 true", "fp16"),
        ("--use_fp16 true --precision bf16", "bf16"),  # as of a recipe, with the caller's flag behind
        ("--use_fp16 true --use_fp16 false", "fp32"),
        ("--precision bf16 --use_fp16 false", "bf16"),
    ],
)
def test_of_use_fp16_and_precision_the_last_one_counts(method, flags, precision):
    assert parse(method, *flags.split()).precision == precision
