"""Caffe's files of others, encoded by hand, give the same activations or are refused by layer."""

import numpy as np
import pytest
import torch

import data
import models
from formats import caffe_format, caffe_read, caffe_write
from models import weights
from tests.formats.caffe_files import (
    SIZE,
    assert_same,
    authors_file,
    blob,
    call,
    entry,
    grey_weights,
    layer,
    make_net,
    pixels,
)
from util import UserError

pytest.importorskip("google.protobuf")


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("changes", [{}, {"scale": 255.0, "swap": True}, {"scale": -0.2}])
def test_files_of_others_give_the_same_activations(tmp_path, v1, changes):
    net = make_net(True, head=None)
    (tmp_path / "model.caffemodel").write_bytes(authors_file(net, v1=v1, **changes))
    read = caffe_read.read_network(tmp_path / "model.caffemodel", "tiny")
    assert read.top_layer is None and not read.training
    for ours, theirs in zip(net.sobel.parameters(), read.sobel.parameters()):
        assert torch.equal(ours, theirs)
    assert_same(net, read, ["sobel", "conv1.pre", "conv1", "conv2", "fc6", "fc7.pre", "fc7"])


@pytest.mark.parametrize("factor", [1.0, 999.98, 0.25])
def test_separate_batch_norms_with_their_scale_factor_come_back_as_ours(tmp_path, factor):
    net = make_net(True, head=None)
    (tmp_path / "model.caffemodel").write_bytes(authors_file(net, factor=factor))
    read = caffe_read.read_network(tmp_path / "model.caffemodel", "tiny")
    assert_same(net, read, ["conv1.pre", "conv2.pre", "fc7"])
    assert torch.allclose(read.features[1].running_var, net.features[1].running_var, rtol=1e-5)
    assert torch.allclose(read.features[5].running_mean, net.features[5].running_mean, rtol=1e-5)
    assert torch.equal(read.features[5].weight, net.features[5].weight)


def test_a_batch_norm_behind_an_inner_product_is_folded_into_it(tmp_path):
    net = make_net(True, head=6)
    mean, variance, gain, shift = (np.random.default_rng(0).uniform(0.5, 2, (4, 6))).astype(np.float32)
    spread = np.sqrt(variance + 1e-5) / gain
    weight = net.top_layer.weight.detach().numpy() * spread[:, None]
    bias = (net.top_layer.bias.detach().numpy() - shift) * spread + mean
    content = authors_file(net) + layer("InnerProduct", "f8", "f7", "f8", weight, bias)
    content += layer("BatchNorm", "b8", "f8", "f8", mean * 3, variance * 3, [3.0])
    content += layer("Scale", "s8", "f8", "f8", gain, shift)
    (tmp_path / "model.caffemodel").write_bytes(content)
    assert_same(net, caffe_read.read_network(tmp_path / "model.caffemodel", "tiny"), ["fc7", "logits"])


def test_an_offset_of_the_grey_image_is_kept_exactly_at_the_border_too(tmp_path):
    net = make_net(True, head=None)
    (tmp_path / "model.caffemodel").write_bytes(authors_file(net, offset=1.5))
    read = caffe_read.read_network(tmp_path / "model.caffemodel", "tiny")
    assert read.sobel[0].bias.item() == pytest.approx(1.5, abs=1e-5)
    with torch.no_grad():
        grey = data.normalise(pixels()).mean(1, keepdim=True) + 1.5
        expected = net.sobel[1](grey)
        assert torch.allclose(
            read.activations(data.normalise(pixels()), ["sobel"])["sobel"], expected, atol=1e-4
        )


