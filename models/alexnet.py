"""AlexNet with batch normalisation and without local response normalisation."""

from torch import nn

from models.flat import conv_block, flat
from models.network import Network, Pool

MAP_SIZE = 6  # 256 x 6 x 6 at 224 pixels
UNITS = 4096


def build(sobel: bool = False, seed: int | None = None) -> Network:
    """AlexNet: convs 96-256-384-384-256, pools after conv 1, 2 and 5; dropout in front of both linears."""
    features = [
        *conv_block(2 if sobel else 3, 96, kernel=11, stride=4, padding=2),
        Pool(kernel_size=3, stride=2),
        *conv_block(96, 256, kernel=5, padding=2),
        Pool(kernel_size=3, stride=2),
        *conv_block(256, 384, kernel=3, padding=1),
        *conv_block(384, 384, kernel=3, padding=1),
        *conv_block(384, 256, kernel=3, padding=1),
        Pool(kernel_size=3, stride=2),
    ]
    classifier = [
        nn.Dropout(0.5),
        nn.Linear(256 * MAP_SIZE * MAP_SIZE, UNITS),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(UNITS, UNITS),
        nn.ReLU(),
    ]
    return flat("alexnet", features, classifier, MAP_SIZE, sobel, seed)
