"""The allocation is the optimum of a linear program, and its gap proves it."""

from collections.abc import Sequence
from itertools import product
from math import log
from typing import Any

import cvxpy as cp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.core._allocation import (
    Curve,
    allocate,
    allocate_by_outliers,
    allocate_by_skewness,
    cheapest_points,
    skewness,
    sums_of_powers,
)
from convexprune.errors import PatternError

GRID = (0.3, 0.4, 0.5, 0.6, 0.7)
EIGHTHS = (0.25, 0.375, 0.5, 0.625, 0.75)  # zeros of 6:8 to 2:8
costs = st.lists(st.floats(0, 10), min_size=5, max_size=5).map(lambda c: tuple(sorted(c)))
curves = st.lists(st.builds(lambda size, c: Curve(size, GRID, c), st.integers(1, 1000), costs), min_size=1, max_size=6)


def oracle(units: list[Curve], sparsity: float) -> float:
    """min over convex combinations of each curve's points: the same problem, with nothing of our code."""
    shares = [cp.Variable(len(c.costs), nonneg=True) for c in units]
    cost = sum(w @ list(c.costs) for w, c in zip(shares, units, strict=True))
    zeros = sum(c.size * (w @ list(c.sparsities)) for w, c in zip(shares, units, strict=True))
    total = sum(c.size for c in units)
    rules: list[Any] = [cp.sum(w) == 1 for w in shares]
    problem = cp.Problem(cp.Minimize(cost), [*rules, zeros / total == sparsity])  # pyright: ignore[reportArgumentType]
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)  # pyright: ignore[reportArgumentType]


@given(st.floats(1e-3, 1e3), st.integers(1, 1000))
def test_weights_of_one_size_have_no_skewness(size: float, count: int):
    assert skewness(sums_of_powers(torch.full((count,), size))) == 0


@given(curves, st.floats(0.31, 0.69))
def test_it_is_the_optimum_of_the_linear_program(units: list[Curve], sparsity: float):
    found = allocate(units, sparsity)
    assert found.cost == pytest.approx(oracle(units, sparsity), rel=1e-6, abs=1e-6)
    assert found.gap <= 1e-9 * max(1, found.cost)
    total = sum(c.size for c in units)
    assert sum(c.size * s for c, s in zip(units, found.sparsities, strict=True)) == pytest.approx(sparsity * total)


few = st.lists(st.builds(lambda size, c: Curve(8 * size, EIGHTHS, c), st.integers(1, 4), costs), min_size=2, max_size=4)


@given(few, st.sampled_from(EIGHTHS[1:-1]))
def test_points_are_the_cheapest_of_all_with_the_zeros(units: list[Curve], sparsity: float):
    """Slow twin: every choice of points."""

    def zeros(points: Sequence[float]) -> float:
        return sum(c.size * p for c, p in zip(units, points, strict=True))

    def cost(points: Sequence[float]) -> float:
        return sum(c.costs[EIGHTHS.index(p)] for c, p in zip(units, points, strict=True))

    found = cheapest_points(units, sparsity)
    enough = [
        points for points in product(EIGHTHS, repeat=len(units)) if zeros(points) >= zeros([sparsity] * len(units))
    ]
    assert tuple(found) in enough and cost(found) == pytest.approx(min(map(cost, enough)), rel=2e-4, abs=1e-5)


@given(costs)
def test_the_envelope_is_convex_and_below(c: tuple[float, ...]):
    curve = Curve(1, GRID, c)
    hull = curve.envelope
    assert all(hull.cost(s) <= cost + 1e-12 for s, cost in zip(GRID, c, strict=True))
    slopes = [
        (hull.costs[i + 1] - hull.costs[i]) / (hull.sparsities[i + 1] - hull.sparsities[i])
        for i in range(len(hull.costs) - 1)
    ]
    assert slopes == sorted(slopes) and {hull.sparsities[0], hull.sparsities[-1]} == {0.3, 0.7}
    assert set(zip(hull.sparsities, hull.costs, strict=True)) <= set(zip(GRID, c, strict=True))


