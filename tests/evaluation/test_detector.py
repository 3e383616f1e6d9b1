"""evaluation/detector.py: what stands on the network, what trains, one normalisation."""

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

import models
from data import to_input
from evaluation.detector import Detector, usual_head
from models.weights import load
from tests.helpers import refuses

CPU = torch.device("cpu")
TARGET = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 44.0]]), "labels": torch.tensor([2])}


def detector_of(arch: str, head: str = "fc", freeze: bool = False, sobel: bool = False) -> Detector:
    """With few regions, so that it is quick."""
    detector = Detector(models.build(arch, sobel, seed=1), head, classes=3, freeze=freeze, seed=5)
    detector.rcnn.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    detector.rcnn.roi_heads.fg_bg_sampler.batch_size_per_image = 8
    return detector


def images(*sizes: tuple[int, int], fill: float = 0.0) -> torch.Tensor:
    """Normalised noise of these sizes, filled up to the largest."""
    height, width = (max(side) for side in zip(*sizes))
    x = torch.full((len(sizes), 3, height, width), fill)
    for i, (h, w) in enumerate(sizes):
        x[i, :, :h, :w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(i))
    return x


def test_alexnets_regions_are_judged_by_its_own_fc6_and_fc7():
    net = load("random:alexnet", seed=3)
    before = [value.clone() for value in net.parts()[1].state_dict().values()]
    pool = torch.randn(2, 256, 6, 6, generator=torch.Generator().manual_seed(0)).relu()
    fc6, fc7 = (layer for layer in net.parts()[1].modules() if isinstance(layer, nn.Linear))
    expected = fc7(fc6(pool.flatten(1)).relu()).relu()
    detector = Detector(net, "fc", classes=20, freeze=True, seed=1).eval()
    heads = detector.rcnn.roi_heads
    assert torch.equal(heads.box_head(pool), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, heads.box_head.state_dict().values()))
    assert all(p.requires_grad for p in heads.box_head.parameters())
    assert heads.box_roi_pool.size == 6 and heads.box_roi_pool.stride == 16
    assert heads.box_predictor.head.cls_score.weight.shape == (21, 4096)


def test_region_pooling_takes_the_largest_value_of_each_part():
    pool = detector_of("tiny").rcnn.roi_heads.box_roi_pool
    assert (pool.size, pool.stride) == (2, 4)
    maps = {"0": torch.arange(64.0).view(1, 1, 8, 8)}
    found = pool(maps, [torch.tensor([[0.0, 0.0, 12.0, 12.0]])], [(32, 32)])  # rows and columns 0 to 3
    assert found.tolist() == [[[[9, 11], [25, 27]]]]


def test_layer4_stands_on_regions_of_layer3():
    net = models.build("resnet18s", seed=1).eval()
    region = torch.randn(2, 256, 14, 14, generator=torch.Generator().manual_seed(0))
    expected = net.layer4(region).mean((2, 3))
    detector = Detector(net, "c4", classes=3, freeze=True, seed=1).eval()
    assert torch.allclose(detector.rcnn.roi_heads.box_head(region), expected, atol=1e-5)
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"layer4"}


def test_pyramid_stands_on_four_stages():
    detector = detector_of("resnet18s", "fpn", freeze=True).eval()
    maps = detector.rcnn.backbone(images((32, 32)))
    assert [tuple(value.shape[1:]) for value in maps.values()] == [(256, s, s) for s in (32, 16, 8, 4, 2)]
    assert not any(p.requires_grad for p in detector.net.parameters())
    assert all(p.requires_grad for p in detector.rcnn.backbone.fpn.parameters())
    (found,) = detector(images((32, 32)), [(32, 32)])
    assert found.keys() == {"boxes", "labels", "scores"}


def test_head_is_chosen_by_the_network_and_refused_where_it_does_not_fit():
    assert [usual_head(models.build(arch)) for arch in ("resnet18s", "tiny", "toy")] == ["fpn", "fc", "fc"]
    for head in ("fpn", "c4"):
        with refuses(f"--head {head}: is for ResNets, and tiny is none; take --head fc"):
            detector_of("tiny", head)


@pytest.mark.parametrize("arch", ["tiny", "toy", "resnet18s"])
@pytest.mark.parametrize("freeze", [False, True])
def test_one_step_moves_what_trains_and_no_statistics(arch, freeze):
    detector = detector_of(arch, freeze=freeze, sobel=True).train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    losses = detector(images((48, 64), (48, 48)), [(48, 64), (48, 48)], [TARGET, TARGET])
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
    optimizer.step()
    moved = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    convolutions = {
        f"rcnn.backbone.net.{name}"
        for name, module in detector.net.named_modules()
        if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm)
    }
    of_trunk = {name for name in moved if name.rpartition(".")[0] in convolutions}
    assert bool(of_trunk) != freeze
    assert not any("running" in name or "sobel" in name or "num_batches" in name for name in moved)
    assert {"rcnn.rpn.head.head.cls_logits.weight"} <= moved


def test_batch_norms_use_their_statistics_and_dropout_is_on_while_it_trains():
    detector = detector_of("tiny").train()
    x = images((48, 48), (48, 48))
    alone, both = detector.rcnn.backbone(x[:1])["0"], detector.rcnn.backbone(x)["0"]
    assert torch.allclose(alone[0], both[0], atol=1e-5)
    head = detector.rcnn.roi_heads.box_head
    regions = torch.randn(64, 12, 2, 2, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(head(regions), head(regions))
    head.eval()
    assert torch.equal(head(regions), head(regions))


def test_images_are_normalised_once_and_filled_up_with_zeros():
    detector = detector_of("tiny").eval()
    seen = []
    detector.rcnn.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    views = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    x = to_input(views, CPU)
    detector(x, [(40, 50)])
    assert seen[0].shape == (1, 3, 64, 64)
    assert torch.equal(seen[0][..., :40, :50], x)
    assert not seen[0][..., 40:, :].any() and not seen[0][..., 50:].any()


def test_what_fills_an_image_up_does_not_count():
    detector = detector_of("tiny").eval()
    sizes = [(40, 48), (64, 64)]
    a, b = (detector(images(*sizes, fill=fill), sizes) for fill in (0.0, 9.0))
    assert len(a[0]["boxes"]) and all(torch.equal(a[i][key], b[i][key]) for i in (0, 1) for key in a[i])
    assert (a[0]["boxes"][:, 3] <= 40).all() and (a[0]["boxes"][:, 2] <= 48).all()


def test_the_rest_is_drawn_from_the_seed():
    first, second = (detector_of("tiny").state_dict() for _ in range(2))
    other = Detector(models.build("tiny", seed=1), "fc", 3, False, seed=6).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    name = "rcnn.rpn.head.head.conv.0.0.weight"
    assert not torch.equal(first[name], other[name])


def test_a_rank_without_images_adds_nothing_to_the_gradients():
    detector = detector_of("tiny", freeze=True).train()
    loss = sum(detector(torch.zeros(0, 3, 48, 48), [], []).values())
    loss.backward()
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert loss.item() == 0 and all(p.grad is not None and not p.grad.any() for p in trained)


def test_it_learns_to_find_a_box():
    detector = detector_of("tiny").train()
    x, sizes = images((64, 64)), [(64, 64)]
    x[0, :, 6:44, 4:40] += 3
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        sum(detector(x, sizes, [TARGET]).values()).backward()
        optimizer.step()
    (found,) = detector.eval()(x, sizes)
    assert found["labels"][0] == 2 and box_iou(found["boxes"][:1], TARGET["boxes"]).item() > 0.5
