"""Caffe's files: the released `.caffemodel` into our network, and our network into prototxt + caffemodel.

    python caffe_io.py import model.caffemodel --arch alexnet --out checkpoint.pth.tar
    python caffe_io.py export --model checkpoint.pth.tar --out folder      # model.prototxt, model.caffemodel

Files written take BGR images in 0..255 with no mean subtracted, as the released ones do: the preprocessing is
part of their first layer. Reading needs protobuf only, no Caffe; a written pair is run in OpenCV.
"""

import argparse
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoint
import data
import evaluation
import models
from features import fold_batch_norm
from models import DeepClusterNet
from util import UserError, atomic_write, make_folder, run_main

TOLERANCE = 1e-3  # largest difference, relative to the largest activation, that a written pair may show
MULTIPLE = 1e-3  # how exactly, relatively, a file's grey and Sobel weights must be multiples of ours
PROTOTXT, CAFFEMODEL = "model.prototxt", "model.caffemodel"

# ---------------------------------------------------------------------------------------- the file format

# The part of caffe.proto that these networks need: name:number:type, [] for repeated, =default. Packed floats
# are declared as bytes, which is the same on the wire, so that numpy takes them without a loop.
SCHEMA = {
    "BlobShape": "dim:1:int64[packed]",
    "BlobProto": "num:1:int32 channels:2:int32 height:3:int32 width:4:int32 data:5:bytes shape:7:BlobShape "
    "double_data:8:bytes",
    "ConvolutionParameter": "num_output:1:uint32 bias_term:2:bool=true pad:3:uint32[] kernel_size:4:uint32[] "
    "group:5:uint32=1 stride:6:uint32[] pad_h:9:uint32 pad_w:10:uint32 kernel_h:11:uint32 kernel_w:12:uint32 "
    "stride_h:13:uint32 stride_w:14:uint32 dilation:18:uint32[]",
    "PoolingParameter": "pool:1:int32=0 kernel_size:2:uint32 stride:3:uint32=1 pad:4:uint32=0 "
    "kernel_h:5:uint32 kernel_w:6:uint32 stride_h:7:uint32 stride_w:8:uint32 pad_h:9:uint32 pad_w:10:uint32 "
    "global_pooling:12:bool=false",
    "InnerProductParameter": "num_output:1:uint32 bias_term:2:bool=true transpose:6:bool=false",
    "BatchNormParameter": "use_global_stats:1:bool eps:3:float=1e-5",
    "ScaleParameter": "axis:1:int32=1 bias_term:4:bool=false",
    "PowerParameter": "power:1:float=1 scale:2:float=1 shift:3:float=0",
    "ReLUParameter": "negative_slope:1:float=0",
    "InputParameter": "shape:1:BlobShape[]",
    "LayerParameter": "name:1:string type:2:string bottom:3:string[] top:4:string[] blobs:7:BlobProto[] "
    "convolution_param:106:ConvolutionParameter inner_product_param:117:InnerProductParameter "
    "pooling_param:121:PoolingParameter power_param:122:PowerParameter relu_param:123:ReLUParameter "
    "batch_norm_param:139:BatchNormParameter scale_param:142:ScaleParameter input_param:143:InputParameter",
    "V1LayerParameter": "bottom:2:string[] top:3:string[] name:4:string type:5:int32 blobs:6:BlobProto[] "
    "convolution_param:10:ConvolutionParameter inner_product_param:17:InnerProductParameter "
    "pooling_param:19:PoolingParameter power_param:21:PowerParameter relu_param:30:ReLUParameter",
    "NetParameter": "name:1:string layers:2:V1LayerParameter[] input:3:string[] layer:100:LayerParameter[]",
}
V1_TYPES = {
    1: "Accuracy", 4: "Convolution", 5: "Data", 6: "Dropout", 8: "Flatten", 9: "HDF5Data", 12: "ImageData",
    14: "InnerProduct", 15: "LRN", 17: "Pooling", 18: "ReLU", 20: "Softmax", 21: "SoftmaxWithLoss",
    22: "Split", 24: "WindowData", 26: "Power", 29: "MemoryData", 32: "DummyData", 36: "Silence",
}  # fmt: skip
INPUTS = {"Input", "Data", "ImageData", "MemoryData", "DummyData", "HDF5Data", "WindowData"}
NO_EFFECT = {"Dropout", "Flatten", "Split"}  # when a trained network is used
SIDE_OUTPUTS = {"Accuracy", "Softmax", "SoftmaxWithLoss", "Silence"}


