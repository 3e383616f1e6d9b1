"""ResNet-50, also 2, 4 and 5 times as wide, and ResNet-18, by torchvision's blocks and names.

He et al., CVPR 2016; ResNet-50 with the stride in the 3 x 3 convolution ("v1.5"). ResNet-18 comes with a
small stem too, for images of 28 to 64 pixels: a 3 x 3 convolution of stride 1 and no max pooling.
Activations: `conv1` (after the ReLU), `layer1` to `layer4`, `avgpool` (the feature).
"""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.network import Network
from models.norm import BatchNorm2d


def resnet50(sobel: bool = False, seed: int | None = None, width: int = 1) -> Network:
    """ResNet-50; width: every layer has so many times the channels, also inside the bottlenecks."""
    name = "resnet50" if width == 1 else f"resnet50w{width}"
    return _resnet(name, Bottleneck, [3, 4, 6, 3], width, sobel, seed)


def resnet18(sobel: bool = False, seed: int | None = None, small: bool = False) -> Network:
    """ResNet-18; small: the stem for small images."""
    return _resnet("resnet18s" if small else "resnet18", BasicBlock, [2, 2, 2, 2], 1, sobel, seed, small)


def _resnet(
    arch: str,
    block: type[BasicBlock | Bottleneck],
    blocks: list[int],
    width: int,
    sobel: bool,
    seed: int | None,
    small: bool = False,
) -> Network:
    """Stages of `blocks` blocks each, of 64, 128, 256 and 512 channels times width, average pooled."""
    channels = 64 * width
    kernel, stride = (3, 1) if small else (7, 2)
    with torch.device("meta"):  # shapes alone: the weights are drawn below
        stem = {
            "conv1": nn.Conv2d(2 if sobel else 3, channels, kernel, stride, kernel // 2, bias=False),
            "bn1": BatchNorm2d(channels),
            "relu": nn.ReLU(),
        }
        if not small:
            stem["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
        stages = {}
        for i, count in enumerate(blocks):
            planes = 64 * width * 2**i
            stages[f"layer{i + 1}"] = _stage(block, channels, planes, count, stride=1 if i == 0 else 2)
            channels = planes * block.expansion
    net = Network(
        arch,
        {**stem, **stages, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()},
        {"bn1": "conv1.pre", "relu": "conv1", "flatten": "avgpool"}
        | {f"{name}.{count - 1}": name for name, count in zip(stages, blocks)},
        maps=["conv1", *stages],
        feature="avgpool",
        output="avgpool",
        feature_dim=channels,
        convs=len(stem) + len(stages),
        sobel=sobel,
    )
    convolutions, _ = net.parts()
    initialise(convolutions.to_empty(device=torch.empty(0).device), seed)  # the default one
    return net


def _stage(
    block: type[BasicBlock | Bottleneck], inputs: int, planes: int, count: int, stride: int
) -> nn.Sequential:
    """`count` blocks, the first of which brings stride and number of channels to those of the stage."""
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))
    first = block(inputs, planes, stride, shortcut, norm_layer=BatchNorm2d)
    return nn.Sequential(first, *[block(outputs, planes, norm_layer=BatchNorm2d) for _ in range(count - 1)])


def initialise(convolutions: nn.Module, seed: int | None) -> None:
    """Convolutions He normal (fan out, ReLU), batch norm 1 and 0."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in convolutions.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
