"""What AlexNet and VGG-16 share: numbered layers `features.<i>` and `classifier.<i>`, and their names.

Activations: `conv<n>` (after the ReLU), `conv<n>.pre` (after batch norm, before the ReLU), `pool` (what the
classifier sees, flat), `fc6.pre`, `fc6`, `fc7.pre`, `fc7`.
"""

from torch import nn

from models.network import Network, initialise
from models.norm import BatchNorm2d


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> list[nn.Module]:
    """A convolution followed by batch norm and ReLU, as every convolution of both networks is."""
    conv = nn.Conv2d(inputs, outputs, kernel_size=kernel, stride=stride, padding=padding)
    return [conv, BatchNorm2d(outputs), nn.ReLU()]  # not in place: `conv<n>.pre` may be handed out


def flat(
    arch: str,
    features: list[nn.Module],
    classifier: list[nn.Module],
    map_size: int,
    sobel: bool,
    seed: int | None = None,
) -> Network:
    """A network of numbered layers, freshly initialised.

    features: conv, batch norm, ReLU, pool, ...; classifier: linears, ReLUs, dropout; map_size: side of the
    map that the classifier expects. The pooled activation is brought to that size adaptively, which is the
    identity for 224-pixel inputs, so that any input size works.
    """
    linears = [layer for layer in classifier if isinstance(layer, nn.Linear)]
    maps = [f"conv{n + 1}" for n in range(sum(isinstance(layer, nn.Conv2d) for layer in features))]
    last = f"fc{5 + len(linears)}"
    net = Network(
        arch,
        {
            "features": nn.Sequential(*features),
            "adapt": nn.AdaptiveAvgPool2d(map_size),  # no parameters, so no names in a checkpoint
            "flatten": nn.Flatten(),
            "classifier": nn.Sequential(*classifier),
        },
        name_layers(features, classifier),
        maps=maps,
        feature=f"{last}.pre",
        output=last,
        feature_dim=linears[-1].out_features,
        convs=1,
        sobel=sobel,
    )
    initialise(net, seed)
    return net


def name_layers(features: list[nn.Module], classifier: list[nn.Module]) -> dict[str, str]:
    """Path of a layer -> the name of the activation behind it."""
    taps, conv, linear = {"flatten": "pool"}, 0, 5
    for i, layer in enumerate(features):
        conv += isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.BatchNorm2d):
            taps[f"features.{i}"] = f"conv{conv}.pre"
        elif isinstance(layer, nn.ReLU):
            taps[f"features.{i}"] = f"conv{conv}"
    for i, layer in enumerate(classifier):
        linear += isinstance(layer, nn.Linear)
        if isinstance(layer, nn.Linear):
            taps[f"classifier.{i}"] = f"fc{linear}.pre"
        elif isinstance(layer, nn.ReLU):
            taps[f"classifier.{i}"] = f"fc{linear}"
    return taps
