import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import main_swav
from algorithms.sinkhorn import sinkhorn
from training.memory import Queue
from util import UserError

# Crops x images x prototypes, and what the paper's formulas make of them.
SCORES = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.6, 0.8]], [[0.6, 0.8], [0.0, 1.0]]])
CODES = [[[0.880797, 0.119203], [0.119203, 0.880797]], [[0.598688, 0.401312], [0.401312, 0.598688]]]


def codes_of(scores, assign):
    return [sinkhorn(scores[v], 0.5, 3) for v in assign]


def test_swapped_loss_computed_by_hand():
    codes = codes_of(SCORES, [0, 1])
    assert torch.allclose(torch.stack(codes), torch.tensor(CODES), atol=2e-6)
    loss = main_swav.swapped_loss(SCORES, codes, [0, 1], temperature=0.5) / 2  # mean over the images
    assert loss.item() == pytest.approx(0.736651, abs=2e-6)


@pytest.mark.parametrize(
    "predicted, other, expected", [(0, 1, 0.560696), (0, 2, 0.615334), (1, 0, 0.929553), (1, 2, 0.841022)]
)
def test_terms_of_the_loss(predicted, other, expected):
    code = codes_of(SCORES, [predicted])[0]
    pair = torch.stack([SCORES[predicted], SCORES[other]])
    assert (main_swav.swapped_loss(pair, [code], [0], 0.5) / 2).item() == pytest.approx(expected, abs=2e-6)


def test_gradient_holds_the_codes_fixed():
    scores = SCORES.double().clone().requires_grad_()
    codes = [c.double() for c in codes_of(SCORES, [0, 1])]
    loss = partial(main_swav.swapped_loss, codes=codes, assign=[0, 1], temperature=0.5)
    assert torch.autograd.gradcheck(loss, (scores,))


def test_a_crop_does_not_predict_itself_and_small_crops_give_no_codes():
    scores = SCORES.clone().requires_grad_()
    main_swav.swapped_loss(scores, codes_of(SCORES, [0]), [0], 0.5).backward()
    assert not scores.grad[0].any() and scores.grad[1].any() and scores.grad[2].any()


def test_scores_of_the_queue_come_before_those_of_the_batch():
    """Four samples, of which the queue's two have scores (1, 0) and (.96, .28)."""
    every = torch.cat([torch.tensor([[1.0, 0.0], [0.96, 0.28]]), SCORES[0]])
    expected = [[0.711306, 0.288694], [0.043179, 0.956821]]
    assert torch.allclose(sinkhorn(every, 0.5, 3)[2:], torch.tensor(expected), atol=2e-6)


def test_queue_holds_the_last_batches_newest_first_and_is_used_when_full():
    queue = Queue(6, batch=2, crops=2, dim=3, device=torch.device("cpu"))
    batches = [
        F.normalize(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(i)), dim=2) for i in range(5)
    ]
    queue.put(batches[0])  # off: nothing happens
    queue.on = True
    for step, z in enumerate(batches):
        assert queue.full == (step >= 3)  # length / batch steps after it began
        assert len(queue.of(0)) == (6 if step >= 3 else 0)
        queue.put(z)
    for crop in (0, 1):
        assert torch.equal(queue.of(crop), torch.cat([batches[4][crop], batches[3][crop], batches[2][crop]]))
    assert not torch.equal(queue.of(0), queue.of(1))


def test_queue_goes_on_from_its_state():
    queue, other = (Queue(6, 2, 1, 3, torch.device("cpu")) for _ in range(2))
    queue.on = other.on = True
    for i in range(2):
        queue.put(torch.full((1, 2, 3), float(i)))
    other.load_state_dict(queue.state_dict())
    assert other.filled == 2 and not other.full
    for q in (queue, other):
        q.put(torch.full((1, 2, 3), 9.0))
    assert torch.equal(queue.of(0), other.of(0)) and other.full


def test_a_queue_shorter_than_a_batch_is_refused_and_others_are_cut():
    with pytest.raises(UserError, match=r"--queue_length 100: less than the global batch 256"):
        main_swav.whole_batches(100, 256)
    assert main_swav.whole_batches(0, 256) == 0 and main_swav.whole_batches(1000, 256) == 768


def test_the_loss_starts_near_log_k():
    generator = torch.Generator().manual_seed(5)
    scores = 0.05 * torch.randn(4, 8, 300, generator=generator)
    codes = [sinkhorn(scores[v], 0.05) for v in (0, 1)]
    loss = main_swav.swapped_loss(scores, codes, [0, 1], 0.1).item() / 8
    assert loss == pytest.approx(math.log(300), rel=0.05)