def test_foreign_files_are_refused_by_layer(tmp_path):
    path = tmp_path / "model.caffemodel"
    net = make_net(True, head=None)
    good = authors_file(net)
    weights, bias = grey_weights(net)
    rgb = np.array(weights[::-1]).reshape(1, 3, 1, 1)  # as if the file took RGB
    grey = layer("Convolution", "to_grey", "data", "g", rgb, [bias])
    arrays, params = (np.reshape(weights, (1, 3, 1, 1)), [bias]), entry(1, 1) + entry(4, 1)
    start = len(entry(1, "theirs"))
    end = start + len(layer("Convolution", "to_grey", "data", "g", *arrays, params=params))
    lrn = layer("LRN", "norm1", "p2", "n")
    leaky = layer("ReLU", "leaky", "p2", "p2", params=entry(1, 0.1))
    late = layer("BatchNorm", "late", "p1", "p1", np.ones(8), np.ones(8), [1.0])
    ones = np.ones((8, 2, 5, 5))
    for content, message in (
        (good + lrn.replace(b"p2", b"f7"), r"layer norm1 \(LRN\): DeepCluster"),
        (good + leaky.replace(b"p2", b"f7"), r"layer leaky \(ReLU\): is leaky"),
        (good[:start] + grey + good[end:], r"grey layer weighs BGR by \[0\.0057.* no multiple of \[0\.0058"),
        (good[: len(good) // 2], "truncated"),
        (b"", "truncated"),
        (b"<html>404</html>", "truncated"),
        (np.random.default_rng(0).bytes(300), "truncated"),
        (
            authors_file(net, pool=(2, 2)),
            r"layer c1 \(Convolution\): is followed by pools \[\(2, 2\)\], tiny has",
        ),
        (
            good + layer("InnerProduct", "f8", "elsewhere", "f8", np.ones((3, 40))),
            "layer f8 .*takes elsewhere",
        ),
        (good + late.replace(b"p1", b"f7"), "layer late .*does not follow"),
        (good + 2 * layer("InnerProduct", "f8", "f7", "f7", np.ones((40, 40))), "has 4 inner products"),
        (good[:end] + layer("Convolution", "c", "g", "c", ones), "not followed by a Sobel layer"),
        (good + layer("InnerProduct", "f8", "f7", "f7", np.full((40, 40), np.nan)), "not finite"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            caffe_read.read_network(path, "tiny")
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        caffe_read.read_network(tmp_path / "missing", "tiny")
    path.write_bytes(good)
    with pytest.raises(UserError, match="has 2 convolutions behind its input, alexnet has 5"):
        caffe_read.read_network(path, "alexnet")


def test_wrong_grouping_and_stride_are_refused(tmp_path):
    net = make_net(False, head=None)
    path = tmp_path / "model.caffemodel"
    caffe_write.write_network(net, tmp_path, SIZE)
    message = caffe_format.messages().NetParameter.FromString(path.read_bytes())
    for change, text in (({"stride": [1]}, "stride"), ({"group": 2}, "group 2"), ({"pad": [0]}, "pad")):
        changed = caffe_format.messages().NetParameter.FromString(path.read_bytes())
        conv = next(part for part in changed.layer if part.name == "conv1")
        for name in change:
            conv.convolution_param.ClearField(name)
        conv.convolution_param.MergeFrom(caffe_format.messages().ConvolutionParameter(**change))
        (tmp_path / "b.caffemodel").write_bytes(changed.SerializeToString())
        with pytest.raises(UserError, match=f"layer conv1 .*{text}"):
            caffe_read.read_network(tmp_path / "b.caffemodel", "tiny")
    del (
        message.layer[1],
        message.layer[1].bottom[0],
    )  # conv1 on raw pixels: its padding would be black, not the mean colour
    (tmp_path / "c.caffemodel").write_bytes(message.SerializeToString())
    with pytest.raises(
        UserError, match=r"0 for the BGR pixel \[0\. 0\. 0\.\], not for the mean colour \[103\.5"
    ):
        caffe_read.read_network(tmp_path / "c.caffemodel", "tiny")


def test_colours_scaled_differently_are_absorbed(tmp_path):
    """A file that subtracts the mean but divides by 58 instead of each channel's deviation."""
    net = make_net(False, head=None)
    caffe_write.write_network(net, tmp_path, SIZE)
    message = caffe_format.messages().NetParameter.FromString((tmp_path / "model.caffemodel").read_bytes())
    mean = np.array(data.IMAGENET_MEAN)[::-1] * 255
    std = np.array(data.IMAGENET_STD)[::-1] * 255
    message.layer[1].CopyFrom(caffe_format.messages().LayerParameter(name="center", type="Scale"))
    for values in (np.full(3, 1 / 58), -mean / 58):
        message.layer[1].blobs.add().ParseFromString(blob(values))
    conv = next(part for part in message.layer if part.name == "conv1")
    weight = caffe_format.numbers_of(conv.blobs[0])[:, ::-1] * (58 / std)[:, None, None]
    conv.blobs[0].ParseFromString(blob(weight))
    del conv.bottom[0]
    (tmp_path / "d.caffemodel").write_bytes(message.SerializeToString())
    assert_same(net, caffe_read.read_network(tmp_path / "d.caffemodel", "tiny"), ["conv1.pre", "fc7"])


def test_the_command_line_goes_both_ways(tmp_path, capsys):
    net = make_net(True, head=None)
    (tmp_path / "model.caffemodel").write_bytes(authors_file(net))
    out = tmp_path / "checkpoint.pth.tar"
    call(caffe_read, tmp_path / "model.caffemodel", "--arch", "tiny", "--out", out)
    assert "tiny with Sobel, no head" in capsys.readouterr().out
    assert_same(net, weights.load(out), ["sobel", "fc7.pre"])
    call(caffe_write, "--model", out, "--out", tmp_path / "pair", "--image-size", SIZE)
    assert "fc7.pre" in capsys.readouterr().out
    assert_same(net, caffe_read.read_network(tmp_path / "pair" / "model.caffemodel", "tiny"), ["fc7.pre"])
    with pytest.raises(UserError, match="no such checkpoint"):
        call(caffe_write, "--model", "missing", "--out", tmp_path)


def test_networks_with_branches_are_refused_in_one_line(tmp_path):
    path = tmp_path / "model.caffemodel"
    path.write_bytes(authors_file(make_net(True, head=None)))
    with pytest.raises(UserError, match="resnet18: Caffe files are of alexnet and vgg16 only"):
        caffe_read.read_network(path, "resnet18")
    with pytest.raises(UserError, match="resnet18: Caffe files are of alexnet and vgg16 only"):
        caffe_write.write_network(models.build("resnet18").eval(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--arch lenet: unknown"):
        caffe_read.read_network(path, "lenet")
