"""The presets: the papers' numbers, typed again, and that a flag wins over them and is told."""

import pytest

import eval_linear
import eval_voc_classif
from evaluation import protocols
from tests.helpers import refuses


def linear(*flags):
    return eval_linear.get_parser().parse_args(["--data", "d", "--model", "m", *map(str, flags)])


def voc(*flags):
    return eval_voc_classif.get_parser().parse_args(["--vocdir", "v", "--model", "m", *map(str, flags)])


LINEAR = ("epochs", "batch", "lr", "momentum", "weight_decay", "schedule", "train_crop", "pooling", "start")


@pytest.mark.parametrize(
    "name, values",
    [
        ("deepcluster", (90, 256, 0.01, 0.9, -4, "bottou", "shift", "grid", "uniform")),
        ("swav", (100, 256, 0.3, 0.9, -6, "cosine", "area", "global", "normal")),
    ],
)
def test_linear_protocols_have_the_papers_numbers(name, values):
    args = linear("--protocol", name)
    assert tuple(getattr(args, flag) for flag in LINEAR) == values
    assert (args.tencrops, args.use_bn, args.places, args.kfold) == (False, False, False, None)


def test_deepercluster_has_a_rate_for_each_convolution():
    args = linear("--protocol", "deepercluster")
    imagenet = ".005 .01 .03 .03 .03 .03 .02 .03 .03 .03 .02 .02 .02"
    places = ".003 .005 .01 .01 .01 .01 .01 .01 .01 .03 .01 .01 .02"
    assert args.lr == [float(lr) for lr in imagenet.split()]
    assert linear("--protocol", "deepercluster", "--places").lr == [float(lr) for lr in places.split()]
    others = (100, 256, 0.9, -5, "bottou", "area", "windows", "uniform")
    assert tuple(getattr(args, flag) for flag in LINEAR if flag != "lr") == others
    args.layers = ["conv1", "conv10", "conv13"]
    assert eval_linear.rates_of(args) == [0.005, 0.03, 0.02]
    args.layers = ["conv13", "fc7"]
    with refuses("has no learning rate for fc7; give --lr"):
        eval_linear.rates_of(args)


def test_linear_voc07_has_its_own_numbers():
    flags = ["--vocdir", "v", "--model", "m", "--protocol", "deepercluster"]
    args = eval_linear.get_parser().parse_args(flags)
    assert (args.batch, args.lr, args.weight_decay, args.epochs) == (128, 0.02, -5, 60)
    assert (args.schedule, args.pooling, args.train_crop) == ("bottou", "windows", "area")


@pytest.mark.parametrize(
    "flags, values",
    [
        ([], (80_000, 5000, 0.003, 1e-6, "squares", False)),
        (["--fc6_8", 0], (80_000, 5000, 0.003, 1e-6, "squares", False)),
        (["--protocol", "deepercluster"], (150_000, 20_000, 0.003, 1e-5, "area", True)),
        (["--protocol", "deepercluster", "--fc6_8", 0], (150_000, 10_000, 0.003, 1e-4, "area", True)),
    ],
)
def test_voc_protocols_have_the_papers_numbers(flags, values):
    args = voc(*flags)
    names = ("nit", "stepsize", "lr", "wd", "train_crop", "pessimistic_ties")
    assert tuple(getattr(args, name) for name in names) == values
    assert (args.momentum, args.batch, args.eval_random_crops) == (0.9, 16, True)
    assert eval_voc_classif.MAX_GRAD_NORM == 10
    assert voc("--eval_random_crops", "false").eval_random_crops is False


def test_a_flag_wins_in_any_order_and_is_told():
    for flags in (["--lr", 0.1, "--protocol", "swav"], ["--protocol", "swav", "--lr", 0.1]):
        args = linear(*flags, "--epochs", 100)
        assert (args.lr, args.epochs, args.weight_decay) == (0.1, 100, -6)
        assert (
            protocols.tell("swav", protocols.LINEAR["swav"], vars(args)) == "swav, but lr 0.1 instead of 0.3"
        )
    args = linear("--protocol", "deepercluster", "--lr", 0.05, "--pooling", "grid")
    assert protocols.tell("deepercluster", protocols.LINEAR["deepercluster"], vars(args)) == (
        "deepercluster, but lr 0.05 instead of a rate for each layer, pooling grid instead of windows"
    )
    assert protocols.tell("swav", protocols.LINEAR["swav"], vars(linear("--protocol", "swav"))) == "swav"


def test_swavs_own_words_choose_the_pooling():
    assert (
        linear("--protocol", "swav", "--global_pooling", "false", "--use_bn", "true").pooling == "overlapping"
    )
    assert linear("--global_pooling", "true").pooling == "global"
    assert linear("--use_bn", "true").use_bn is True
    with refuses("--global_pooling"):
        linear("--global_pooling", "maybe")


@pytest.mark.parametrize("table", [protocols.LINEAR, protocols.VOC])
def test_every_protocol_sets_the_same_flags(table):
    assert len({tuple(preset) for preset in table.values()}) == 1
