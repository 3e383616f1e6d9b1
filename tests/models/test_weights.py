"""Files of weights, ours and the authors', as networks."""

import itertools

import numpy as np
import pytest
import torch

import checkpoint
import models
from models import weights
from tests import legacy
from tests.helpers import refuses


@pytest.fixture(scope="module")
def net():
    """A network whose batch-norm statistics are not the trivial ones."""
    net = models.build("alexnet", sobel=True, num_clusters=12, seed=5)
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))  # train mode: moves the statistics
    return net.eval()


def logits(net):
    with torch.no_grad():
        return net(torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64))


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("data_parallel", ["features", "all", None])
def test_files_of_the_authors_give_the_same_activations(tmp_path, net, data_parallel, optimizer):
    path = tmp_path / "released.pth.tar"
    legacy.write(path, legacy.authors_state(net, data_parallel, optimizer))
    loaded = weights.load(path)
    assert (loaded.arch, loaded.top_layer.out_features) == ("alexnet", 12)
    assert torch.equal(logits(loaded), logits(net))


@pytest.mark.parametrize("data_parallel", ["features", "all", "both", None])
@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("head", [5, None])
def test_every_kind_of_file_that_was_ever_written_loads(tmp_path, data_parallel, sobel, head):
    """Names of DataParallel at either level, x optimiser or not, x batch counters or not, x three formats."""
    net = models.build("tiny", sobel, head, seed=2)
    net(torch.randn(4, 3, 32, 32))
    net.eval()
    x = torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32)
    path = tmp_path / "checkpoint.pth.tar"
    for optimizer, counters in itertools.product([True, False], repeat=2):
        state = legacy.authors_state(net, data_parallel, optimizer, counters)
        for write in (
            lambda state: legacy.write(path, state, version=1),
            lambda state: legacy.write(path, state, version=2),
            lambda state: torch.save(state, path, _use_new_zipfile_serialization=False),
            lambda state: torch.save(state, path),
        ):
            write(state)
            loaded = weights.load(path)
            assert (loaded.arch, loaded.sobel is not None, loaded.training) == ("tiny", sobel, False)
            assert (loaded.top_layer is None) == (head is None)
            with torch.no_grad():
                for name, value in net.activations(x, net.activation_names).items():
                    assert torch.equal(loaded.activations(x, [name])[name], value), name


def test_a_file_without_head_sobel_or_arch_loads(tmp_path):
    net = models.build("vgg16", sobel=False, seed=1).eval()
    checkpoint.save(tmp_path / "bare.pth.tar", dict(net.state_dict()))
    loaded = weights.load(tmp_path / "bare.pth.tar")
    assert loaded.arch == "vgg16" and loaded.sobel is None and loaded.top_layer is None
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def test_weights_that_do_not_fit_name_the_parameter(tmp_path, net):
    state = dict(net.state_dict())
    del state["features.4.bias"]
    checkpoint.save(tmp_path / "a.tar", {"arch": "alexnet", "state_dict": state})
    with refuses(r"lacks features\.4\.bias"):
        weights.load(tmp_path / "a.tar")
    state = dict(net.state_dict()) | {"features.4.bias": torch.zeros(3)}
    checkpoint.save(tmp_path / "b.tar", {"arch": "alexnet", "state_dict": state})
    with refuses(r"features\.4\.bias is \(3,\)"):
        weights.load(tmp_path / "b.tar")
    checkpoint.save(tmp_path / "c.tar", {"state_dict": {"fc.weight": torch.zeros(3)}})
    with refuses("not a network of this repository"):
        weights.load(tmp_path / "c.tar")
    torch.save([1, 2], tmp_path / "d.tar")
    with refuses("holds a list"):
        weights.load(tmp_path / "d.tar")


