"""Slices of one parameter that holds all experts: each is observed, read and written by itself."""

import pytest
import torch
from torch import nn

from convexprune.adapters._discovery.experts import ExpertInput, FusedExperts
from convexprune.adapters._discovery.operators import ParameterOperator, Place


class Bank(nn.Module):
    """Three matrices W [4 6] in one parameter, and three W' [6 4] in another."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(3, 4, 6))
        self.turned = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return [x @ self.turned[i] + nn.functional.linear(x, self.plain[i]) for i in (2, 0)]


@torch.no_grad()
def test_each_product_with_a_fused_expert_is_observed_with_its_inputs():
    bank, x, heard = Bank(), torch.randn(5, 6), []
    with FusedExperts(bank).hooked(lambda product: heard.append(product)):
        bank(x)
    bank(x)
    assert [(*h.expert, h.transposed) for h in heard] == [
        (name, i, name == "turned") for i in (2, 0) for name in ("turned", "plain")
    ]
    assert all(torch.equal(h.inputs, x) for h in heard)


class Piles(nn.Module):
    """Three experts, all multiplied at once with all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pile = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.bmm(x, self.pile).square()


def test_experts_that_are_multiplied_at_once_are_looped_over_with_their_own_tokens():
    piles, heard, back = Piles(), [], []
    x = torch.randn(3, 5, 6)
    x[0, 1:3], x[1] = 0, 0  # which are tokens of others, and an expert without any
    x.requires_grad_()
    at_once = piles(x)
    (expected,) = torch.autograd.grad(at_once.sum(), x)
    experts = FusedExperts(piles)
    with experts.hooked(lambda product: heard.append(product)):
        looped = piles(x)
    torch.testing.assert_close(looped, at_once)
    with experts.hooked_backward(lambda product: back.append(product)):
        (found,) = torch.autograd.grad(looped.sum(), x)
    torch.testing.assert_close(found[x.detach().any(-1)], expected[x.detach().any(-1)])
    assert [(h.expert, h.transposed) for h in heard] == [(("pile", i), True) for i in (0, 2)]
    assert all(torch.equal(h.inputs, x[h.expert[1]][x[h.expert[1]].any(-1)]) for h in heard)
    assert [(h.expert[1], len(h.inputs)) for h in back if len(h.inputs)] == [(2, 5), (0, 3)]
    assert torch.equal(piles(x), at_once)


@torch.no_grad()
def test_hooks_get_their_own_expert_and_leave_nothing_behind_when_a_pass_is_ended():
    bank, x, heard = Bank(), torch.randn(5, 6), []

    def tell(inputs):
        heard.append(inputs)
        raise ValueError("enough")

    experts = FusedExperts(bank)
    first, second = (ExpertInput(experts, ("plain", i)) for i in (0, 1))
    with pytest.raises(ValueError, match="enough"), first(tell), second(tell):
        bank(x)
    bank(x)
    assert len(heard) == 1 and not experts.hooks
    assert bank.training and not bank._forward_hooks and not bank._forward_pre_hooks


@pytest.mark.parametrize("place", [Place("", "plain", 1), Place("", "turned", 1, transposed=True)])
def test_a_slice_is_written_and_its_neighbours_are_not(place):
    bank, weight = Bank(), torch.randn(4, 6)
    before = bank.get_parameter(place.parameter).detach().clone()
    operator = ParameterOperator(bank, place)
    operator.write(weight)
    assert operator.shape == (4, 6) and torch.equal(operator.read(), weight)
    assert torch.equal(bank.get_parameter(place.parameter)[::2], before[::2])
