"""Images -> activations: the one pass over a folder that training, evaluations and pictures share."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import normalise
from models import DeepClusterNet
from util import Progress, UserError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

Forward = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # normalised images -> named activations


def set_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Set the arithmetic of matrix products and convolutions; returns the autocast context to compute in.

    fp32: full float32 everywhere (TF32 off too), the default on every device, so that nothing becomes less
    exact silently. tf32: float32 with TF32 products, CUDA only. bf16: autocast to bfloat16; on a CPU only
    where it has AMX, as elsewhere it is slower than fp32. fp16: autocast to float16, CUDA only; training
    needs a gradient scaler with it. Raises UserError where a choice makes no sense.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise UserError(f"--precision {precision}: for CUDA GPUs only; use fp32, or bf16 on a CPU with AMX")
    if precision == "bf16" and device.type == "cpu" and not cpu_has_amx():
        raise UserError("--precision bf16: this CPU has no AMX and would be slower than fp32; use fp32")
    # The older of torch's two ways of saying so: torch.export fails after the newer one (torch 2.14).
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=precision in ("bf16", "fp16"))


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def fold_batch_norm(net: DeepClusterNet) -> DeepClusterNet:
    """A view of net, which is in eval mode, in which each convolution carries its batch norm.

    The convolutions are copies, everything else is shared. Equal to net in eval mode up to float32 rounding
    (about 2e-6 relative), about 10% faster on a CPU.
    """
    layers = list(net.features)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            layers[i - 1] = fuse_conv_bn_eval(layers[i - 1], layer)
            layers[i] = nn.Identity()
    folded = copy.copy(net)
    folded._modules = dict(net._modules)
    folded.features = nn.Sequential(*layers)
    return folded


def eval_forward(net: DeepClusterNet, layers: list[str]) -> Forward:
    """Normalised images -> the activations of `layers`, all from one pass of net in eval mode."""
    folded = fold_batch_norm(net.eval()).to(memory_format=torch.channels_last)
    return lambda images: folded.activations(images, layers)


@torch.inference_mode()
def activation_batches(
    forward: Forward,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What `forward` gives for each batch of loader: ({name: (B, ...) float32 on device}, indexes (B,)).

    loader yields (uint8 images (B, 3, S, S), indexes (B,)); an index -1 - i stands for image i that could not
    be decoded (CentralView).
    """
    for images, index in loader:
        with set_precision(precision, device):
            x = normalise(images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            found = {name: value.float() for name, value in forward(x).items()}
        yield found, index


def extract_features(
    net: DeepClusterNet,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    layer: str,
    num_images: int,
    device: torch.device,
    precision: str = "fp32",
    dtype: type = np.float32,
    progress: Progress | None = None,
    first: int = 0,
) -> tuple[np.ndarray, list[int]]:
    """Activations of every image in data-set order, net in eval mode: (features (N, D), broken images).

    loader as for `activation_batches`, over the num_images images from `first` on; the row of a broken image
    is zero. Maps are flattened. The result is held once, in dtype (float32 or float16), whatever the order in
    which batches come.
    """
    was_training = net.training
    features: np.ndarray | None = None
    broken: list[int] = []
    for found, index in activation_batches(eval_forward(net, [layer]), loader, device, precision):
        rows = found[layer].flatten(1).cpu().numpy()
        if features is None:
            features = np.zeros((num_images, rows.shape[1]), dtype=dtype)
        bad = index < 0
        broken += (-1 - index[bad]).tolist()
        features[index[~bad].numpy() - first] = rows[(~bad).numpy()]
        if progress is not None:
            progress.update(len(index))
    net.train(was_training)
    if features is None:  # a rank without images
        features = np.zeros((0, net.feature_dim), dtype=dtype)
    return features, sorted(broken)
