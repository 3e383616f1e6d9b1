"""Files of weights, ours and those that the authors released, as networks.

Nothing here trusts a file's own word where its parameters tell: Sobel is seen from `sobel.0.weight`, the
number of clusters from `top_layer.bias`, the architecture from names and shapes.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import checkpoint
import models
from models.inputs import inputs_of
from models.network import Network
from util import UserError, derive_seed

HEADS = ("top_layer.", "prototypes.")  # not part of a network where only that is wanted
# Names of parameters in files of others: a file that has the first one has them all.
OTHER_NAMES = {
    "body.features.0.weight": {"body.": "", "pred_layer.": "top_layer."},  # DeeperCluster
    "layer1.0.conv1.weight": {"fc.": "top_layer."},  # torchvision's ResNets
}
# Released by DeeperCluster's authors: VGG-16 in their wide geometry, whatever form the names in them have.
WIDE_FILES = ("ours.pth", "deepcluster_flickr.pth", "rotnet_flickr.pth", "rotnet_imagenet.pth")


def clean_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names of parameters: without DataParallel's `module.` at whatever level it stands, and the like."""
    clean = {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in state_dict.items()}
    for mark, names in OTHER_NAMES.items():
        if mark in clean:
            for other, ours in names.items():
                clean = {re.sub(f"^{re.escape(other)}", ours, name): clean[name] for name in clean}
    if not any(name.startswith("projection_head.") for name in clean):  # prototypes say nothing without it
        clean = {name: value for name, value in clean.items() if not name.startswith("prototypes.")}
    return clean


