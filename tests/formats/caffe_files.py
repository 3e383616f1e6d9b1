"""A small network, and Caffe files of it as somebody else might write them: an encoder by hand."""

import struct

import numpy as np
import torch

import data
from tests import tiny

SIZE = 22  # at which Caffe's pools, which round up, and the adaptive pool give what PyTorch gives
NAMES = {True: ["sobel", "conv1.pre", "conv1", "conv2", "fc6", "fc7.pre"], False: ["conv1.pre", "fc7.pre"]}


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


def block(net, number, bottom, weight, factor, pool, v1):
    """Convolution, batch norm (folded, or on its own with this scale factor), ReLU and pool number 1 or 2."""
    conv, norm = net.features[4 * number - 4], net.features[4 * number - 3]
    params = entry(1, len(weight)) + entry(3, conv.padding[0]) + entry(4, weight.shape[2])
    params += entry(6, conv.stride[0])
    bias, shift = conv.bias.detach().numpy(), norm.bias.detach().numpy()
    name, norms = f"c{number}", b""
    if factor is None:
        gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        weight = weight * gain[:, None, None, None]
        bias = (bias - norm.running_mean.numpy()) * gain + shift
    else:
        statistics = norm.running_mean.numpy() * factor, norm.running_var.numpy() * factor, [factor]
        norms = layer("BatchNorm", f"b{number}", name, name, *statistics)
        norms += layer("Scale", f"s{number}", name, name, norm.weight.detach().numpy(), shift)
    pooling = entry(2, pool[0]) + entry(3, pool[1])
    return (
        layer("Convolution", name, bottom, name, weight, bias, params=params, v1=v1)
        + norms
        + layer("ReLU", f"r{number}", name, name, v1=v1)
        + layer("Pooling", f"p{number}", name, f"p{number}", params=pooling, v1=v1)
    )


def authors_file(net, v1=False, scale=1.0, swap=False, factor=None, offset=0.0, pool=(3, 2)):
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
    out += block(net, 1, "e", first, factor, pool, v1)
    out += block(net, 2, "p1", net.features[4].weight.detach().numpy(), factor, pool, v1)
    bottom = "p2"
    for name, linear in (("f6", net.classifier[1]), ("f7", net.classifier[4])):
        arrays = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        out += layer("InnerProduct", name, bottom, name, *arrays, v1=v1)
        out += layer("ReLU", f"{name}r", name, name, v1=v1) + layer("Dropout", f"{name}d", name, name, v1=v1)
        bottom = name
    return out


def call(module, *arguments):
    module.main(module.get_parser().parse_args(list(map(str, arguments))))
