"""Faster R-CNN by torchvision on a trained network: Ren et al., 'Faster R-CNN', NeurIPS 2015.

    fpn    ResNets: a feature pyramid on layer1 to layer4, two new linear layers on its regions
    c4     ResNets: regions of layer3, on which layer4 stands as it was trained
    fc     any network with a vector behind its maps: regions of the last map, pooled to the size that AlexNet
           and VGG-16 have there, on which fc6 and fc7 stand as they were trained, dropout included (Girshick,
           'Fast R-CNN', ICCV 2015)

Settings that are not named here are torchvision's defaults.
"""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_pool
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from evaluation.transfer import Trunk, keep_statistics
from models.network import Network
from util import UserError

PYRAMID = ("layer1", "layer2", "layer3", "layer4")
PYRAMID_CHANNELS = 256
ANCHORS = ((32, 64, 128, 256, 512),)  # sides in pixels, on a single map
RATIOS = ((0.5, 1.0, 2.0),)  # height / width of the anchors
C4_REGION = 14  # side of a region on layer3; layer4 halves it
REGION = 7  # side of a region, of networks that do not ask for another

Boxes = dict[str, torch.Tensor]  # boxes (n, 4) float32, labels (n,) int64 from 1, scores (n,) if found


class Detector(nn.Module):
    """A detector of `classes` classes on net, whose weights it goes on with; the rest is drawn from seed.

    freeze: what all regions share does not train; a box head that net brings along (fc6-7, layer4) does.
    Batch norms of net use and keep their statistics while the detector trains.
    """

    def __init__(self, net: Network, head: str, classes: int, freeze: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rcnn = HEADS[head](net, classes + 1, freeze)
        self.rcnn.transform = Given(1, 1, [0.0] * 3, [1.0] * 3)
        self.rcnn.rpn.head = InFloat32(self.rcnn.rpn.head)
        self.rcnn.roi_heads.box_predictor = InFloat32(self.rcnn.roi_heads.box_predictor)
        self.head = head

    @property
    def net(self) -> Network:
        """The network at the bottom."""
        return self.rcnn.backbone.net

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        keep_statistics(self.net)
        return self

    def forward(
        self, x: torch.Tensor, sizes: list[tuple[int, int]], targets: list[Boxes] | None = None
    ) -> dict[str, torch.Tensor] | list[Boxes]:
        """In training losses, each the mean over the images; else what is found in each, the best first.

        x (B, 3, H, W): normalised images, each of its own size (height, width) and filled up. Boxes are in
        pixels of the images as they are in x.
        """
        if not len(x):  # a rank without images, which has its part in the sum of gradients all the same
            return {"none": sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)}
        return self.rcnn([image[:, :h, :w] for image, (h, w) in zip(x, sizes)], targets)


class Given(GeneralizedRCNNTransform):
    """Fills images up to one size and does nothing else: they come normalised and resized."""

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def resize(self, image: torch.Tensor, target: Boxes | None = None) -> tuple[torch.Tensor, Boxes | None]:
        return image, target


class InFloat32(nn.Module):
    """What a head gives, in float32: under autocast boxes would be known to some pixels only."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> tuple:
        return tuple(
            part.float() if isinstance(part, torch.Tensor) else [level.float() for level in part]
            for part in self.head(x)
        )


class Pyramid(Trunk):
    """The trunk's maps as a feature pyramid: Lin et al., 'Feature Pyramid Networks', CVPR 2017."""

    def __init__(self, net: Network, maps: dict[str, str], freeze: bool) -> None:
        super().__init__(net, maps, freeze)
        self.fpn = FeaturePyramidNetwork(self.channels, PYRAMID_CHANNELS, LastLevelMaxPool())

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return self.fpn(super().forward(x))


class RegionPool(nn.Module):
    """Max pooling of regions of the one map to size x size, as Fast R-CNN's."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(
        self, maps: dict[str, torch.Tensor], boxes: list[torch.Tensor], _: list[tuple[int, int]]
    ) -> torch.Tensor:
        return roi_pool(maps["0"], boxes, self.size, 1 / self.stride)


class RegionDropout(nn.Dropout):
    """Dropout over regions. Of several ranks each draws for its own, whatever number it has."""


def on_pyramid(net: Network, outputs: int, freeze: bool) -> FasterRCNN:
    need_stages(net, "fpn")
    trunk = Pyramid(net, {name: str(i) for i, name in enumerate(PYRAMID)}, freeze)
    trunk.out_channels = PYRAMID_CHANNELS
    return FasterRCNN(trunk, outputs)


def on_layer3(net: Network, outputs: int, freeze: bool) -> FasterRCNN:
    need_stages(net, "c4")
    trunk = Trunk(net, {"layer3": "0"}, freeze)
    _, stage = net.split("layer3")
    return on_one_map(trunk, stage, outputs, MultiScaleRoIAlign(["0"], C4_REGION, sampling_ratio=2))


def on_last_map(net: Network, outputs: int, freeze: bool) -> FasterRCNN:
    trunk = Trunk(net, {net.maps[-1]: "0"}, freeze)
    rest = nn.Sequential(*net.parts()[1])
    for module in list(rest.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Dropout:
                setattr(module, name, RegionDropout(layer.p))
    size = getattr(rest[0], "output_size", 1)  # of AlexNet and VGG-16, that of the map which fc6 expects
    return on_one_map(trunk, rest, outputs, RegionPool(size if size > 1 else REGION, trunk.strides[0]))


def on_one_map(trunk: Trunk, box_head: nn.Module, outputs: int, pool: nn.Module) -> FasterRCNN:
    """Anchors of all sizes on a single map, and on its regions layers that net brings along."""
    (trunk.out_channels,) = trunk.channels
    predictor = FastRCNNPredictor(trunk.net.feature_dim, outputs)
    anchors = AnchorGenerator(ANCHORS, RATIOS)
    rcnn = FasterRCNN(trunk, rpn_anchor_generator=anchors, box_head=box_head, box_predictor=predictor)
    rcnn.roi_heads.box_roi_pool = pool
    return rcnn


def need_stages(net: Network, head: str) -> None:
    if not set(PYRAMID) <= set(net.maps):
        raise UserError(f"--head {head}: is for ResNets, and {net.arch} is none; take --head fc")


HEADS = {"fpn": on_pyramid, "c4": on_layer3, "fc": on_last_map}


def usual_head(net: Network) -> str:
    """The head for a network that none was asked for: fpn for ResNets, fc for others."""
    return "fpn" if set(PYRAMID) <= set(net.maps) else "fc"