def model_weights(state: dict[str, Any], path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """(arch, clean state dict) of a checkpoint's dict, or of a bare state dict.

    arch is the file's own word, else it is seen from the parameters. Raises UserError where there are none
    that this repository knows.
    """
    weights = state.get("state_dict", state)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise UserError(f"{path}: no state_dict of tensors in this file")
    wide = any(re.match(r"(module\.)?body\.(module\.)?features\.", name) for name in weights)
    wide = wide or Path(path).name in WIDE_FILES
    weights = clean_keys(weights)
    word = state.get("arch")
    arch = word if isinstance(word, str) and word in models.ARCHITECTURES else guess_arch(weights)
    if arch == "vgg16" and wide:
        arch = "vgg16wide"
    if arch is None:
        raise UserError(
            f"{path}: not a network of this repository (neither features.0.weight of AlexNet and VGG-16 nor "
            "layer1.0.conv1.weight of a ResNet among its parameters)"
        )
    return arch, weights


def guess_arch(weights: dict[str, torch.Tensor]) -> str | None:
    """The architecture that has these parameters; None if there is none."""
    first = next((weights[name] for name in ("features.0.weight", "conv1.weight") if name in weights), None)
    if first is None or first.ndim != 4:
        return None
    if "features.0.weight" in weights:
        if weights["features.0.weight"].shape[1:] == (3, 5, 5):
            return "vgg16folded"
        return "alexnet" if "classifier.1.weight" in weights else "vgg16"
    if "layer1.0.conv1.weight" not in weights or "conv1.weight" not in weights:
        return None
    stem = weights["conv1.weight"].shape
    if "layer1.0.conv3.weight" in weights:
        width = stem[0] // 64
        wide = "resnet50" if width == 1 else f"resnet50w{width}"
        return wide if wide in models.ARCHITECTURES else None
    return "resnet18s" if stem[-1] == 3 else "resnet18"


def build_from(state: dict[str, Any], path: str | Path) -> Network:
    """The network that a checkpoint's dict describes, with its weights, on the CPU, in eval mode.

    A file without a head gives a network without one.
    """
    arch, weights = model_weights(state, path)
    # First without memory: a small file may ask for a network that does not fit into any.
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        refuse_unfit(net_for(arch, weights, path), weights, path)
    net = net_for(arch, weights, path)
    load_weights(net, weights, path)
    net.inputs = inputs_of(state, weights, path)
    return net.eval()


def net_for(arch: str, weights: dict[str, torch.Tensor], path: str | Path) -> Network:
    """A network of arch with the Sobel, head or embedding of these parameters, not with their values."""
    try:
        head = weights.get("top_layer.bias")
        net = models.build(arch, has_sobel(weights), None if head is None else head.numel(), seed=0)
        if any(name.startswith("projection_head.") for name in weights):
            net.set_embedding(*embedding_of(weights), seed=0)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its projection head or prototypes are not those of {arch}") from error
    return net


def has_sobel(weights: dict[str, torch.Tensor]) -> bool:
    """Whether Sobel stands in front: its parameters, or two input channels of the first convolution, tell."""
    first = next((weights[name] for name in ("features.0.weight", "conv1.weight") if name in weights), None)
    return "sobel.0.weight" in weights or (first is not None and first.ndim == 4 and first.shape[1] == 2)


def embedding_of(weights: dict[str, torch.Tensor]) -> tuple[int, int, int | list[int] | None]:
    """(units of the projection head, numbers of an embedding, prototypes or None) of these parameters."""
    if "projection_head.weight" in weights:
        hidden, dim = 0, len(weights["projection_head.weight"])
    else:
        hidden, dim = len(weights["projection_head.0.weight"]), len(weights["projection_head.3.weight"])
    if "prototypes.weight" in weights:
        return hidden, dim, len(weights["prototypes.weight"])
    sets = [name for name in weights if re.fullmatch(r"prototypes\.prototypes\d+\.weight", name)]
    return hidden, dim, [len(weights[f"prototypes.prototypes{h}.weight"]) for h in range(len(sets))] or None


def load_weights(net: Network, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into net; everything must fit, as refuse_unfit says."""
    refuse_unfit(net, weights, path)
    net.load_state_dict(weights, strict=False)


def refuse_unfit(net: Network, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """UserError unless weights fit net, except that `num_batches_tracked` and Sobel may lack."""
    own = net.state_dict()
    fixed = ("num_batches_tracked", *(name for name in own if name.startswith("sobel.")))
    missing = [name for name in own if name not in weights and not name.endswith(fixed)]
    extra = [name for name in weights if name not in own]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {extra[0]}"
        raise UserError(f"{path}: does not fit {net.arch}{' with Sobel' if net.sobel else ''}: it {what}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"{path}: {name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in {net.arch}"
            )


def refuse_not_finite(net: Network, path: str | Path) -> None:
    """Raise UserError, naming the parameter, where a weight or statistic of net is NaN or infinite."""
    for name, value in net.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{path}: {name} has numbers that are not finite: the training that made it failed"
            )


def load(path: str | Path | None, layers: Iterable[str] = (), seed: int = 31) -> Network:
    """The network in a checkpoint file (ours or the authors'), on the CPU, in eval mode.

    `random:ARCH` and `random:ARCH:sobel` name the network that a run with --seed `seed` starts from. Raises
    UserError where there is none, and where it lacks one of the activations `layers`.
    """
    if not path:
        raise UserError("--model is missing: give a checkpoint, e.g. exp/checkpoint.pth.tar")
    net = random_network(str(path), seed) if str(path).startswith("random:") else None
    net = net or build_from(checkpoint.read(path), path)
    for layer in layers:
        if layer not in net.activation_names:
            raise UserError(
                f"{path}: {net.arch} has no layer {layer}; it has {', '.join(net.activation_names)}"
            )
    return net


def random_network(spec: str, seed: int) -> Network:
    """The network of `random:ARCH` or `random:ARCH:sobel`: that a run with this --seed starts from."""
    arch, _, sobel = spec.removeprefix("random:").partition(":")
    if arch not in models.ARCHITECTURES or sobel not in ("", "sobel"):
        raise UserError(
            f"--model {spec}: random networks are random:ARCH or random:ARCH:sobel, ARCH one of "
            f"{', '.join(models.ARCHITECTURES)}"
        )
    return models.build(arch, sobel == "sobel", seed=derive_seed(seed, "weights")).eval()


def init_weights(net: Network, path: str | Path) -> None:
    """Take the weights of a file for everything but the head (`--init`); optimisers in it are ignored.

    Raises UserError when the file's arch or Sobel is not net's.
    """
    arch, weights = model_weights(checkpoint.read(path), path)
    sobel = has_sobel(weights)
    if arch != net.arch or sobel != (net.sobel is not None):
        raise UserError(
            f"--init {path}: holds {arch} {'with' if sobel else 'without'} Sobel, the run is {net.arch} "
            f"{'with' if net.sobel is not None else 'without'} Sobel; change --arch or --sobel"
        )
    heads = (*HEADS, "projection_head.")
    own = {name: value for name, value in net.state_dict().items() if name.startswith(heads)}
    body = {name: value for name, value in weights.items() if not name.startswith(heads)}
    load_weights(net, body | own, path)


def body_state(net: Network) -> dict[str, torch.Tensor]:
    """The weights of net without its head."""
    return {name: value for name, value in net.state_dict().items() if not name.startswith(HEADS)}