@given(st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=3), st.lists(st.floats(1, 100), min_size=3, max_size=3))
def test_bits_are_shared_as_their_formula_says(weights: list[float], sizes: list[float]):
    """Of errors f 4^-bits the best allocation has equal derivatives by bits: bits = mean + log_4(f) - its mean."""
    whole = [round(size) for size in sizes]
    total = sum(whole)
    shifts = [log(f, 4) for f in weights]
    middle = sum(size * shift for size, shift in zip(whole, shifts, strict=True)) / total
    best = [shift - middle for shift in shifts]
    reach = max(map(abs, best)) + 1
    shares = tuple(0.5 + offset * reach / 16 for offset in (-1, 0, 1))  # of 16 bits those that are saved
    curves = [
        Curve(size, shares, tuple(size * f * 4.0 ** (16 * (share - 0.5)) for share in shares)).refined(200)
        for size, f in zip(whole, weights, strict=True)
    ]
    found = allocate(curves, 0.5)
    assert [16 * (0.5 - share) for share in found.sparsities] == pytest.approx(best, abs=reach / 90)


def test_what_is_cheap_to_prune_is_pruned_more():
    cheap, dear = Curve(100, (0.3, 0.5, 0.7), (1, 2, 4)), Curve(100, (0.3, 0.5, 0.7), (10, 20, 40))
    assert allocate([cheap, dear], 0.5).sparsities == pytest.approx((0.7, 0.3))
    assert allocate([cheap, cheap], 0.5).sparsities == pytest.approx((0.5, 0.5))


def test_owl_gives_layers_with_more_outliers_less_sparsity():
    assert allocate_by_outliers([0.1, 0.3, 0.2], [10, 10, 10], 0.7) == pytest.approx([0.78, 0.62, 0.70])
    found = allocate_by_outliers([1, 2, 5], [10, 30, 5], 0.6)
    assert (10 * found[0] + 30 * found[1] + 5 * found[2]) / 45 == pytest.approx(0.6)
    assert allocate_by_outliers([1, 1], [3, 4], 0.5) == [0.5, 0.5]


def test_skewed_layers_keep_as_the_softmax_says():
    # softmax(0, log 2) = 1/3, 2/3: at 70 % of two layers of a size .6 is to be kept in all, .2 and .4.
    assert allocate_by_skewness([0.0, log(2)], [10, 10], 0.7) == pytest.approx([0.8, 0.6])
    assert allocate_by_skewness([5.0, 5.0 + log(2)], [10, 10], 0.7) == pytest.approx([0.8, 0.6])
    # Of sizes 10 and 30, kept are c and 2 c: 10 c + 60 c = .3 * 40.
    assert allocate_by_skewness([0.0, log(2)], [10, 30], 0.7) == pytest.approx([1 - 12 / 70, 1 - 24 / 70])
    assert allocate_by_skewness([3.0, 3.0], [10, 30], 0.7) == pytest.approx([0.7, 0.7])


def test_what_a_layer_cannot_keep_more_of_goes_to_the_others():
    # 1.5 is to be kept of three; as 1, 2 and 12 the last had 1.2: it keeps 1, the others .5 / 3 and 1 / 3.
    assert allocate_by_skewness([0.0, log(2), log(12)], [10, 10, 10], 0.5) == pytest.approx([5 / 6, 2 / 3, 0.0])
    assert allocate_by_skewness([0.0, 1.0], [10, 10], 0.0) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: allocate([Curve(5, GRID, (0, 1, 2, 3, 4))], 0.2),
        lambda: allocate([Curve(5, GRID, (0, 1, 2, 3, 4))], 0.8),
        lambda: Curve(5, (0.5, 0.4), (1, 2)),
        lambda: Curve(0, (0.5,), (1,)),
        lambda: allocate_by_outliers([0, 1], [1, 1], 0.95, reach=0.2),
        lambda: allocate_by_skewness([0, 900], [10, 10], 0.5),
    ],
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(PatternError):
        bad()
