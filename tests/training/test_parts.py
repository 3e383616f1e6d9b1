import pytest
import torch

import models
from tests.helpers import equal, refuses
from training import optim
from training.parts import Parts, check_same


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def read_back(saved, path="some.pth.tar"):
    """Parts that have read a checkpoint whose parts are `saved`."""
    parts = Parts()
    parts._saved, parts._path = dict(saved), path
    return parts


def test_a_part_is_restored_once_when_it_is_kept():
    parts = read_back({"bank": {"value": 7}})
    first, second = Counter(), Counter(3)
    parts.keep(bank=first)
    parts.keep(bank=second)  # made anew, as the head of every epoch is
    assert (first.value, second.value) == (7, 3)
    assert parts.state_dict()["parts"] == {"bank": {"value": 3}}


def test_a_part_that_was_not_saved_is_an_error_unless_it_is_void():
    with refuses("some.pth.tar: holds no queue"):
        read_back({}).keep(queue=Counter())
    parts = read_back({"head": {"value": 5}})
    parts.forget("head")
    head = Counter(1)
    parts.keep(head=head)
    assert head.value == 1
    Parts().keep(queue=Counter())  # a new run


@pytest.mark.parametrize("state", [{}, None, 3, []])
def test_a_part_that_does_not_fit_is_one_line(state):
    with refuses("some.pth.tar: its bank does not fit"):
        read_back({"bank": state}).keep(bank=Counter())


def test_networks_and_optimisers_lie_under_the_names_that_others_read():
    net = models.build("tiny", True, 4, seed=3)
    body = optim.sgd(net.body_parameters(), 0.1, 0.9, 1e-4)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    body.step()
    parts = Parts()
    parts.keep(net=net, body=body, bank=Counter(2))
    state = parts.state_dict()
    assert state.keys() == {"arch", "state_dict", "optimizer", "parts"}
    assert state["arch"] == "tiny" and state["parts"] == {"bank": {"value": 2}}

    other = models.build("tiny", True, 4, seed=4)
    again = optim.sgd(other.body_parameters(), 0.05, 0.8, 1e-3)
    read_back({"net": state["state_dict"], "body": state["optimizer"]}).keep(net=other, body=again)
    assert equal(other.state_dict(), net.state_dict())
    assert equal(again.state_dict()["state"], body.state_dict()["state"])
    group = again.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.8, 1e-3)


def test_adam_is_restored_although_it_counts_in_a_tensor():
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    one, two = (torch.optim.Adam(layer.parameters()) for layer in layers)
    layers[0](torch.ones(1, 3)).sum().backward()
    one.step()
    optim.restore(two, one.state_dict())
    assert equal(two.state_dict()["state"], one.state_dict()["state"])


def test_settings_that_are_fixed_and_those_that_are_told():
    said = []
    was = {"seed": 3, "lr": 0.1, "exp": "a", "old": 1}
    check_same(was, {"seed": 3, "lr": 0.2, "exp": "b", "new": 2}, ("seed",), "x", said.append)
    assert said == ["note: lr was 0.1 and is 0.2 from here on"]
    with refuses("x: was run with seed 3, not 4"):
        check_same(was, {"seed": 4}, ("seed",), "x", said.append)
