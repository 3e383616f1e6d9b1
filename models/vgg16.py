"""VGG-16, configuration D, with batch normalisation; DeeperCluster's geometry of it, and that one folded."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from models.flat import conv_block, flat
from models.network import Network, Pool, initialise
from util import UserError

MAP_SIZE = 7  # 512 x 7 x 7 at 224 pixels
UNITS = 4096
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def build(sobel: bool = False, seed: int | None = None, wide: bool = False) -> Network:
    """VGG-16: five blocks of 3x3 convolutions, a 2/2 max pool after each; dropout between the linears.

    wide: the image is padded by 2 in front of all, so that maps are 226 x 226 and smaller: the geometry in
    which DeeperCluster's networks were trained, whose Sobel and first convolution fold into one exactly. Its
    linear layers start as PyTorch's do, uniform in +- 1 / sqrt(inputs).
    """
    features: list[nn.Module] = []
    channels = 2 if sobel else 3
    for block in BLOCKS:
        for width in block:
            features += conv_block(channels, width, kernel=3, padding=1)
            channels = width
        features.append(Pool(kernel_size=2, stride=2))
    classifier = [
        nn.Linear(channels * MAP_SIZE * MAP_SIZE, UNITS),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(UNITS, UNITS),
        nn.ReLU(),
    ]
    net = flat("vgg16wide" if wide else "vgg16", features, classifier, MAP_SIZE, sobel, seed)
    if wide and sobel:
        net.sobel[0].padding, net.sobel[1].padding = (2, 2), (0, 0)
    elif wide:
        net.features[0].padding = (2, 2)
    if wide:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            for layer in net.classifier:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
    return net


FOLDED = "vgg16folded"


def folded_vgg16(sobel: bool = False, seed: int | None = None) -> Network:
    """What `fold_sobel` makes of a vgg16wide with Sobel: colour in, a first convolution of 5 x 5.

    Freshly drawn, everything but conv1 starts as that of a vgg16wide does. Raises UserError for sobel.
    """
    if sobel:
        raise UserError(f"{FOLDED}: holds Sobel in its first convolution, it takes none in front")
    net = build(sobel=False, seed=seed, wide=True)
    net.arch = FOLDED
    net.features[0] = _first(net.features[0].out_channels)
    initialise(net.features[0], seed)
    return net


def _first(channels: int) -> nn.Conv2d:
    """The folded first convolution: it pads by 3, two for the wide geometry and one of conv1's own."""
    return nn.Conv2d(3, channels, 5, padding=3)


def fold_sobel(net: Network) -> Network:
    """net, a vgg16wide with Sobel, as a vgg16folded: grey, Sobel and conv1 are one 5 x 5 convolution.

    Exact, also at the border, where the wide geometry has the zeros that conv1 is padded with: Caron et al.,
    ICCV 2019, section 4, 'pre-training for ImageNet'. Everything but conv1 is shared with net.
    """
    if not folds(net):
        raise ValueError(f"{net}: only a vgg16wide with Sobel can be folded")
    grey, sobel = net.sobel[0].weight, net.sobel[1].weight  # (1, 3, 1, 1), (2, 1, 3, 3)
    old = net.features[0]
    # W5[o, ch, p + r, q + s] = grey[ch] * sum over g of W1[o, g, p, q] * sobel[g, r, s]: a full convolution.
    both = F.conv2d(old.weight, sobel.flip(2, 3).transpose(0, 1), padding=2)  # (64, 1, 5, 5)
    new = _first(old.out_channels)
    with torch.no_grad():
        new.weight.copy_(both * grey.view(1, 3, 1, 1))
        new.bias.copy_(old.bias)
    folded = copy.copy(net)
    folded.arch = FOLDED
    folded._modules = dict(net._modules) | {"sobel": None}
    features = nn.Sequential(new.to(old.weight.device), *list(net.features)[1:])
    folded.features = features.train(net.training)
    return folded


def folds(net: Network) -> bool:
    """Whether Sobel and the first convolution of net are one convolution exactly, borders included."""
    return net.arch == "vgg16wide" and net.sobel is not None
