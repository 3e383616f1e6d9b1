"""Checkpoints: the one reader and the one writer, for our files and for those that the authors released.

Files come from strangers: they are opened with PyTorch's restricted unpickler, which builds tensors and plain
containers and never runs code from the file.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

import models
from models import DeepClusterNet
from util import UserError, atomic_write

CLUSTERING = "clustering.pth.tar"  # EXP/...: network, PCA and centroids of the moment of the last clustering


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) beside `path` and rename.

    A kill or a full disk leaves the last good file. Raises UserError where the file cannot be written.
    """
    with atomic_write(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's zip writer makes of a write that failed
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint, its tensors on the CPU.

    Reads PyTorch's zip format and the older one (protocol 2, Python 2 strings, CUDA storages) on machines
    without CUDA. Raises UserError for a missing, truncated or foreign file, and for one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, not a plain checkpoint ({refused_name(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated or not a PyTorch checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def refused_name(error: Exception) -> str:
    """What the restricted unpickler refused, in a few words."""
    found = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
    if found:
        return f"it asks for {found.group(1)}"
    found = re.search(r"[Uu]nsupported \w+ ?\S*", str(error))
    return found.group() if found else "its pickle holds more than tensors and plain containers"


def clean_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter names without DataParallel's `module.` at whatever level it stands."""
    return {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in state_dict.items()}


def model_weights(state: dict[str, Any], path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """(arch, clean state dict) of a checkpoint's dict, or of a bare state dict.

    arch is the file's own word, else it is seen from the position of the first linear layer.
    """
    weights = state.get("state_dict", state)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{path}: no state_dict of tensors in this file")
    weights = clean_keys(weights)
    if "features.0.weight" not in weights:
        raise UserError(f"{path}: not a DeepCluster network (no features.0.weight among its parameters)")
    arch = str(state.get("arch") or ("alexnet" if "classifier.1.weight" in weights else "vgg16"))
    return arch, weights


def build_from(state: dict[str, Any], path: str | Path) -> DeepClusterNet:
    """The network that a checkpoint's dict describes, with its weights, on the CPU, in eval mode.

    Sobel is seen from `sobel.0.weight`, the number of clusters from `top_layer.bias`; a file without a head
    gives a network without one.
    """
    arch, weights = model_weights(state, path)
    head = weights.get("top_layer.bias")
    net = models.build(arch, "sobel.0.weight" in weights, None if head is None else head.numel(), seed=0)
    load_weights(net, weights, path)
    return net.eval()


def load_weights(net: DeepClusterNet, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into net; everything must fit, except `num_batches_tracked`, which old files lack."""
    own = net.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {extra[0]}"
        raise UserError(f"{path}: does not fit {net.arch}{' with Sobel' if net.sobel else ''}: it {what}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{path}: {name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in {net.arch}"
            )
    net.load_state_dict(weights, strict=False)


def load_model(path: str | Path) -> DeepClusterNet:
    """The network in a checkpoint file (ours or the authors'), on the CPU, in eval mode."""
    return build_from(read(path), path)


def init_weights(net: DeepClusterNet, path: str | Path) -> None:
    """Take the weights of a file for everything but the head (`--init`); optimisers in it are ignored.

    Raises UserError when the file's arch or Sobel is not net's.
    """
    arch, weights = model_weights(read(path), path)
    sobel = "sobel.0.weight" in weights
    if arch != net.arch or sobel != (net.sobel is not None):
        raise UserError(
            f"--init {path}: holds {arch} {'with' if sobel else 'without'} Sobel, the run is {net.arch} "
            f"{'with' if net.sobel is not None else 'without'} Sobel; change --arch or --sobel"
        )
    head = {name: value for name, value in net.state_dict().items() if name.startswith("top_layer.")}
    body = {name: value for name, value in weights.items() if not name.startswith("top_layer.")}
    load_weights(net, body | head, path)