def test_what_is_refused_is_named_and_odd_contents_are_one_line(tmp_path):
    good, path = models.build("tiny", True, 5, seed=1).state_dict(), tmp_path / "odd.tar"
    for state, message in (
        ({"epoch": np.float64(3), "state_dict": good}, r"refused, .*asks for numpy\S*multiarray\.scalar"),
        ({"arch": ["tiny"], "state_dict": good}, "does not fit alexnet with Sobel: it "),
        ({"arch": "alexnet", "state_dict": good | {"epoch": 3}}, "no state_dict of tensors"),
        ({"arch": "tiny", "state_dict": {1: torch.zeros(1)}}, "no state_dict of tensors"),
        (
            {"arch": "tiny", "state_dict": good | {"top_layer.bias": torch.tensor(1.0)}},
            r"top_layer\.\w+ is ",
        ),
    ):
        torch.save(state, path)
        with refuses(message):
            weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_layer.bias": torch.zeros(10**6)}, r"top_layer\.\w+ is "),
        ({"projection_head.weight": torch.zeros(10**6, 1)}, "tiny"),
        ({"projection_head.0.weight": torch.zeros(10**6, 1)}, "projection head"),
        ({"projection_head.weight": torch.zeros(())}, "projection head"),
    ],
)
def test_a_small_file_gets_no_large_network(tmp_path, monkeypatch, change, message):
    path, built, build = tmp_path / "large.tar", [], models.build
    good = build("tiny", True, 5, seed=1).state_dict()
    checkpoint.save(path, {"arch": "tiny", "state_dict": good | change})

    def look(*args, **options):
        built.append(build(*args, **options))
        return built[-1]

    monkeypatch.setattr(models, "build", look)
    with refuses(message):
        weights.load(path)
    assert len(built) == 1 and next(built[0].parameters()).is_meta  # which takes no memory


@pytest.mark.parametrize("arch", ["resnet18", "resnet50w5", "alexnet", "vgg16folded"])
def test_a_file_that_only_claims_an_architecture_gets_none(tmp_path, monkeypatch, arch):
    first = models.build("resnet18", seed=0).state_dict()["conv1.weight"]
    checkpoint.save(tmp_path / "claim.tar", {"arch": arch, "state_dict": {"conv1.weight": first}})
    monkeypatch.setattr(weights, "load_weights", None)
    with refuses(f"does not fit {arch}: it lacks "):
        weights.load(tmp_path / "claim.tar")


@pytest.mark.parametrize("shape", [(), (64000, 1, 1, 1), (3, 3, 3, 3)])
def test_a_stem_that_no_resnet_has_is_no_network(tmp_path, shape):
    state = {"layer1.0.conv1.weight": torch.zeros(1), "layer1.0.conv3.weight": torch.zeros(1)}
    checkpoint.save(tmp_path / "odd.tar", {"state_dict": state | {"conv1.weight": torch.zeros(shape)}})
    with refuses("not a network of this repository"):
        weights.load(tmp_path / "odd.tar")


def test_init_takes_everything_but_the_head(tmp_path, net):
    path = tmp_path / "released.tar"
    legacy.write(path, legacy.authors_state(net, optimizer=False))
    fresh = models.build("alexnet", sobel=True, num_clusters=3, seed=9)
    head = fresh.top_layer.weight.clone()
    weights.init_weights(fresh, path)
    assert torch.equal(fresh.features[5].running_mean, net.features[5].running_mean)
    assert torch.equal(fresh.classifier[4].weight, net.classifier[4].weight)
    assert torch.equal(fresh.top_layer.weight, head)
    with refuses("with Sobel, the run is alexnet without Sobel"):
        weights.init_weights(models.build("alexnet", sobel=False, seed=1), path)


@pytest.mark.parametrize(
    "name", ["module.features.0.weight", "features.0.weight", "features.module.0.weight"]
)
def test_released_vggs_are_wide_by_their_file_names_where_names_of_parameters_do_not_tell(name):
    state = {name: torch.zeros(64, 2, 3, 3)}
    for file in ("ours", "deepcluster_flickr", "rotnet_flickr", "rotnet_imagenet"):
        assert weights.model_weights(state, f"models/{file}.pth")[0] == "vgg16wide"
    assert weights.model_weights(state, "vgg16/checkpoint.pth.tar")[0] == "vgg16"
