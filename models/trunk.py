"""What AlexNet and VGG-16 share: Sobel in front, initialisation, the one walk through the layers, the head.

Parameter names are the public contract of every released checkpoint: `sobel.0`, `sobel.1`, `features.<i>`,
`classifier.<i>`, `top_layer`.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

FEATURE = "fc7.pre"  # what is clustered: the second 4096-unit layer before its last ReLU
FEATURE_DIM = 4096
HEAD_STD = 0.01  # weights of the head and of every linear layer: N(0, 0.01), bias 0


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


class DeepClusterNet(nn.Module):
    """Sobel (optional), convolutional trunk, two 4096-unit layers and a head with one output per cluster.

    features: layers in the order conv, batch norm, ReLU, pool; classifier: dropout, linear, ReLU, ...;
    map_size: side of the map that the classifier expects (6 for AlexNet, 7 for VGG-16). The pooled
    activation is brought to that size adaptively, which is the identity for 224-pixel inputs, so that any
    input size works.
    """

    def __init__(
        self,
        arch: str,
        features: list[nn.Module],
        classifier: list[nn.Module],
        map_size: int,
        sobel: bool,
        num_clusters: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.arch = arch
        self.sobel = make_sobel() if sobel else None
        self.features = nn.Sequential(*features)
        self.adapt = nn.AdaptiveAvgPool2d(map_size)  # no parameters, so no names in a checkpoint
        self.classifier = nn.Sequential(*classifier)
        self.top_layer: nn.Linear | None = None
        initialise(self, seed)
        if num_clusters is not None:
            self.set_head(num_clusters, seed)

    @property
    def num_convs(self) -> int:
        """Convolutions of the trunk: 5 for AlexNet, 13 for VGG-16."""
        return sum(isinstance(layer, nn.Conv2d) for layer in self.features)

    @property
    def feature_dim(self) -> int:
        """Units of the layer that is clustered, 4096 in both networks of the paper."""
        return [layer for layer in self.classifier if isinstance(layer, nn.Linear)][-1].out_features

    @property
    def activation_names(self) -> list[str]:
        """Every name that `activations` knows, in the order of the forward pass."""
        return [name for name, _ in self.walk() if name]

    def set_head(self, num_clusters: int, seed: int | None = None) -> None:
        """Put a fresh head in place: weights N(0, 0.01), bias 0, one output per cluster.

        seed fixes the draw whatever happened before; None draws from torch's global state.
        """
        parameter = next(self.classifier.parameters())
        head = nn.Linear(self.feature_dim, num_clusters)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, HEAD_STD, generator=generator)
            head.bias.zero_()
        self.top_layer = head.to(parameter.device)

    def walk(self) -> Iterator[tuple[str | None, nn.Module]]:
        """The one traversal of the layers: (name of the activation after this layer or None, layer)."""
        if self.sobel is not None:
            yield "sobel", self.sobel
        conv = 0
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                conv += 1
            if isinstance(layer, nn.BatchNorm2d | nn.Identity):  # Identity: folded into the convolution
                yield f"conv{conv}.pre", layer
            elif isinstance(layer, nn.ReLU):
                yield f"conv{conv}", layer
            else:
                yield None, layer
        yield None, self.adapt
        yield "pool", nn.Flatten()
        linear = 5
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                linear += 1
                yield f"fc{linear}.pre", layer
            elif isinstance(layer, nn.ReLU):
                yield f"fc{linear}", layer
            else:
                yield None, layer
        if self.top_layer is not None:
            yield "logits", self.top_layer

    def activations(self, x: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Named activations of normalised images x (B, 3, H, W) in one forward pass that stops at the last.

        Names: `conv<n>` (after the ReLU), `conv<n>.pre` (after batch norm, before the ReLU), `pool` (what
        the classifier sees, flat), `fc6`, `fc7`, `fc6.pre`, `fc7.pre` (4096 units; `.pre`: before the ReLU),
        `logits`, `sobel`. Raises KeyError for a name that this net lacks.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, k), or fc7 (B, 4096) where there is no head."""
        last = "logits" if self.top_layer is not None else "fc7"
        return self.activations(x, [last])[last]


def initialise(model: nn.Module, seed: int | None = None) -> None:
    """Conv weights N(0, sqrt(2 / (kh * kw * out))), linear N(0, 0.01), all biases 0; batch norm 1 and 0.

    The fixed Sobel convolutions (no gradient) are left as they are.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
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


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    """A convolution followed by batch norm and ReLU, as every convolution of both networks is."""
    conv = nn.Conv2d(inputs, outputs, kernel_size=kernel, stride=stride, padding=padding)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]  # not in place: `conv<n>.pre` may be handed out


class Pool(nn.MaxPool2d):
    """Max pooling whose window shrinks to a map that is smaller than it, so that small images pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = min(self.kernel_size, x.shape[-2], x.shape[-1])
        return nn.functional.max_pool2d(x, window, self.stride)
