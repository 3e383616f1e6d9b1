"""The network up to a layer as an ONNX file with the preprocessing inside, checked against PyTorch.

    python -m formats.onnx --model checkpoint.pth.tar --out deepcluster.onnx
    python -m formats.onnx --model checkpoint.pth.tar --layer conv5 --input bgr --out conv5.onnx

The file takes `images`, float32 (B, 3, S, S) in 0..255, RGB or with `--input bgr` BGR, any B, and gives the
layer's activation under its name. Dropout is off, batch norms use their statistics.
"""

import argparse

from commandline import OWN_SIZE, Parser, at_least

OPSET = 20  # of ONNX; what onnxruntime has read since 1.17 (February 2024)


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint of main.py or of the authors")
    parser.add_argument("--out", required=True, help="file to write, e.g. deepcluster.onnx")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="what it gives, e.g. conv5, conv5.pre (before the ReLU), logits, a ResNet's layer4 (default: "
        "what is clustered, fc7.pre or avgpool); a wrong name is answered with all",
    )
    parser.add_argument(
        "--input",
        choices=["rgb", "bgr"],
        default="rgb",
        help="channels that it takes, in 0..255; bgr as the Caffe files",
    )
    parser.add_argument("--image-size", type=at_least(1), help=f"side of the images in pixels{OWN_SIZE}")
    parser.add_argument(
        "--opset",
        type=at_least(18),
        default=OPSET,
        help="version of ONNX's operators; lower it where a reader is old",
    )
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
from models import weights
from models.network import Network
from util import UserError, clear_left_over, make_folder, rename, run_main, try_lock

TOLERANCE = 1e-4  # largest difference from PyTorch, relative to the largest activation


def main(args: argparse.Namespace) -> None:
    """Write the file and say how far it is from PyTorch."""
    require_packages()
    net = weights.load(args.model, [args.layer] if args.layer else [])
    weights.refuse_not_finite(net, args.model)
    layer, size = args.layer or net.feature, net.inputs.size(args.image_size)
    difference = export(net, args.out, layer, args.input == "bgr", size, args.opset)
    print(
        f"{args.out}: {net.arch} to {layer}, takes images (B, 3, {size}, {size}), "
        f"{args.input.upper()} in 0..255; difference from PyTorch {difference:.1e} of its largest value"
    )


class WithPreprocessing(nn.Module):
    """Images (B, 3, S, S) in 0..255, RGB or BGR -> one activation of net, which is in eval mode."""

    def __init__(self, net: Network, layer: str, bgr: bool) -> None:
        super().__init__()
        self.net, self.layer, self.bgr = net.folded(), layer, bgr

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rgb = images.flip(1) if self.bgr else images
        x = data.normalise(rgb, self.net.inputs.mean, self.net.inputs.std)
        return self.net.activations(x, [self.layer])[self.layer]


def export(
    net: Network,
    path: str | Path,
    layer: str | None = None,
    bgr: bool = False,
    image_size: int = 224,
    opset: int = OPSET,
) -> float:
    """Write the ONNX file and return its largest difference from PyTorch, relative to the largest activation.

    layer: an activation of net; None: what is clustered.
    It is written beside and gets its name only when onnxruntime agrees with PyTorch to TOLERANCE on two
    batches of different sizes; UserError if not, and where a package is missing.
    """
    require_packages()
    path, layer = Path(path), layer or net.feature
    check_size(net.eval(), layer, image_size)
    make_folder(path.parent)
    model = WithPreprocessing(net, layer, bgr).eval()
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    clear_left_over(path)
    try:
        with open(beside, "wb") as held:
            try_lock(held)
            _write(model, beside, layer, image_size, opset)
            difference = compare(net, beside, layer, bgr, image_size)
            if not difference <= TOLERANCE:
                raise UserError(f"{path}: onnxruntime differs from PyTorch by {difference:.1e}; not kept")
            rename(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return difference


def require_packages() -> None:
    """UserError where onnx, onnxscript or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -r requirements-extra.txt") from None


def check_size(net: Network, layer: str, image_size: int) -> None:
    """Raise UserError where net cannot take images of that size."""
    try:
        with torch.inference_mode():
            net.activations(torch.zeros(1, 3, image_size, image_size), [layer])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--image-size {image_size}: {net.arch} cannot take it ({reason})") from error


def _write(model: WithPreprocessing, path: Path, layer: str, image_size: int, opset: int) -> None:
    """One file with its weights, by PyTorch's exporter, whose remarks are kept from the terminal."""
    example = torch.zeros(2, 3, image_size, image_size)  # 2: a batch of 1 would be taken as fixed
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=[layer],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        written = program.model.opset_imports.get("", opset)
        if written != opset:
            raise UserError(
                f"--opset {opset}: PyTorch's exporter cannot write this network in it; use 18 or newer"
            )
        program.save(path, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal but errors."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def compare(net: Network, path: Path, layer: str, bgr: bool, image_size: int) -> float:
    """max |onnxruntime - PyTorch| / max |PyTorch| over batches of 1 and 3 random images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    worst = 0.0
    for batch in (1, 3):
        rgb = rng.integers(0, 256, (batch, 3, image_size, image_size)).astype(np.float32)
        with torch.inference_mode():
            x = data.normalise(torch.from_numpy(rgb), net.inputs.mean, net.inputs.std)
            expected = net.activations(x, [layer])[layer].numpy()
        images = np.ascontiguousarray(rgb[:, ::-1]) if bgr else rgb
        (found,) = session.run([layer], {"images": images})
        if found.shape != expected.shape:
            raise UserError(f"onnxruntime gives {found.shape}, PyTorch {expected.shape}; not kept")
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


if __name__ == "__main__":
    run_main(main, ARGS)
