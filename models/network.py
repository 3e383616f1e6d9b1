"""One class of networks: Sobel in front, layers with named activations, a feature, a head.

An architecture is a function that names its layers (models/alexnet.py, models/resnet.py); everything that
evaluates, extracts or draws asks a network for `arch`, `feature`, `maps`, `activations` and `parts` only.
Parameter names are the public contract of every released checkpoint: the children of `layers` are children
of the network, under their own names, beside `sobel.0`, `sobel.1` and `top_layer`.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.heads import Embedded, Normalise, Prototypes, build_prototypes, projection
from models.inputs import Inputs

HEAD_STD = 0.01  # weights of the head and of every linear layer of AlexNet and VGG-16: N(0, 0.01), bias 0


def make_sobel() -> nn.Sequential:
    """Grey (mean of the three channels), then the two Sobel gradients: (B, 3, H, W) -> (B, 2, H, W).

    Fixed: no gradient, biases stay 0.
    """
    grey = nn.Conv2d(3, 1, kernel_size=1)
    gradient = nn.Conv2d(1, 2, kernel_size=3, padding=1)
    with torch.no_grad():
        grey.weight.fill_(1.0 / 3.0)
        gradient.weight[0, 0] = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        gradient.weight[1, 0] = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
        grey.bias.zero_()
        gradient.bias.zero_()
    sobel = nn.Sequential(grey, gradient)
    sobel.requires_grad_(False)
    return sobel


class Network(nn.Module):
    """Sobel (optional), convolutions, what stands on them, and a head with one output per cluster.

    arch: the name under which it is built. layers: child modules by name, in the order of the forward pass; a
    Sequential among them is walked layer by layer. taps: path of a layer, such as "features.2" -> name of the
    activation behind it. maps: the names of the feature maps, the shallowest first; feature: what is
    clustered, and output: what the network gives without a head, both vectors of feature_dim numbers. convs:
    how many of the children are convolutions.

    inputs: what it was trained to see; weights that are loaded bring theirs.
    """

    def __init__(
        self,
        arch: str,
        layers: dict[str, nn.Module],
        taps: dict[str, str],
        *,
        maps: list[str],
        feature: str,
        output: str,
        feature_dim: int,
        convs: int,
        sobel: bool = False,
    ) -> None:
        super().__init__()
        self.arch, self.taps, self.maps = arch, taps, maps
        self.inputs = Inputs()
        self.feature, self.output, self.feature_dim = feature, output, feature_dim
        self.names = list(layers)
        self.convs = self.names[:convs]
        self.sobel = make_sobel() if sobel else None
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.top_layer: nn.Linear | None = None
        self.projection_head: nn.Module | None = None
        self.prototypes: Prototypes | None = None

    def __str__(self) -> str:
        return f"{self.arch}{' with Sobel' if self.sobel is not None else ''}"

    @property
    def activation_names(self) -> list[str]:
        """Every name that `activations` knows, in the order of the forward pass."""
        return [name for name, _ in self.walk() if name]

    def set_head(self, outputs: int, seed: int | None = None) -> None:
        """Put a fresh head in place: weights N(0, 0.01), bias 0, one output per cluster.

        seed fixes the draw whatever happened before; None draws from torch's global state.
        """
        device = next(self.body_parameters()).device
        head = nn.Linear(self.feature_dim, outputs)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, HEAD_STD, generator=generator)
            head.bias.zero_()
        self.top_layer, self.projection_head, self.prototypes = head.to(device), None, None

    def set_embedding(
        self, hidden: int, dim: int, prototypes: int | Sequence[int] | None, seed: int | None = None
    ) -> None:
        """Put a projection head and prototypes in place: output -> embedding of norm 1 -> scores.

        hidden: units of the head's inner layer, 0: a single linear layer; dim: numbers of an embedding;
        prototypes: how many, a list for several sets of them, None for none.
        """
        device = next(self.body_parameters()).device
        self.top_layer = None
        self.projection_head = projection(self.feature_dim, hidden, dim, seed).to(device)
        self.prototypes = None if prototypes is None else build_prototypes(dim, prototypes, seed).to(device)

    def body_parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains, but the head of clusters or the prototypes."""
        for name in [*self.names, "projection_head"]:
            module = getattr(self, name)
            yield from (p for p in module.parameters() if p.requires_grad) if module is not None else ()

    def parts(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The convolutions, and what stands on them without the head: what VOC freezes, what it renews."""
        rest = self.names[len(self.convs) :]
        return tuple(nn.ModuleList(getattr(self, name) for name in names) for names in (self.convs, rest))

    def split(self, name: str) -> tuple[nn.Sequential, nn.Sequential]:
        """The layers up to an activation, and those behind it up to `output`; they are this net's own."""
        layers = list(self.walk())
        names = [found for found, _ in layers]
        at, end = names.index(name) + 1, names.index(self.output) + 1
        return tuple(nn.Sequential(*[layer for _, layer in part]) for part in (layers[:at], layers[at:end]))

    def walk(self) -> Iterator[tuple[str | None, nn.Module]]:
        """The one traversal of the layers: (name of the activation after this layer or None, layer)."""
        if self.sobel is not None:
            yield "sobel", self.sobel
        for name in self.names:
            yield from self._leaves(name, getattr(self, name))
        if self.projection_head is not None:
            yield None, self.projection_head
            yield "embedding", Normalise()
        if self.prototypes is not None:
            yield "scores", self.prototypes
        if self.top_layer is not None:
            yield "logits", self.top_layer

    def _leaves(self, path: str, layer: nn.Module) -> Iterator[tuple[str | None, nn.Module]]:
        if isinstance(layer, nn.Sequential):
            for name, inner in layer.named_children():
                yield from self._leaves(f"{path}.{name}", inner)
        else:
            yield self.taps.get(path), layer

    def activations(self, x: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Named activations of normalised images x (B, 3, H, W) in one forward pass that stops at the last.

        Names: those of `maps` (after the ReLU), `feature`, `output`, `logits`, `sobel`, and what else
        `activation_names` lists; `.pre` is before the ReLU. Raises KeyError for a name that this net lacks.
        """
        missing = set(names)
        found = {}
        for name, layer in self.walk():
            x = layer(x)
            if name in missing:
                found[name] = x
                missing.remove(name)
            if not missing:
                return found
        raise KeyError(f"{self.arch} has no activation {sorted(missing)[0]!r}")

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | Embedded:
        """Normalised images (B, 3, H, W) -> logits (B, k), or `output` where there is no head.

        Crops, a list of V tensors (B, 3, S_v, S_v) -> (embeddings (V * B, dim), scores (V * B, k) for each
        set of prototypes), crop-major. Crops of one size that stand next to each other go through the
        convolutions as one batch, all of them through the projection head.
        """
        if not isinstance(x, list):
            last = "logits" if self.top_layer is not None else self.output
            return self.activations(x, [last])[last]
        sizes = groupby(x, key=lambda crops: crops.shape[-2:])
        outputs = [self.activations(torch.cat(list(g)), [self.output])[self.output] for _, g in sizes]
        z = Normalise()(self.projection_head(torch.cat(outputs)))
        return z, self.prototypes(z) if self.prototypes is not None else []

    def folded(self) -> "Network":
        """A view of this net, which is in eval mode, in which convolutions carry their batch norm.

        Folded convolutions are copies, everything else is shared. Equal to the net in eval mode up to float32
        rounding.
        """
        return _fold(self)


def _fold(module: nn.Module) -> nn.Module:
    """module with each batch norm that is registered right behind a convolution folded into that."""
    children = {name: child if child is None else _fold(child) for name, child in module._modules.items()}
    before = None
    for name, child in children.items():
        norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        if norm and isinstance(children.get(before), nn.Conv2d):
            children[before] = fuse_conv_bn_eval(children[before], child)
            children[name] = nn.Identity()
        before = name
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    folded = copy.copy(module)
    folded._modules = children
    return folded


def initialise(net: nn.Module, seed: int | None = None) -> None:
    """Conv weights N(0, sqrt(2 / (kh * kw * out))), linear N(0, 0.01), all biases 0; batch norm 1 and 0.

    As AlexNet and VGG-16 start. The fixed Sobel convolutions (no gradient) are left as they are.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
                height, width = module.kernel_size
                std = math.sqrt(2.0 / (height * width * module.out_channels))
                module.weight.normal_(0.0, std, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0.0, HEAD_STD, generator=generator)
                module.bias.zero_()


def renew_linears(module: nn.Module, bias: float, seed: int) -> None:
    """Linear layers start anew: N(0, 0.01), every bias the same; what networks of flat layers are given."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, HEAD_STD, generator=generator)
                if layer.bias is not None:
                    layer.bias.fill_(bias)


class Pool(nn.MaxPool2d):
    """Max pooling whose window shrinks to a map that is smaller than it, so that small images pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = min(self.kernel_size, x.shape[-2], x.shape[-1])
        return nn.functional.max_pool2d(x, window, self.stride)
