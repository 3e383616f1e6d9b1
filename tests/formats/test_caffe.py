"""Caffe's files: hand-encoded ones are read, written ones agree with PyTorch when OpenCV runs them."""

import struct

import numpy as np
import pytest
import torch

import checkpoint
import data
import models
from formats import caffe_format, caffe_read, caffe_write
from models import weights
from tests import tiny
from util import UserError

SIZE = 22  # at which Caffe's pools, which round up, and the adaptive pool give what PyTorch gives
NAMES = {True: ["sobel", "conv1.pre", "conv1", "conv2", "fc6", "fc7.pre"], False: ["conv1.pre", "fc7.pre"]}

pytest.importorskip("google.protobuf")


@pytest.fixture(autouse=True)
def registered():
    tiny.register()


def make_net(sobel, head=6, seed=3):
    """A network of which no weight, bias or statistic has its trivial value."""
    net = tiny.tiny(sobel, seed)
    if head is not None:
        net.set_head(head, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                for tensor in (layer.running_var, layer.weight):
                    tensor.uniform_(0.5, 2, generator=generator)
                for tensor in (layer.running_mean, layer.bias):
                    tensor.normal_(0, 0.3, generator=generator)
            elif isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(0, 0.2, generator=generator)
                layer.bias.normal_(0, 0.3, generator=generator)
        for layer in net.features:
            if isinstance(layer, torch.nn.Conv2d):
                layer.bias.normal_(0, 0.3, generator=generator)
    return net.eval()


def pixels(seed=0):
    """RGB images, bright at the border, where paddings that differ would show."""
    images = np.random.default_rng(seed).integers(0, 256, (2, 3, SIZE, SIZE), dtype=np.uint8)
    images[:, :, [0, -1]] = 255
    images[:, :, :, [0, -1]] = 230
    return torch.from_numpy(images)


def activations(net, names):
    with torch.no_grad():
        return net.activations(data.normalise(pixels()), names)


def assert_same(net, other, names, tolerance=1e-4):
    ours, theirs = activations(net, names), activations(other, names)
    for name in names:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * ours[name].abs().max(), name


# ------------------------------------------------------------------- an encoder of the wire format, by hand


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def entry(number, value):
    """One field: an int, or length-delimited text or bytes; a float as `float`."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(array, legacy=False):
    array = np.ascontiguousarray(array, dtype="<f4")
    if legacy:
        shape = (1,) * (4 - array.ndim) + array.shape
        sizes = b"".join(entry(number, size) for number, size in zip((1, 2, 3, 4), shape))
        return sizes + entry(5, array.tobytes())
    return entry(5, array.tobytes()) + entry(7, entry(1, b"".join(map(varint, array.shape))))


V1 = {
    "Convolution": 4,
    "Pooling": 17,
    "ReLU": 18,
    "InnerProduct": 14,
    "Dropout": 6,
    "SoftmaxWithLoss": 21,
    "LRN": 15,
}
PARAMS = {
    "Convolution": (106, 10),
    "Pooling": (121, 19),
    "ReLU": (123, 30),
    "Power": (122, 21),
    "BatchNorm": (139, 0),
}


def layer(kind, name, bottom, top, *arrays, params=b"", v1=False):
    number = PARAMS.get(kind, (117, 17))[v1]
    extra = entry(number, params) if params else b""
    blobs = b"".join(entry(6 if v1 else 7, blob(array, legacy=v1)) for array in arrays)
    if v1:
        body = entry(2, bottom) + entry(3, top) + entry(4, name) + entry(5, V1[kind])
        return entry(2, body + blobs + extra)
    return entry(100, entry(1, name) + entry(2, kind) + entry(3, bottom) + entry(4, top) + blobs + extra)


def grey_weights(net):
    """By the definition: grey is the mean of (x / 255 - mean) / std; weights for B, G, R and the bias."""
    weights = [1 / (3 * 255 * std) for std in data.IMAGENET_STD][::-1]
    return weights, -sum(mean / std for mean, std in zip(data.IMAGENET_MEAN, data.IMAGENET_STD)) / 3


def authors_file(net, v1=False, scale=1.0, swap=False, factor=None, offset=0.0, pool=(3, 2), fold=True):
    """A caffemodel of a tiny net as somebody else might write it: names of their own, ReLU in place.

    scale: of the grey layer; swap: the two Sobel maps exchanged and halved; factor: batch norms as layers of
    their own, with this scale factor; offset: added to the normalised grey.
    """
    weights, bias = grey_weights(net)
    out = entry(1, "theirs")
    grey = np.array(weights).reshape(1, 3, 1, 1) * scale, [(bias + offset) * scale]
    out += layer("Convolution", "to_grey", "data", "g", *grey, params=entry(1, 1) + entry(4, 1), v1=v1)
    sobel, first = net.sobel[1].weight.numpy(), net.features[0].weight.detach().numpy() / scale
    if swap:
        sobel, first = sobel[::-1] / 2, first[:, ::-1] * 2
    params = entry(1, 2) + entry(3, 1) + entry(4, 3) + entry(2, 0)
    out += layer("Convolution", "edges", "g", "e", sobel, params=params, v1=v1)
    bottom = "e"
    for number, start in ((1, 0), (2, 4)):
        conv, norm = net.features[start], net.features[start + 1]
        weight = first if number == 1 else conv.weight.detach().numpy()
        params = (
            entry(1, len(weight))
            + entry(3, conv.padding[0])
            + entry(4, weight.shape[2])
            + entry(6, conv.stride[0])
        )
        bias = conv.bias.detach().numpy()
        gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        shift = norm.bias.detach().numpy()
        if factor is None:
            weight = weight * gain[:, None, None, None]
            bias = (bias - norm.running_mean.numpy()) * gain + shift
        name = f"c{number}"
        out += layer("Convolution", name, bottom, name, weight, bias, params=params, v1=v1)
        if factor is not None:
            statistics = norm.running_mean.numpy() * factor, norm.running_var.numpy() * factor, [factor]
            out += layer("BatchNorm", f"b{number}", name, name, *statistics)
            out += layer("Scale", f"s{number}", name, name, norm.weight.detach().numpy(), shift)
        out += layer("ReLU", f"r{number}", name, name, v1=v1)
        out += layer(
            "Pooling", f"p{number}", name, f"p{number}", params=entry(2, pool[0]) + entry(3, pool[1]), v1=v1
        )
        bottom = f"p{number}"
    for name, linear in (("f6", net.classifier[1]), ("f7", net.classifier[4])):
        out += layer(
            "InnerProduct",
            name,
            bottom,
            name,
            linear.weight.detach().numpy(),
            linear.bias.detach().numpy(),
            v1=v1,
        )
        out += layer("ReLU", f"{name}r", name, name, v1=v1) + layer("Dropout", f"{name}d", name, name, v1=v1)
        bottom = name
    return out


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


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("head", [6, None])
def test_written_and_read_back_gives_the_same_activations(tmp_path, sobel, keep, head):
    net = make_net(sobel, head)
    caffe_write.write_network(net, tmp_path / "out", SIZE, keep)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.caffemodel", "model.prototxt"]
    read = caffe_read.read_network(tmp_path / "out" / "model.caffemodel", "tiny")
    assert_same(net, read, net.activation_names)
    if keep:
        assert torch.allclose(read.features[1].running_mean, net.features[1].running_mean)


def cv2_with_caffe():
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        pytest.skip(f"OpenCV {cv2.__version__} reads no Caffe files")
    return cv2


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_opencv_gives_the_same_activations_on_raw_bgr_pixels(tmp_path, sobel, keep):
    cv2 = cv2_with_caffe()
    net = make_net(sobel)
    caffe_write.write_network(net, tmp_path, SIZE, keep)
    bgr = pixels().numpy()[:, ::-1].astype(np.float32)
    last = "scale{}" if keep else "conv{}"
    layers = {
        "conv1.pre": last.format(1), "conv2.pre": last.format(2), "conv1": "relu1", "conv2": "relu2",
        "fc6.pre": "fc6", "fc6": "relu_fc6", "fc7.pre": "fc7", "fc7": "relu_fc7", "logits": "top_layer",
    }  # fmt: skip
    expected = activations(net, list(layers))
    for name, layer_name in layers.items():  # as a user would: a fresh network, one output, its defaults
        reader = cv2.dnn.readNetFromCaffe(
            str(tmp_path / "model.prototxt"), str(tmp_path / "model.caffemodel")
        )
        reader.enableFusion(not layer_name.startswith("scale"))  # see caffe_write.py
        reader.setInput(bgr)
        found = reader.forward(layer_name).reshape(expected[name].shape)
        assert np.abs(found - expected[name].numpy()).max() <= 1e-3 * expected[name].abs().max(), name


@pytest.mark.parametrize("v1", [False, True])
def test_opencv_reads_the_hand_encoded_files_as_we_do(tmp_path, v1):
    """The encoder of these tests speaks Caffe's format, old and new, not only ours."""
    cv2 = cv2_with_caffe()
    net = make_net(True)
    caffe_write.write_network(net, tmp_path, SIZE)
    content = entry(1, "hand")
    for part in caffe_format.read_layers(tmp_path / "model.caffemodel"):
        if part.blobs:
            content += layer(part.type, part.name, "", part.name, *part.blobs, v1=v1)
    (tmp_path / "hand.caffemodel").write_bytes(content)
    results = []
    for name in ("model", "hand"):
        reader = cv2.dnn.readNetFromCaffe(
            str(tmp_path / "model.prototxt"), str(tmp_path / f"{name}.caffemodel")
        )
        reader.setInput(pixels().numpy()[:, ::-1].astype(np.float32))
        results.append(reader.forward("fc7"))
    assert np.array_equal(*results) and np.abs(results[0]).max() > 1


def test_the_prototxt_is_text_without_weights(tmp_path):
    caffe_write.write_network(make_net(False), tmp_path, SIZE)
    text = (tmp_path / "model.prototxt").read_text(encoding="utf-8")
    assert "blobs" not in text and len(text) < 4000
    names = [line.split('"')[1] for line in text.splitlines() if line.startswith("  name:")]
    assert names == [
        "data", "normalise", "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc6", "relu_fc6", "fc7",
        "relu_fc7", "top_layer",
    ]  # fmt: skip
    assert text.count("dim: 22") == 2 and "kernel_size: 5" in text and "stride: 2" in text


def test_image_sizes_at_which_caffe_would_differ_are_refused(tmp_path):
    for size, message in ((24, "rounds up"), (30, "the last map is 3 wide"), (3, "rounds up")):
        with pytest.raises(UserError, match=message):
            caffe_write.write_network(make_net(True), tmp_path, size)


def test_at_224_both_networks_can_be_written_and_no_name_comes_twice(monkeypatch):
    monkeypatch.setattr(
        caffe_write, "_numpy", lambda tensor: np.empty(tensor.shape, np.float32)
    )  # sizes only
    for arch, convs in (("alexnet", 5), ("vgg16", 13)):
        with torch.device("meta"):
            monkeypatch.setattr("models.flat.initialise", lambda *_: None)
            net = models.ARCHITECTURES[arch](False).eval()
        layers, given = caffe_write.build_layers(net, 224, keep_batch_norm=True)
        names = [message.name for message, _ in layers]
        assert len(set(names)) == len(names) and sum(name.startswith("conv") for name in names) == convs
        assert [list(message.bottom) for message, _ in layers[1:]] == [[name] for name in names[:-1]]
        assert given[f"conv{convs}"] == f"relu{convs}" and given["fc7"] == "relu_fc7"
        assert given["pool"] == f"pool{convs}"


def test_files_that_disagree_are_not_kept(tmp_path, monkeypatch):
    net = make_net(True)

    def wrong(*_):
        return lambda images, wanted: {
            k: v + 1 for k, v in caffe_write._activations(net, images, list(wanted)).items()
        }

    monkeypatch.setattr(caffe_write, "_opencv_runner", wrong)
    with pytest.raises(UserError, match="differ from PyTorch by"):
        caffe_write.write_network(net, tmp_path, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_refused_by_layer(tmp_path):
    path = tmp_path / "model.caffemodel"
    net = make_net(True, head=None)
    good = authors_file(net)
    weights, bias = grey_weights(net)
    rgb = np.array(weights[::-1]).reshape(1, 3, 1, 1)  # as if the file took RGB
    grey = layer("Convolution", "to_grey", "data", "g", rgb, [bias])
    start = len(entry(1, "theirs"))
    end = start + len(
        layer(
            "Convolution",
            "to_grey",
            "data",
            "g",
            np.reshape(weights, (1, 3, 1, 1)),
            [bias],
            params=entry(1, 1) + entry(4, 1),
        )
    )
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


def call(module, *arguments):
    module.main(module.get_parser().parse_args(list(map(str, arguments))))


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


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = make_net(True)
    with torch.no_grad():
        net.features[5].running_var[3] = float("nan")
    checkpoint.save(tmp_path / "nan.pth.tar", {"arch": "tiny", "state_dict": net.state_dict()})
    with pytest.raises(UserError, match=r"nan\.pth\.tar: features\.5\.running_var has .* not finite"):
        call(caffe_write, "--model", tmp_path / "nan.pth.tar", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