@functools.cache
def messages() -> SimpleNamespace:
    """The classes of Caffe's messages, made by protobuf from SCHEMA."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise UserError("protobuf is not installed; pip install -r requirements-extra.txt") from None
    file = descriptor_pb2.FileDescriptorProto(name="caffe-part.proto", package="caffe", syntax="proto2")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for text in fields.split():
            _add_field(message, *text.split(":"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return SimpleNamespace(
        **{
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
            for name in SCHEMA
        }
    )


def _add_field(message: Any, name: str, number: str, kind: str) -> None:
    """Add a field of SCHEMA to a message's descriptor."""
    kind, _, default = kind.partition("=")
    kind, _, repeated = kind.partition("[")
    added = message.field.add(name=name, number=int(number))
    added.label = added.LABEL_REPEATED if repeated else added.LABEL_OPTIONAL
    if kind in SCHEMA:
        added.type, added.type_name = added.TYPE_MESSAGE, f".caffe.{kind}"
    else:
        added.type = getattr(added, f"TYPE_{kind.upper()}")
    if default:
        added.default_value = default
    if repeated == "packed]":
        added.options.packed = True


@dataclass
class Layer:
    """One layer of a file, of the new or the old (V1) kind. params: the message of its type's parameters."""

    name: str
    type: str
    bottom: list[str]
    top: list[str]
    blobs: list[np.ndarray]
    message: Any

    def params(self, name: str) -> Any:
        """The message `name` of parameters, with Caffe's defaults where the file has none."""
        return getattr(self.message, name)


