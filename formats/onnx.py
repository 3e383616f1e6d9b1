"""The network up to a layer as an ONNX file with the preprocessing inside, checked against PyTorch.

    python export.py --model checkpoint.pth.tar --out deepcluster.onnx
    python export.py --model checkpoint.pth.tar --layer conv5 --input bgr --image-size 224 --out conv5.onnx

The file takes `images`, float32 (B, 3, S, S) in 0..255, RGB or with `--input bgr` BGR, any B, and gives the
layer's activation under its name. Dropout is off, batch norms use their statistics.
"""

import argparse
import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import data
import evaluation
from features import fold_batch_norm
from models import FEATURE, DeepClusterNet
from util import UserError, make_folder, run_main

TOLERANCE = 1e-4  # largest difference from PyTorch, relative to the largest activation
OPSET = 20  # of ONNX; what onnxruntime has read since 1.17 (February 2024)


class WithPreprocessing(nn.Module):
    """Images (B, 3, S, S) in 0..255, RGB or BGR -> one activation of net, which is in eval mode."""

    def __init__(self, net: DeepClusterNet, layer: str, bgr: bool) -> None:
        super().__init__()
        self.net, self.layer, self.bgr = fold_batch_norm(net), layer, bgr

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rgb = images.flip(1) if self.bgr else images
        return self.net.activations(data.normalise(rgb), [self.layer])[self.layer]


def export(
    net: DeepClusterNet,
    path: str | Path,
    layer: str = FEATURE,
    bgr: bool = False,
    image_size: int = 224,
    opset: int = OPSET,
) -> float:
    """Write the ONNX file and return its largest difference from PyTorch, relative to the largest activation.

    It is written beside and gets its name only when onnxruntime agrees with PyTorch to TOLERANCE on two
    batches of different sizes; UserError if not, and where a package is missing.
    """
    require_packages()
    path = Path(path)
    make_folder(path.parent)
    model = WithPreprocessing(net.eval(), layer, bgr).eval()
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        _write(model, beside, layer, image_size, opset)
        difference = compare(net, beside, layer, bgr, image_size)
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: onnxruntime differs from PyTorch by {difference:.1e}; not kept")
        os.replace(beside, path)
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
def _quiet() -> Any:
    """Nothing on the terminal but errors."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def compare(net: DeepClusterNet, path: Path, layer: str, bgr: bool, image_size: int) -> float:
    """max |onnxruntime - PyTorch| / max |PyTorch| over batches of 1 and 3 random images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    worst = 0.0
    for batch in (1, 3):
        rgb = rng.integers(0, 256, (batch, 3, image_size, image_size)).astype(np.float32)
        with torch.inference_mode():
            expected = net.activations(data.normalise(torch.from_numpy(rgb)), [layer])[layer].numpy()
        images = np.ascontiguousarray(rgb[:, ::-1]) if bgr else rgb
        (found,) = session.run([layer], {"images": images})
        if found.shape != expected.shape:
            raise UserError(f"onnxruntime gives {found.shape}, PyTorch {expected.shape}; not kept")
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a network as ONNX, preprocessing included")
    parser.add_argument("--model", required=True, help="a checkpoint of main.py or of the authors")
    parser.add_argument("--out", required=True, help="file to write, e.g. deepcluster.onnx")
    parser.add_argument(
        "--layer",
        default=FEATURE,
        help="what it gives: conv<n>, conv<n>.pre, pool, fc6, fc6.pre, fc7, fc7.pre, logits, sobel "
        "(.pre: before the ReLU; default: %(default)s)",
    )
    parser.add_argument(
        "--input",
        choices=["rgb", "bgr"],
        default="rgb",
        help="channels that it takes, in 0..255; bgr as the Caffe files (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of the images in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=OPSET,
        help="version of ONNX's operators, 18 or newer (default: %(default)s)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the file and say how far it is from PyTorch."""
    require_packages()
    if args.image_size < 1:
        raise UserError(f"--image-size {args.image_size}: must be at least 1")
    net = evaluation.open_network(args.model, [args.layer])
    difference = export(net, args.out, args.layer, args.input == "bgr", args.image_size, args.opset)
    print(
        f"{args.out}: {net.arch} to {args.layer}, takes images (B, 3, {args.image_size}, {args.image_size}), "
        f"{args.input.upper()} in 0..255; difference from PyTorch {difference:.1e} of its largest value"
    )


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
