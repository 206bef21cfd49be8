"""The search for an order of columns of which N:M prunes less, against all orders and a slow twin of its step."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from convexprune.constraints import SemiStructured
from convexprune.core import _permutation as module
from convexprune.core._permutation import permutation, pruned_fraction
from convexprune.errors import PatternError

PATTERNS = [
    SemiStructured(2, 4),
    SemiStructured(1, 4),
    SemiStructured(3, 4),
    SemiStructured(4, 8),
    SemiStructured(1, 2),
]


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).square() * torch.rand(
        columns, generator=generator, dtype=torch.float64
    )


@given(st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 3))
def test_it_is_an_order_and_never_prunes_more(pattern: SemiStructured, rows: int, groups: int, seed: int, sweeps: int):
    scores = drawn(rows, groups * pattern.group, seed)
    order = permutation(scores, pattern, sweeps, seed)
    assert sorted(order.tolist()) == list(range(scores.shape[1]))
    assert pruned_fraction(scores[:, order], pattern) <= pruned_fraction(scores, pattern) + 1e-12


def test_columns_that_cost_nothing_have_any_order():
    scores = torch.zeros(3, 8)
    assert sorted(permutation(scores, PATTERNS[0]).tolist()) == list(range(8))
    assert pruned_fraction(scores, PATTERNS[0]) == 0


@given(st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(2, 6), st.integers(0, 10**6))
def test_a_step_is_the_best_assignment(pattern: SemiStructured, rows: int, groups: int, seed: int):
    """The slow twin: what every column would cost in every group, by the pattern's own masks."""
    scores = drawn(rows, groups * pattern.group, seed)
    ids = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed)).view(groups, pattern.group)

    def cost(column: int, group: int) -> float:
        four = scores[:, torch.cat([ids[column, :1], ids[group, 1:]])]
        return float(four[~pattern.mask(four)].sum())

    costs = torch.tensor([[cost(column, group) for column in range(groups)] for group in range(groups)])
    best = costs[linear_sum_assignment(costs.numpy())].sum()
    found = costs[torch.arange(groups), module._assigned(scores, ids, pattern)].sum()
    torch.testing.assert_close(found, best)


def test_it_is_near_the_best_of_all_orders():
    """All 35 ways to part eight columns in two groups, 20 draws; so few groups need more sweeps."""
    pattern, excess = SemiStructured(2, 4), []
    for seed in range(20):
        scores = drawn(4, 8, seed)
        halves = [(0, *rest) for rest in combinations(range(1, 8), 3)]
        orders = [[*half, *(j for j in range(8) if j not in half)] for half in halves]
        best = min(pruned_fraction(scores[:, order], pattern) for order in orders)
        excess.append(pruned_fraction(scores[:, permutation(scores, pattern, sweeps=20)], pattern) / best - 1)
    assert min(excess) > -1e-9
    assert sum(each < 1e-9 for each in excess) >= 15 and sum(excess) / len(excess) < 0.01


def test_columns_that_fit_together_are_found():
    """Half of the columns are all that counts, and stand side by side: an order that loses nothing exists."""
    scores = torch.cat([torch.ones(5, 512), torch.zeros(5, 512)], 1)
    pattern = SemiStructured(2, 4)
    assert pruned_fraction(scores, pattern) == pytest.approx(0.5)
    assert pruned_fraction(scores[:, permutation(scores, pattern, sweeps=8)], pattern) < 0.02


def test_blocks_of_groups_do_nearly_as_well_as_all_at_once(monkeypatch: pytest.MonkeyPatch):
    scores, pattern = drawn(32, 512, 0), SemiStructured(2, 4)
    whole = pruned_fraction(scores[:, permutation(scores, pattern)], pattern)
    monkeypatch.setattr(module, "ASSIGNED", 32)
    parts = pruned_fraction(scores[:, permutation(scores, pattern)], pattern)
    gain = pruned_fraction(scores, pattern) - whole
    assert abs(parts - whole) < 0.1 * gain


def test_the_seed_decides():
    scores, pattern = drawn(8, 64, 1), SemiStructured(2, 4)
    assert torch.equal(permutation(scores, pattern, seed=3), permutation(scores, pattern, seed=3))
    assert not torch.equal(permutation(scores, pattern, seed=3), permutation(scores, pattern, seed=4))


def test_columns_that_make_no_groups_are_refused():
    with pytest.raises(PatternError, match="no multiple of 4"):
        permutation(torch.ones(2, 6), SemiStructured(2, 4))
