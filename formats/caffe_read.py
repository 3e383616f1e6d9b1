"""The released `.caffemodel`, or another of AlexNet or VGG-16, as a checkpoint of ours.

    python -m formats.caffe_read model.caffemodel --arch alexnet --out checkpoint.pth.tar

Needs protobuf only, no Caffe; the file's prototxt is not needed.
"""

import argparse

from commandline import Parser


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("caffemodel", help="e.g. the released model.caffemodel")
    parser.add_argument("--arch", required=True, metavar="ARCH", help="what it holds: alexnet or vgg16")
    parser.add_argument("--out", required=True, help="checkpoint to write, e.g. checkpoint.pth.tar")
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoint
import models
from formats.caffe_format import (
    INPUTS,
    NO_EFFECT,
    SIDE_OUTPUTS,
    Affine,
    Layer,
    messages,
    preprocessing,
    read_layers,
    refuse_other_networks,
)
from models.network import Network
from models.weights import refuse_not_finite
from util import UserError, run_main

MULTIPLE = 1e-3  # how exactly, relatively, a file's grey and Sobel weights must be multiples of ours


def main(args: argparse.Namespace) -> None:
    """Convert, and say what was found."""
    messages()  # says at once if protobuf is missing
    net = read_network(args.caffemodel, args.arch)
    checkpoint.save(args.out, {"arch": net.arch, "state_dict": net.state_dict()})
    head = f"head of {net.top_layer.out_features}" if net.top_layer is not None else "no head"
    print(f"{args.out}: {net.arch} {'with' if net.sobel is not None else 'without'} Sobel, {head}")


@dataclass
class Unit:
    """A convolution or inner product with what follows it up to the next: batch norm, scale, ReLU, pool."""

    layer: Layer
    weight: np.ndarray
    bias: np.ndarray
    norm: tuple[np.ndarray, np.ndarray] | None = None  # mean, variance (with eps)
    scale: tuple[np.ndarray, np.ndarray] | None = None  # factor, shift
    closed: bool = False  # something came that is neither batch norm nor scale
    relu: bool = False
    pools: list[tuple] = field(default_factory=list)

    @property
    def is_conv(self) -> bool:
        return self.layer.type == "Convolution"


def read_network(path: str | Path, arch: str) -> Network:
    """The network in a .caffemodel, on the CPU in eval mode; its input is normalised RGB, as in all of ours.

    Layers are matched by order and shape, whatever their names. The file's preprocessing, in front, is
    undone: a scale of its grey or Sobel layers is absorbed by the first convolution, an offset by the grey
    layer's bias. Batch norms that were folded into convolutions stay folded: ours then change nothing, so the
    network is for evaluation and for fine-tuning with frozen statistics. Raises UserError, naming the layer,
    for a file that holds anything else than such a network.
    """
    layers = _chain(read_layers(path), path)
    try:
        front, rest = _front(layers, path)
        units = _units(rest, path)
        net = _fill(arch, front, units, path)
    except (ValueError, IndexError) as error:  # numpy's word for weights that do not fit each other
        raise UserError(f"{path}: its layers do not fit together ({error})") from error
    refuse_not_finite(net, path)
    return net


def _fill(arch: str, front: Affine, units: list[Unit], path: str | Path) -> Network:
    """Our network with the file's weights."""
    sobel = len(front[0]) == 1
    linears = [unit for unit in units if not unit.is_conv]
    head = len(linears[2].weight) if len(linears) == 3 else None
    net = models.build(arch, sobel, head, seed=0).eval()
    refuse_other_networks(net)
    with torch.no_grad():
        if sobel:
            mixing = _undo_sobel(net, front, units.pop(0) if units else None, path)
        else:
            mixing = _undo_colour(front, path)
        _fill_convs(net, [unit for unit in units if unit.is_conv], mixing, path)
        _fill_linears(net, linears, path)
    return net


def _refuse(path: str | Path, layer: Layer, reason: str) -> UserError:
    return UserError(f"{path}: layer {layer.name} ({layer.type}): {reason}")


def _chain(layers: list[Layer], path: str | Path) -> list[Layer]:
    """The layers that compute something, checked to be one chain without branches."""
    chain: list[Layer] = []
    current: set[str] = set()
    for layer in layers:
        if layer.type in SIDE_OUTPUTS:
            continue
        if layer.type in INPUTS:
            current = set(layer.top)
            continue
        if layer.bottom and current and not current & set(layer.bottom):
            raise _refuse(path, layer, f"takes {layer.bottom[0]}, not what the layer before it gives")
        if len(layer.bottom) > 1:
            raise _refuse(path, layer, "has several inputs; only a chain of layers can be read")
        current = set(layer.top)
        if layer.type not in NO_EFFECT:
            chain.append(layer)
    return chain