def read_layers(path: str | Path) -> list[Layer]:
    """The layers of a .caffemodel in order, with their weights. UserError for a file that is none."""
    from_string = messages().NetParameter.FromString
    try:
        net = from_string(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{path}: truncated or not a caffemodel") from error
    layers = [_layer(layer, layer.type, path) for layer in net.layer]
    layers += [_layer(layer, V1_TYPES.get(layer.type, f"V1 type {layer.type}"), path) for layer in net.layers]
    if not any(layer.blobs for layer in layers):
        raise UserError(f"{path}: truncated or not a caffemodel (no layer with weights)")
    return layers


def _layer(message: Any, kind: str, path: str | Path) -> Layer:
    try:
        blobs = [_array(blob) for blob in message.blobs]
    except ValueError as error:
        raise UserError(f"{path}: layer {message.name}: its weights are damaged ({error})") from error
    return Layer(message.name, kind, list(message.bottom), list(message.top), blobs, message)


def _array(blob: Any) -> np.ndarray:
    """A blob's numbers as float32 in its shape; the old four sizes give four dimensions."""
    shape = tuple(blob.shape.dim)
    if not blob.HasField("shape"):
        shape = (blob.num, blob.channels, blob.height, blob.width)
    wide = np.frombuffer(blob.double_data, "<f8")
    numbers = wide.astype(np.float32) if len(wide) else np.frombuffer(blob.data, "<f4")
    return numbers.reshape(shape)


# ---------------------------------------------------------------------------------------- reading


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


def read_network(path: str | Path, arch: str) -> DeepClusterNet:
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
    if any(not torch.isfinite(value).all() for value in net.state_dict().values()):
        raise UserError(f"{path}: has weights that are not finite")
    return net


def _fill(
    arch: str, front: tuple[np.ndarray, np.ndarray], units: list[Unit], path: str | Path
) -> DeepClusterNet:
    """Our network with the file's weights."""
    sobel = len(front[0]) == 1
    linears = [unit for unit in units if not unit.is_conv]
    head = len(linears[2].weight) if len(linears) == 3 else None
    net = models.build(arch, sobel, head, seed=0).eval()
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


def _pointwise(layer: Layer, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
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


def _front(layers: list[Layer], path: str | Path) -> tuple[tuple[np.ndarray, np.ndarray], list[Layer]]:
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
    if (
        params.pool
        or params.global_pooling
        or pad != (0, 0)
        or kernel[0] != kernel[1]
        or stride[0] != stride[1]
    ):
        raise _refuse(path, layer, "is not a square max pool without padding")
    return kernel[0], stride[0]


def preprocessing() -> tuple[np.ndarray, np.ndarray]:
    """(A, b), float64: normalised RGB = A x + b for a BGR pixel x in 0..255."""
    mean, std = np.array(data.IMAGENET_MEAN), np.array(data.IMAGENET_STD)
    return np.diag(1 / (255 * std)) @ np.eye(3)[::-1], -mean / std


def _undo_colour(front: tuple[np.ndarray, np.ndarray], path: str | Path) -> np.ndarray:
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


def _zero_of(affine: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The BGR pixel that a front maps to 0."""
    return np.linalg.lstsq(affine[0], -affine[1], rcond=None)[0]


def _undo_sobel(
    net: DeepClusterNet, front: tuple[np.ndarray, np.ndarray], unit: Unit | None, path: str | Path
) -> np.ndarray:
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


def _fill_convs(net: DeepClusterNet, units: list[Unit], mixing: np.ndarray, path: str | Path) -> None:
    """Copy the trunk's convolutions and batch norms; mixing (file's channels, ours) goes into the first."""
    if len(units) != net.num_convs:
        raise UserError(
            f"{path}: has {len(units)} convolutions behind its input, {net.arch} has {net.num_convs}"
        )
    blocks = list(zip(units, _conv_blocks(net)))
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


def _conv_blocks(net: DeepClusterNet) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, list[tuple[int, int]]]]:
    """(convolution, batch norm, [(kernel, stride) of the pool that follows]) for each of the trunk."""
    blocks: list = []
    for layer in net.features:
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


def _fill_linears(net: DeepClusterNet, units: list[Unit], path: str | Path) -> None:
    """Copy fc6, fc7 and the head; a batch norm behind one is folded into it."""
    own = [layer for layer in net.classifier if isinstance(layer, nn.Linear)]
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


# ---------------------------------------------------------------------------------------- writing


def build_layers(
    net: DeepClusterNet, image_size: int, keep_batch_norm: bool = False
) -> tuple[list[tuple[Any, list[np.ndarray]]], dict[str, str]]:
    """Caffe's layers for net: ([(LayerParameter without weights, weights)], {activation: layer's name}).

    Names are Caffe's usual ones, and each layer's output is named as the layer: conv1 (before the ReLU),
    relu1, pool1, ..., fc6, relu_fc6, fc7, relu_fc7, top_layer. Batch norms are folded into the convolutions,
    or with keep_batch_norm are layers bn1, scale1, ... Raises UserError for an image size at which Caffe,
    which rounds pools up and has no adaptive pool, would compute something else.
    """
    chain = _Chain(image_size)
    given: dict[str, str] = {}
    conv, linear = 0, 5
    for name, layer in (net if keep_batch_norm else fold_batch_norm(net)).walk():
        if isinstance(layer, nn.Sequential):
            _add_sobel(chain, layer)
        elif isinstance(layer, nn.Conv2d):
            if not conv and net.sobel is None:
                chain.convolution("normalise", *_colour())
            conv += 1
            chain.convolution(
                f"conv{conv}", _numpy(layer.weight), _numpy(layer.bias), layer.stride[0], layer.padding[0]
            )
        elif isinstance(layer, nn.BatchNorm2d):
            chain.batch_norm(conv, layer)
        elif isinstance(layer, nn.ReLU):
            chain.add(f"relu{conv}" if linear == 5 else f"relu_fc{linear}", "ReLU")
        elif isinstance(layer, nn.MaxPool2d):
            chain.pool(f"pool{conv}", layer.kernel_size, layer.stride)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            chain.check_size(layer.output_size)
        elif isinstance(layer, nn.Linear):
            linear += 1
            chain.linear("top_layer" if layer is net.top_layer else f"fc{linear}", layer)
        if name:
            given[name] = chain.last
    return chain.layers, given


class _Chain:
    """Layers one after the other, and the side of the map at the end so far."""

    def __init__(self, image_size: int) -> None:
        self.layers: list[tuple[Any, list[np.ndarray]]] = []
        self.image_size = self.side = image_size
        self.last = ""
        shape = messages().BlobShape(dim=[1, 3, image_size, image_size])
        self.add("data", "Input", input_param=messages().InputParameter(shape=[shape]))

    def add(self, name: str, kind: str, *weights: np.ndarray, **params: Any) -> None:
        bottom = [self.last] if self.last else []
        message = messages().LayerParameter(name=name, type=kind, bottom=bottom, top=[name], **params)
        self.layers.append((message, list(weights)))
        self.last = name

    def convolution(
        self, name: str, weight: np.ndarray, bias: np.ndarray, stride: int = 1, pad: int = 0
    ) -> None:
        kernel = weight.shape[2]
        self.side = (self.side + 2 * pad - kernel) // stride + 1
        params = messages().ConvolutionParameter(
            num_output=len(weight), kernel_size=[kernel], stride=[stride], pad=[pad]
        )
        self.add(name, "Convolution", weight, bias, convolution_param=params)

    def batch_norm(self, number: int, norm: nn.BatchNorm2d) -> None:
        params = messages().BatchNormParameter(use_global_stats=True, eps=norm.eps)
        statistics = _numpy(norm.running_mean), _numpy(norm.running_var), np.ones(1, np.float32)
        self.add(f"bn{number}", "BatchNorm", *statistics, batch_norm_param=params)
        params = messages().ScaleParameter(bias_term=True)
        self.add(f"scale{number}", "Scale", _numpy(norm.weight), _numpy(norm.bias), scale_param=params)

    def pool(self, name: str, kernel: int, stride: int) -> None:
        if self.side < kernel or (self.side - kernel) % stride:
            raise UserError(
                f"--image-size {self.image_size}: {name} meets a map of {self.side}, where Caffe rounds up "
                f"and PyTorch down; use 224"
            )
        self.side = (self.side - kernel) // stride + 1
        params = messages().PoolingParameter(kernel_size=kernel, stride=stride)  # MAX is the default
        self.add(name, "Pooling", pooling_param=params)

    def check_size(self, expected: int) -> None:
        if self.side != expected:
            raise UserError(
                f"--image-size {self.image_size}: the last map is {self.side} wide, the classifier takes "
                f"{expected} and Caffe has no adaptive pool; use 224"
            )

    def linear(self, name: str, layer: nn.Linear) -> None:
        params = messages().InnerProductParameter(num_output=layer.out_features)
        self.add(name, "InnerProduct", _numpy(layer.weight), _numpy(layer.bias), inner_product_param=params)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _colour() -> tuple[np.ndarray, np.ndarray]:
    """The preprocessing as a 1x1 convolution of its own: conv1 pads the normalised image, not the BGR one."""
    matrix, offset = preprocessing()
    return matrix.reshape(3, 3, 1, 1).astype(np.float32), offset.astype(np.float32)


def _add_sobel(chain: _Chain, sobel: nn.Sequential) -> None:
    """Grey with the preprocessing folded in, bias and all, as Sobel pads the normalised grey; then Sobel."""
    matrix, offset = preprocessing()
    grey = _numpy(sobel[0].weight).astype(np.float64)[:, :, 0, 0]
    bias = grey @ offset + _numpy(sobel[0].bias)
    chain.convolution(
        "grey", (grey @ matrix).reshape(-1, 3, 1, 1).astype(np.float32), bias.astype(np.float32)
    )
    chain.convolution("sobel", _numpy(sobel[1].weight), _numpy(sobel[1].bias), pad=sobel[1].padding[0])


def write_network(
    net: DeepClusterNet, folder: str | Path, image_size: int = 224, keep_batch_norm: bool = False
) -> dict[str, float]:
    """Write FOLDER/model.prototxt and model.caffemodel, once they are checked; returns the differences found.

    The check runs the pair in OpenCV, on random pixels, or where OpenCV cannot read Caffe's files reads the
    caffemodel back; {activation: largest difference from PyTorch / largest activation}. Raises UserError, and
    leaves the folder as it was, where one is above TOLERANCE.
    """
    layers, given = build_layers(net, image_size, keep_batch_norm)
    folder = make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".caffe-") as beside:
        prototxt, caffemodel = Path(beside) / PROTOTXT, Path(beside) / CAFFEMODEL
        _write_pair(net.arch, layers, prototxt, caffemodel)
        names = [
            name for name in net.activation_names if name.endswith(".pre") or name in ("sobel", "logits")
        ]
        run = _opencv_runner(prototxt, caffemodel) or _own_runner(caffemodel, net.arch)
        differences = compare(net, run, {name: given[name] for name in names}, image_size)
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= TOLERANCE:
            raise UserError(
                f"the Caffe files differ from PyTorch by {differences[worst]:.1e} at {worst}; not kept"
            )
        for path in (prototxt, caffemodel):
            os.replace(path, folder / path.name)
    return differences


def _write_pair(name: str, layers: list[tuple[Any, list]], prototxt: Path, caffemodel: Path) -> None:
    """Text without weights, and binary with them, a layer at a time: messages written in a row are merged."""
    from google.protobuf import text_format

    net = messages().NetParameter
    with atomic_write(prototxt) as file:
        file.write("# Takes BGR images in 0..255, no mean subtracted.\n")
        file.write(text_format.MessageToString(net(name=name, layer=[layer for layer, _ in layers])))
    with atomic_write(caffemodel, "wb") as file:
        file.write(net(name=name).SerializeToString())
        for layer, weights in layers:
            part = net(layer=[layer])
            for array in weights:
                shape = messages().BlobShape(dim=array.shape)
                part.layer[0].blobs.append(
                    messages().BlobProto(shape=shape, data=array.astype("<f4").tobytes())
                )
            file.write(part.SerializeToString())


Runner = Callable[[np.ndarray, dict[str, str]], dict[str, np.ndarray]]


def _opencv_runner(prototxt: Path, caffemodel: Path) -> Runner | None:
    """(BGR images, {activation: layer}) -> {activation: values} by OpenCV; None where that reads no Caffe."""
    try:
        import cv2

        net = cv2.dnn.readNetFromCaffe(str(prototxt), str(caffemodel))
        net.enableFusion(False)  # OpenCV 4.14 fails with it where a Scale layer is asked for
    except (ImportError, AttributeError):  # OpenCV 5 dropped it
        return None

    def run(images: np.ndarray, wanted: dict[str, str]) -> dict[str, np.ndarray]:
        net.setInput(images)
        return dict(zip(wanted, net.forward(list(wanted.values()))))

    return run


def _own_runner(caffemodel: Path, arch: str) -> Runner:
    """The same by reading the file back."""
    print("OpenCV below 5 is not installed, so the files were not run in it but only read back", flush=True)
    net = read_network(caffemodel, arch)

    def run(images: np.ndarray, wanted: dict[str, str]) -> dict[str, np.ndarray]:
        return _activations(net, images, list(wanted))

    return run


def _activations(net: DeepClusterNet, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """net's activations of BGR images (B, 3, S, S) float32 in 0..255."""
    with torch.inference_mode():
        x = data.normalise(torch.from_numpy(images[:, ::-1].copy()))
        return {name: _numpy(value) for name, value in net.activations(x, names).items()}


