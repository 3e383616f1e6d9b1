"""A backbone unlike AlexNet and ResNets, in one file and one name: `toy`.

Three convolutions of which two are named, group norm, a smooth activation, one vector. Whatever takes a
network has to work with it.

As a script it is main.py with that network: python -m tests.toy DIR --arch toy ...
"""

import torch
from torch import nn

import models
from models.network import Network
from models.resnet import initialise


def toy(sobel: bool = False, seed: int | None = None) -> Network:
    layers = {
        "one": nn.Conv2d(2 if sobel else 3, 8, 3, stride=2, padding=1, bias=False),
        "norm": nn.GroupNorm(2, 8),
        "gelu": nn.GELU(),
        "body": nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.GELU(),
            nn.Conv2d(12, 20, 1, bias=False),
            nn.GELU(),
        ),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "mix": nn.Linear(20, 24),
    }
    net = Network(
        "toy",
        layers,
        {"gelu": "a", "body.4": "b", "mix": "pooled"},
        maps=["a", "b"],
        feature="pooled",
        output="pooled",
        feature_dim=24,
        convs=4,
        sobel=sobel,
    )
    convolutions, rest = net.parts()
    initialise(convolutions, seed)
    initialise_rest(rest, seed)
    return net


def initialise_rest(rest: nn.Module, seed: int | None) -> None:
    """The linear layer small, so that the feature is small as well; drawn from seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in rest.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2, generator=generator)
            nn.init.zeros_(module.bias)


def register() -> None:
    models.ARCHITECTURES["toy"] = toy


if __name__ == "__main__":
    import main
    from util import run_main

    register()
    run_main(main.main, main.get_parser().parse_args())