def _geometry(params: Any, name: str, default: int) -> tuple[int, int]:
    """(height, width) of a convolution's or pool's kernel, stride or padding, however the file writes it."""
    short = name.removesuffix("_size")
    if params.HasField(f"{short}_h") or params.HasField(f"{short}_w"):
        return getattr(params, f"{short}_h"), getattr(params, f"{short}_w")
    value = getattr(params, name)
    values = [value] if isinstance(value, int) else list(value) or [default]
    return values[0], values[-1]


def _pointwise(layer: Layer, channels: int) -> Affine | None:
    """The map x -> A x + b of each pixel's channels that this layer is, in float64; None if it is none."""
    blobs = [blob.astype(np.float64) for blob in layer.blobs]
    if layer.type == "BatchNorm" and len(blobs) == 3:
        mean, variance = _statistics(layer)
        scale = 1 / np.sqrt(variance + layer.params("batch_norm_param").eps)
        return np.diag(scale), -mean * scale
    if layer.type == "Scale" and blobs:
        return np.diag(blobs[0].ravel()), blobs[1].ravel() if len(blobs) > 1 else np.zeros(blobs[0].size)
    if layer.type == "Bias" and blobs:
        return np.eye(blobs[0].size), blobs[0].ravel()
    if layer.type == "Power" and layer.params("power_param").power == 1:
        power = layer.params("power_param")
        return np.eye(channels) * power.scale, np.full(channels, power.shift)
    if layer.type == "Convolution" and blobs and blobs[0].shape[1:] == (channels, 1, 1):
        params = layer.params("convolution_param")
        if _geometry(params, "pad", 0) == (0, 0) and _geometry(params, "stride", 1) == (1, 1):
            return blobs[0][:, :, 0, 0], blobs[1].ravel() if len(blobs) > 1 else np.zeros(len(blobs[0]))
    return None