def compare(net: DeepClusterNet, run: Runner, wanted: dict[str, str], image_size: int) -> dict[str, float]:
    """{activation: largest difference / largest activation} between net and `run` on two random images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, image_size, image_size)).astype(np.float32)
    ours, theirs = _activations(net, images, list(wanted)), run(images, wanted)
    return {
        name: float(
            np.abs(ours[name] - theirs[name].reshape(ours[name].shape)).max() / np.abs(ours[name]).max()
        )
        for name in wanted
    }


# ---------------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Caffe files to checkpoints and back")
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="caffemodel -> checkpoint")
    reading.add_argument("caffemodel", help="e.g. the released model.caffemodel; its prototxt is not needed")
    reading.add_argument("--arch", required=True, choices=sorted(models.ARCHITECTURES), help="what it holds")
    reading.add_argument("--out", required=True, help="checkpoint to write, e.g. checkpoint.pth.tar")
    writing = commands.add_parser("export", help="checkpoint -> prototxt + caffemodel")
    writing.add_argument("--model", required=True, help="a checkpoint of main.py or of the authors")
    writing.add_argument("--out", required=True, help=f"folder for {PROTOTXT} and {CAFFEMODEL}")
    writing.add_argument(
        "--image-size", type=int, default=224, help="side of the images (default: %(default)s)"
    )
    writing.add_argument(
        "--keep-batch-norm",
        action="store_true",
        help="write BatchNorm and Scale layers, e.g. for fine-tuning (default: folded into the convolutions)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert one way or the other, and say what was found."""
    messages()  # says at once if protobuf is missing
    if args.command == "import":
        net = read_network(args.caffemodel, args.arch)
        checkpoint.save(args.out, {"arch": net.arch, "state_dict": net.state_dict()})
        head = f"head of {net.top_layer.out_features}" if net.top_layer is not None else "no head"
        print(f"{args.out}: {net.arch} {'with' if net.sobel is not None else 'without'} Sobel, {head}")
        return
    net = evaluation.open_network(args.model, [])
    differences = write_network(net, args.out, args.image_size, args.keep_batch_norm)
    print(f"{args.out}: {PROTOTXT} and {CAFFEMODEL} take BGR in 0..255; largest differences from PyTorch,")
    print("relative to the largest activation: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
