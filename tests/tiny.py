"""A network of the same make as AlexNet, small enough for hundreds of runs, under the name `tiny`.

As a script it is main.py with that network: python -m tests.tiny DIR --arch tiny ...
"""

import os

from torch import nn

import clustering
import main
import models
from models.flat import conv_block, flat
from models.network import Network, Pool
from util import run_main


def tiny(sobel: bool = False, seed: int | None = None) -> Network:
    features = [
        *conv_block(2 if sobel else 3, 8, kernel=5, stride=2, padding=2),
        Pool(kernel_size=3, stride=2),
        *conv_block(8, 12, kernel=3, padding=1),
        Pool(kernel_size=3, stride=2),
    ]
    classifier = [
        nn.Dropout(0.5),
        nn.Linear(12 * 4, 40),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(40, 40),
        nn.ReLU(),
    ]
    return flat("tiny", features, classifier, 2, sobel, seed)


def register() -> None:
    models.ARCHITECTURES["tiny"] = tiny


if __name__ == "__main__":
    register()
    if os.environ.get("WHITEN_ALL"):  # as version 0.1 did (tests/golden.py --v1)
        clustering.most_dimensions = lambda images: images
    run_main(main.main, main.get_parser().parse_args())