def _statistics(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a BatchNorm layer, whose third blob is what both have to be divided by."""
    mean, variance, factor = (blob.ravel().astype(np.float64) for blob in layer.blobs)
    factor = 1.0 / factor[0] if factor[0] else 0.0
    return mean * factor, variance * factor


def _front(layers: list[Layer], path: str | Path) -> tuple[Affine, list[Layer]]:
    """((A, b), the layers after): the map of each BGR pixel that the layers in front amount to."""
    a, b = np.eye(3), np.zeros(3)
    for i, layer in enumerate(layers):
        step = _pointwise(layer, len(a))
        if step is None:
            return (a, b), layers[i:]
        if step[0].shape[1] != len(a):
            raise _refuse(path, layer, f"is for {step[0].shape[1]} channels, its input has {len(a)}")
        a, b = step[0] @ a, step[0] @ b + step[1]
        if len(a) not in (1, 3):
            raise _refuse(path, layer, f"gives {len(a)} channels; expected 1 (grey) or 3")
    raise UserError(f"{path}: holds no convolution larger than 1x1")


def _units(layers: list[Layer], path: str | Path) -> list[Unit]:
    """Convolutions and inner products in order, each with what follows it."""
    units: list[Unit] = []
    for layer in layers:
        unit = units[-1] if units else None
        if layer.type in ("Convolution", "InnerProduct"):
            units.append(_unit(layer, path))
        elif unit is None:
            raise _refuse(path, layer, "stands in front of the first convolution")
        elif layer.type == "BatchNorm" and len(layer.blobs) == 3:
            if unit.closed or unit.norm or unit.scale:
                raise _refuse(path, layer, "does not follow a convolution directly")
            mean, variance = _statistics(layer)
            unit.norm = mean, variance + layer.params("batch_norm_param").eps
        elif layer.type == "Scale" and layer.blobs:
            if unit.closed or unit.scale:
                raise _refuse(path, layer, "does not follow a convolution or its batch norm directly")
            factor, shift = _pointwise(layer, len(unit.weight))
            unit.scale = factor.diagonal(), shift
        elif layer.type == "ReLU":
            if layer.params("relu_param").negative_slope:
                raise _refuse(path, layer, "is leaky")
            unit.relu = unit.closed = True
        elif layer.type == "Pooling":
            unit.pools.append(_pool(layer, path))
            unit.closed = True
        else:
            raise _refuse(path, layer, "DeepCluster's networks have no such layer")
        for values in (*(unit.norm or ()), *(unit.scale or ())) if unit else ():
            if values.size != len(unit.weight):
                raise _refuse(path, layer, f"is for {values.size} channels, its input has {len(unit.weight)}")
    return units


def _unit(layer: Layer, path: str | Path) -> Unit:
    if not layer.blobs:
        raise _refuse(path, layer, "has no weights in this file")
    weight = layer.blobs[0]
    if layer.type == "InnerProduct":
        weight = weight.reshape(-1, weight.shape[-1])  # old files: (1, 1, outputs, inputs)
        weight = weight.T if layer.params("inner_product_param").transpose else weight
    elif weight.ndim != 4:
        raise _refuse(path, layer, f"its weights are {weight.shape}, not those of a 2-D convolution")
    bias = layer.blobs[1].ravel() if len(layer.blobs) > 1 else np.zeros(len(weight), np.float32)
    if len(bias) != len(weight):
        raise _refuse(path, layer, f"has {len(bias)} biases for {len(weight)} outputs")
    return Unit(layer, weight, bias)


def _pool(layer: Layer, path: str | Path) -> tuple[int, int]:
    """(kernel, stride) of a max pool without padding."""
    params = layer.params("pooling_param")
    kernel, stride, pad = (
        _geometry(params, *item) for item in (("kernel_size", 0), ("stride", 1), ("pad", 0))
    )
    square = kernel[0] == kernel[1] and stride[0] == stride[1]
    if params.pool or params.global_pooling or pad != (0, 0) or not square:
        raise _refuse(path, layer, "is not a square max pool without padding")
    return kernel[0], stride[0]


def _undo_colour(front: Affine, path: str | Path) -> np.ndarray:
    """(3, 3) matrix: what conv1 of the file sees = matrix @ what ours sees.

    A constant between the two cannot be undone: conv1 pads with zeros, which would mean another colour.
    """
    ours, offset = preprocessing()
    mixing = front[0] @ np.linalg.inv(ours)
    rest = front[1] - mixing @ offset
    if np.abs(rest).max() > MULTIPLE * max(np.abs(mixing @ offset).max(), 1e-12):
        raise UserError(
            f"{path}: what its first convolution sees is 0 for the BGR pixel {np.round(_zero_of(front), 1)}, "
            f"not for the mean colour {np.round(_zero_of(preprocessing()), 1)}: its padding is not ours"
        )
    return mixing


def _zero_of(affine: Affine) -> np.ndarray:
    """The BGR pixel that a front maps to 0."""
    return np.linalg.lstsq(affine[0], -affine[1], rcond=None)[0]


def _undo_sobel(net: Network, front: Affine, unit: Unit | None, path: str | Path) -> np.ndarray:
    """(2, 2) matrix: the file's Sobel maps = matrix @ ours. net's grey bias takes up a constant in the grey.

    The file's grey must be a multiple of ours, the mean of the normalised channels, and its Sobel filters
    combinations of ours; UserError with their values if not.
    """
    ours, offset = (part.mean(axis=0) for part in preprocessing())
    grey = front[0][0]
    factor = grey @ ours / (ours @ ours)
    if not np.abs(grey - factor * ours).max() <= MULTIPLE * np.abs(grey).max() or factor == 0:
        raise UserError(
            f"{path}: its grey layer weighs BGR by {np.array2string(grey, precision=6)}, no multiple of "
            f"{np.array2string(ours, precision=6)}, the mean of the normalised channels"
        )
    shift = front[1][0] / factor - offset
    net.sobel[0].bias.fill_(0.0 if abs(shift) < 1e-4 else shift)
    if unit is None or unit.weight.shape != (2, 1, 3, 3) or unit.norm or unit.scale or unit.closed:
        raise UserError(f"{path}: its grey layer is not followed by a Sobel layer (2 x 1 x 3 x 3)")
    _check_geometry(unit.layer, 1, 1, path)
    filters = net.sobel[1].weight.double().numpy().reshape(2, 9)
    theirs = unit.weight.astype(np.float64).reshape(2, 9)
    mixing = theirs @ np.linalg.pinv(filters)
    if (
        np.abs(mixing @ filters - theirs).max() > MULTIPLE * np.abs(theirs).max()
        or np.abs(unit.bias).max() > 1e-6
    ):
        values = " ".join(f"{value:g}" for value in [*theirs.ravel(), *unit.bias])
        raise _refuse(path, unit.layer, f"its weights and biases are not Sobel's: {values}")
    return mixing * factor


def _check_geometry(layer: Layer, stride: int, pad: int, path: str | Path) -> None:
    """Stride, padding, groups and dilation of a convolution; a file may leave out the parameters."""
    if not layer.message.HasField("convolution_param"):
        return
    params = layer.params("convolution_param")
    found = (
        _geometry(params, "stride", 1),
        _geometry(params, "pad", 0),
        params.group,
        set(params.dilation) - {1},
    )
    if found != ((stride, stride), (pad, pad), 1, set()):
        raise _refuse(
            path, layer, f"stride {found[0]}, pad {found[1]}, group {found[2]}; expected {stride}, {pad}, 1"
        )


def _fill_convs(net: Network, units: list[Unit], mixing: np.ndarray, path: str | Path) -> None:
    """Copy the convolutions and their batch norms; mixing (file's channels, ours) goes into the first."""
    own = _conv_blocks(net)
    if len(units) != len(own):
        raise UserError(f"{path}: has {len(units)} convolutions behind its input, {net.arch} has {len(own)}")
    blocks = list(zip(units, own))
    for number, (unit, (conv, norm, pools)) in enumerate(blocks):
        weight = unit.weight
        if number == 0 and weight.shape[1] == len(mixing):
            weight = np.einsum("oihw,ij->ojhw", weight, mixing)
        if weight.shape != tuple(conv.weight.shape):
            raise _refuse(
                path, unit.layer, f"is {unit.weight.shape}, {net.arch} has {tuple(conv.weight.shape)}"
            )
        _check_geometry(unit.layer, conv.stride[0], conv.padding[0], path)
        if unit.pools != pools and any(unit.pools for unit, _ in blocks):
            raise _refuse(path, unit.layer, f"is followed by pools {unit.pools}, {net.arch} has {pools}")
        if not unit.relu and any(unit.relu for unit in units):
            raise _refuse(path, unit.layer, "is not followed by a ReLU")
        _copy(conv.weight, weight)
        _copy(conv.bias, unit.bias)
        _fill_norm(norm, unit)


def _conv_blocks(net: Network) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, list[tuple[int, int]]]]:
    """(convolution, batch norm, [(kernel, stride) of the pool that follows]), in order."""
    blocks: list = []
    convolutions, _ = net.parts()
    for layer in convolutions[0]:
        if isinstance(layer, nn.Conv2d):
            blocks.append([layer])
        elif isinstance(layer, nn.BatchNorm2d):
            blocks[-1] += [layer, []]
        elif isinstance(layer, nn.MaxPool2d):
            blocks[-1][2].append((layer.kernel_size, layer.stride))
    return [tuple(block) for block in blocks]


