"""A network of ours, AlexNet or VGG-16, as Caffe's prototxt + caffemodel.

    python -m formats.caffe_write --model checkpoint.pth.tar --out folder

Writes model.prototxt and model.caffemodel, which take BGR images in 0..255 with no mean subtracted, as the
released ones do: the preprocessing is part of their first layer. They are run in OpenCV before they are kept.
"""

import argparse

from commandline import Parser, at_least


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint of main.py or of the authors")
    parser.add_argument("--out", required=True, help="folder for model.prototxt and model.caffemodel")
    parser.add_argument(
        "--image-size", type=at_least(1), default=224, help="side of the images; others than 224 rarely fit"
    )
    parser.add_argument(
        "--keep-batch-norm",
        action="store_true",
        help="write BatchNorm and Scale layers, e.g. for fine-tuning (default: folded into the convolutions)",
    )
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import data
from formats.caffe_format import messages, preprocessing, refuse_other_networks
from formats.caffe_read import read_network
from models import weights
from models.network import Network
from util import UserError, atomic_write, make_folder, rename, run_main

TOLERANCE = 1e-3  # largest difference, relative to the largest activation, that a written pair may show
PROTOTXT, CAFFEMODEL = "model.prototxt", "model.caffemodel"


def main(args: argparse.Namespace) -> None:
    """Write the pair, and say how far it is from PyTorch."""
    messages()  # says at once if protobuf is missing
    net = weights.load(args.model)
    weights.refuse_not_finite(net, args.model)
    differences = write_network(net, args.out, args.image_size, args.keep_batch_norm)
    print(f"{args.out}: {PROTOTXT} and {CAFFEMODEL} take BGR in 0..255; largest differences from PyTorch,")
    print("relative to the largest activation: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))


def build_layers(
    net: Network, image_size: int, keep_batch_norm: bool = False
) -> tuple[list[tuple[Any, list[np.ndarray]]], dict[str, str]]:
    """Caffe's layers for net: ([(LayerParameter without weights, weights)], {activation: layer's name}).

    Names are Caffe's usual ones, and each layer's output is named as the layer: conv1 (before the ReLU),
    relu1, pool1, ..., fc6, relu_fc6, fc7, relu_fc7, top_layer. Batch norms are folded into the convolutions,
    or with keep_batch_norm are layers bn1, scale1, ... Raises UserError for an image size at which Caffe,
    which rounds pools up and has no adaptive pool, would compute something else.
    """
    refuse_other_networks(net)
    chain = _Chain(image_size)
    given: dict[str, str] = {}
    conv, linear = 0, 5
    for name, layer in (net if keep_batch_norm else net.folded()).walk():
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

    def add(self, name: str, kind: str, *arrays: np.ndarray, **params: Any) -> None:
        bottom = [self.last] if self.last else []
        message = messages().LayerParameter(name=name, type=kind, bottom=bottom, top=[name], **params)
        self.layers.append((message, list(arrays)))
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
    net: Network, folder: str | Path, image_size: int = 224, keep_batch_norm: bool = False
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
            rename(path, folder / path.name)
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
        for layer, arrays in layers:
            part = net(layer=[layer])
            for array in arrays:
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


def _activations(net: Network, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """net's activations of BGR images (B, 3, S, S) float32 in 0..255."""
    with torch.inference_mode():
        x = data.normalise(torch.from_numpy(images[:, ::-1].copy()))
        return {name: _numpy(value) for name, value in net.activations(x, names).items()}


def compare(net: Network, run: Runner, wanted: dict[str, str], image_size: int) -> dict[str, float]:
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


if __name__ == "__main__":
    run_main(main, ARGS)
