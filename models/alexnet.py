"""AlexNet with batch normalisation and without local response normalisation."""

from torch import nn

from models.trunk import FEATURE_DIM, DeepClusterNet, Pool, conv_block

MAP_SIZE = 6  # 256 x 6 x 6 at 224 pixels


def alexnet(sobel: bool, num_clusters: int | None = None, seed: int | None = None) -> DeepClusterNet:
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
        nn.Linear(256 * MAP_SIZE * MAP_SIZE, FEATURE_DIM),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(FEATURE_DIM, FEATURE_DIM),
        nn.ReLU(),
    ]
    return DeepClusterNet("alexnet", features, classifier, MAP_SIZE, sobel, num_clusters, seed)