def _fill_norm(norm: nn.BatchNorm2d, unit: Unit) -> None:
    """The file's batch norm and scale; where it has none, one that changes nothing."""
    ones, zeros = np.ones(len(unit.weight)), np.zeros(len(unit.weight))
    mean, variance = unit.norm or (zeros, ones)
    factor, shift = unit.scale or (ones, zeros)
    _copy(norm.running_mean, mean)
    _copy(norm.running_var, variance - norm.eps)
    _copy(norm.weight, factor)
    _copy(norm.bias, shift)


def _fill_linears(net: Network, units: list[Unit], path: str | Path) -> None:
    """Copy fc6, fc7 and the head; a batch norm behind one is folded into it."""
    _, rest = net.parts()
    own = [layer for layer in rest.modules() if isinstance(layer, nn.Linear)]
    own += [net.top_layer] if net.top_layer is not None else []
    if len(units) != len(own):
        raise UserError(f"{path}: has {len(units)} inner products; {net.arch} has 2, or 3 with a head")
    for unit, linear in zip(units, own):
        weight, bias = unit.weight, unit.bias
        if weight.shape != tuple(linear.weight.shape):
            raise _refuse(path, unit.layer, f"is {weight.shape}, {net.arch} has {tuple(linear.weight.shape)}")
        if unit.pools or (unit is units[0] and not unit.relu and any(other.relu for other in units)):
            raise _refuse(path, unit.layer, "is not followed by a ReLU and nothing else")
        mean, variance = unit.norm or (0.0, 1.0)
        factor, shift = unit.scale or (1.0, 0.0)
        factor = factor / np.sqrt(variance)
        _copy(linear.weight, weight * np.reshape(factor, (-1, 1)) if unit.norm or unit.scale else weight)
        _copy(linear.bias, (bias - mean) * factor + shift)


def _copy(target: torch.Tensor, values: np.ndarray) -> None:
    target.copy_(torch.from_numpy(np.array(values, dtype=np.float32)))


if __name__ == "__main__":
    run_main(main, ARGS)
