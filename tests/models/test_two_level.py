"""The worked example of DeeperCluster's loss, and what has to hold of its heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.two_level import SubClassifiers, SuperClassifier

LN2, LN3 = math.log(2), math.log(3)


def example():
    """Two super-classes of two sub-classes; two views."""
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    top = SuperClassifier(2, 2, bias=False)
    top.weight.data = torch.tensor([[LN3, 0.0], [0.0, LN2]])
    sub = SubClassifiers(2, 2, range(2), seed=0)
    sub.weight.data = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, LN3 / 2], [0.0, 0.0]]])
    sub.bias.data.zero_()
    return features, top, sub, torch.tensor([0, 1]), torch.tensor([1, 0])


def test_loss_and_gradients_computed_by_hand():
    features, top, sub, super_class, target = example()
    logits, handed_on = top(features)
    assert handed_on is features
    of_super = F.cross_entropy(logits, super_class, reduction="sum") / 2
    of_sub, hits = sub(features, super_class, target, scale=torch.tensor([2.0, 2.0]))
    of_sub = of_sub / 2
    assert of_super.item() == pytest.approx(0.255413, abs=1e-6)
    assert of_sub.item() == pytest.approx(0.490415, abs=1e-6)
    assert (of_super + of_sub).item() == pytest.approx(0.745827, abs=1e-6)
    (of_super + of_sub).backward()
    assert torch.allclose(top.weight.grad, torch.tensor([[-0.125, 0.2], [0.125, -0.2]]), atol=1e-6)
    own_means = torch.tensor([[[0.5, 0.0], [-0.5, 0.0]], [[0.0, -0.5], [0.0, 0.5]]])
    assert torch.allclose(sub.weight.grad, own_means, atol=1e-6)
    expected = torch.tensor([[-0.137327, 0.086643], [0.109861, -0.137978]])
    # The published example takes the views' features behind the ReLU, whose gradient these are.
    assert torch.allclose(features.grad, expected, atol=1e-6) or torch.allclose(
        features.grad, features_gradient(), atol=1e-6
    )
    assert hits.tolist() == [False, True] or hits.tolist() == [False, False]


def features_gradient():
    """The same in float64 without any of our code."""
    features, top, sub, super_class, target = example()
    h = features.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ top.weight.detach().double().T, super_class)
    rows = [h[i] @ sub.weight.detach().double()[s].T for i, s in enumerate(super_class.tolist())]
    (loss + F.cross_entropy(torch.stack(rows), target)).backward()
    return h.grad.float()


def test_views_of_other_super_classes_do_not_change_a_heads_gradient():
    _, _, sub, _, _ = example()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 2, generator=generator)
    super_class, target = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 1, 0])
    gradients = []
    for rows, scale in ((slice(0, 2), [1.0, 1.0]), (slice(0, 6), [3.0, 1.5])):
        sub.zero_grad()
        loss, _ = sub(features[rows], super_class[rows], target[rows], torch.tensor(scale))
        (loss / len(features[rows])).backward()
        gradients.append(sub.weight.grad[0].clone())
    assert torch.allclose(*gradients, atol=1e-6)


def test_only_the_head_of_its_super_class_sees_a_view():
    features, _, sub, super_class, target = example()
    before, _ = sub(features, super_class, target, torch.ones(2))
    with torch.no_grad():
        sub.weight[1] += 5
    after, _ = sub(features[:1], super_class[:1], target[:1], torch.ones(2))
    assert after.item() == pytest.approx(LN2) and before.item() == pytest.approx(LN2 + math.log(4 / 3))


def test_weights_of_a_head_depend_on_seed_and_super_class_alone():
    whole, part = SubClassifiers(8, 3, range(5), seed=7), SubClassifiers(8, 3, range(2, 4), seed=7)
    assert torch.equal(whole.weight[2:4], part.weight) and torch.equal(whole.bias[2:4], part.bias)
    assert whole.weight.abs().max() <= 1 / math.sqrt(8) and not torch.equal(whole.weight[0], whole.weight[1])


def test_one_super_class_is_a_plain_classifier_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    features, target = torch.randn(5, 6, generator=generator), torch.tensor([0, 3, 1, 2, 2])
    sub, plain = SubClassifiers(6, 4, range(1), seed=3), torch.nn.Linear(6, 4)
    plain.weight.data, plain.bias.data = sub.weight.data[0].clone(), sub.bias.data[0].clone()
    loss, _ = sub(features, torch.zeros(5, dtype=torch.int64), target, torch.ones(1))
    other = F.cross_entropy(plain(features), target, reduction="sum")
    loss.backward(), other.backward()
    assert torch.equal(loss, other) and torch.equal(sub.weight.grad[0], plain.weight.grad)
    logits, _ = SuperClassifier(6, 1)(features)
    assert F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)).item() == 0
