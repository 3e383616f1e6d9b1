"""What reader and writer of Caffe's files share: the part of caffe.proto that these networks need, the layers
of a .caffemodel, and the preprocessing that such files hold in front."""

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import data
from models.network import Network
from util import UserError

Affine = tuple[np.ndarray, np.ndarray]  # (A, b): a pixel's channels x become A x + b

# name:number:type, [] for repeated, =default. Packed floats
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
        blobs = [numbers_of(blob) for blob in message.blobs]
    except ValueError as error:
        raise UserError(f"{path}: layer {message.name}: its weights are damaged ({error})") from error
    return Layer(message.name, kind, list(message.bottom), list(message.top), blobs, message)


def numbers_of(blob: Any) -> np.ndarray:
    """A blob's numbers as float32 in its shape; the old four sizes give four dimensions."""
    shape = tuple(blob.shape.dim)
    if not blob.HasField("shape"):
        shape = (blob.num, blob.channels, blob.height, blob.width)
    wide = np.frombuffer(blob.double_data, "<f8")
    numbers = wide.astype(np.float32) if len(wide) else np.frombuffer(blob.data, "<f4")
    return numbers.reshape(shape)


def preprocessing() -> Affine:
    """(A, b), float64: normalised RGB = A x + b for a BGR pixel x in 0..255."""
    mean, std = np.array(data.IMAGENET_MEAN), np.array(data.IMAGENET_STD)
    return np.diag(1 / (255 * std)) @ np.eye(3)[::-1], -mean / std


def refuse_other_networks(net: Network) -> None:
    """Raise UserError unless net is made of numbered layers, as AlexNet and VGG-16 are."""
    if not (hasattr(net, "features") and hasattr(net, "classifier")):
        raise UserError(f"{net.arch}: Caffe files are of alexnet and vgg16 only")
