"""VGG-16, configuration D, with batch normalisation; and DeeperCluster's geometry of it."""

from torch import nn

from models.flat import conv_block, flat
from models.network import Network, Pool

MAP_SIZE = 7  # 512 x 7 x 7 at 224 pixels
UNITS = 4096
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def build(sobel: bool = False, seed: int | None = None, wide: bool = False) -> Network:
    """VGG-16: five blocks of 3x3 convolutions, a 2/2 max pool after each; dropout between the linears.

    wide: the image is padded by 2 in front of all, so that maps are 226 x 226 and smaller: the geometry in
    which DeeperCluster's networks were trained, whose Sobel and first convolution fold into one exactly.
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
    return net
