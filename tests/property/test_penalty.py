from math import inf, isinf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random, seeds, sizes

from convexprune.core._penalty import L1, Support
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.errors import ProblemError

ROUNDING = 1e-12  # float64, values of order one
GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)  # wider than any entry drawn below
STRENGTHS = ("scalar", "column", "row", "entry", "zero")


def make(name, shape, seed):
    m, n = shape
    strengths = {
        "scalar": lambda: 0.7,
        "column": lambda: random(seed, n).abs(),
        "row": lambda: random(seed, m, 1).abs(),
        "entry": lambda: random(seed, m, n).clamp_min(0),  # half of them zero
        "zero": lambda: 0.0,
    }
    return Support(random(seed, m, n) > 0) if name == "support" else L1(strengths[name]())


def strengths_of(penalty, m, n):
    """The strength of every entry as a nested list; inf where a support forbids one."""
    if isinstance(penalty, Support):
        return torch.where(penalty.mask, 0.0, inf).double().tolist()
    return torch.as_tensor(penalty.strength, dtype=torch.float64).expand(m, n).tolist()


shapes = st.tuples(sizes, sizes)
names = st.sampled_from((*STRENGTHS, "support"))
steps = st.sampled_from((0.1, 1.0, 2.5))


def slow_prox(value, threshold):
    if value > threshold:
        return value - threshold
    if value < -threshold:
        return value + threshold
    return 0.0


@given(names, shapes, seeds, steps)
def test_the_prox_is_the_scalar_one_entry_by_entry(name, shape, seed, step):
    penalty, weight = make(name, shape, seed), 2 * random(seed + 1, *shape)
    strengths = strengths_of(penalty, *shape)
    expected = [
        [slow_prox(v, step * s) for v, s in zip(*row, strict=True)] for row in zip(weight, strengths, strict=True)
    ]
    torch.testing.assert_close(
        penalty.prox(weight, step), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=ROUNDING
    )


@given(names, shapes, seeds, steps)
def test_the_prox_minimises_its_objective(name, shape, seed, step):
    penalty, weight = make(name, shape, seed), random(seed + 1, *shape).clamp(-5, 5)

    def objective(point):
        return (point - weight).square().sum(1) / 2 + step * penalty.values(point)

    found = penalty.prox(weight, step)
    for i, j in ((0, 0), (shape[0] - 1, shape[1] - 1)):
        for value in GRID[::48].tolist():
            other = found.clone()
            other[i, j] = value
            assert objective(found)[i] <= objective(other)[i] + ROUNDING


@given(names, shapes, seeds, steps)
def test_the_prox_is_firmly_non_expansive(name, shape, seed, step):
    penalty, first, second = make(name, shape, seed), random(seed + 1, *shape), random(seed + 2, *shape)
    change = penalty.prox(first, step) - penalty.prox(second, step)
    assert change.square().sum() <= (change * (first - second)).sum() + ROUNDING


@given(names, shapes, seeds)
def test_prox_and_projection_add_up_to_the_point(name, shape, seed):
    penalty, point = make(name, shape, seed), 2 * random(seed + 1, *shape)
    torch.testing.assert_close(penalty.prox(point, 1.0) + penalty.project(point), point, rtol=0, atol=ROUNDING)


@given(names, shapes, seeds)
def test_the_prox_may_overwrite_its_argument(name, shape, seed):
    penalty, weight = make(name, shape, seed), random(seed + 1, *shape)
    expected = penalty.prox(weight.clone(), 0.3)
    assert penalty.prox_(weight, 0.3) is weight
    assert torch.equal(weight, expected)


@given(names, shapes, seeds)
def test_values_are_the_scalar_ones_added_up(name, shape, seed):
    penalty, weight = make(name, shape, seed), random(seed + 1, *shape)
    strengths = strengths_of(penalty, *shape)
    expected = [sum(s * abs(v) for v, s in zip(*r, strict=True)) for r in zip(weight.tolist(), strengths, strict=True)]
    torch.testing.assert_close(penalty.values(weight), torch.tensor(expected, dtype=torch.float64))


@given(names, shapes, seeds)
def test_fenchel_young_holds_for_any_pair(name, shape, seed):
    penalty, weight, slope = make(name, shape, seed), random(seed + 1, *shape), random(seed + 2, *shape)
    slope = penalty.project(slope)
    assert ((slope * weight).sum(1) <= penalty.values(weight) + penalty.conjugate(slope) + ROUNDING).all()


@given(names, shapes, seeds)
def test_fenchel_young_is_an_equality_at_a_prox(name, shape, seed):
    penalty, point = make(name, shape, seed), 2 * random(seed + 1, *shape)
    weight = penalty.prox(point, 1.0)
    slope = point - weight
    torch.testing.assert_close((slope * weight).sum(1), penalty.values(weight) + penalty.conjugate(slope))


@given(names, shapes, seeds)
def test_a_projected_slope_stays_where_it_is(name, shape, seed):
    penalty, slope = make(name, shape, seed), 2 * random(seed + 1, *shape)
    once = penalty.project(slope)
    assert torch.equal(penalty.project(once), once)


@given(names, shapes, seeds)
def test_the_dual_scale_is_the_largest_that_needs_no_projection(name, shape, seed):
    penalty, slope = make(name, shape, seed), random(seed + 1, *shape)
    for i, s in enumerate(penalty.dual_scale(slope).tolist()):
        inside = (1e6 if isinf(s) else s) * slope
        torch.testing.assert_close(penalty.project(inside)[i], inside[i])
        if not isinf(s):
            outside = (1.001 * s + 1e-6) * slope
            assert not torch.equal(penalty.project(outside)[i], outside[i])


def test_a_zero_slope_may_be_scaled_without_end():
    for penalty in (L1(1.0), L1(0.0), Support(torch.tensor([[True, False]]))):
        assert penalty.dual_scale(torch.zeros(1, 2)).tolist() == [inf]


@given(names, shapes, seeds)
def test_a_scaled_penalty_is_the_same_function_of_the_scaled_weight(name, shape, seed):
    penalty, weight, scale = make(name, shape, seed), random(seed + 1, *shape), random(seed + 2, shape[1]).exp()
    torch.testing.assert_close(penalty.scaled(scale).values(weight * scale), penalty.values(weight))


@pytest.mark.parametrize("strength", [-0.1, -inf, float("nan"), torch.tensor([1.0, -1e-9])])
def test_a_strength_that_is_negative_or_no_number_is_refused(strength):
    with pytest.raises(ProblemError, match="strength"):
        L1(strength)


def test_a_mask_that_is_not_boolean_is_refused():
    with pytest.raises(ProblemError, match="boolean"):
        Support(torch.ones(2, 2))


def test_a_zero_strength_leaves_an_entry_free():
    weight = torch.tensor([[3.0, 3.0]])
    assert L1(torch.tensor([0.0, 1.0])).prox(weight, 1.0).tolist() == [[3.0, 2.0]]


def test_a_weight_outside_its_support_costs_infinity():
    mask = torch.tensor([[True, False], [True, True]])
    assert Support(mask).values(torch.ones(2, 2)).tolist() == [inf, 0.0]


def test_the_strengths_follow_to_another_dtype():
    strength = L1(torch.ones(2)).to(torch.float64).strength
    assert isinstance(strength, torch.Tensor)
    assert strength.dtype == torch.float64


@given(seeds)
def test_a_subgradient_meets_the_penalty_and_is_nearest_to_the_slope(seed):
    # Fenchel-Young is an equality there; where V is zero it is the slope as far as the penalty allows.
    weight = random(seed, 3, 5) * (random(seed + 1, 3, 5) > 0)
    slope, strength = 2 * random(seed + 2, 3, 5), random(seed + 3, 3, 5).abs()
    for penalty in (L1(0.7), L1(strength), ReverseHuber(strength + 0.1, strength.flip(0))):
        found = penalty.subgradient(weight, slope)
        assert found is not None
        missing = penalty.values(weight) + penalty.conjugate(found) - (found * weight).sum(1)
        assert float(missing.abs().max()) <= 1e-12
        nearest = penalty.subgradient(torch.zeros_like(weight), slope)
        assert nearest is not None
        bound = (
            penalty.slope if isinstance(penalty, ReverseHuber) else torch.as_tensor(penalty.strength, dtype=slope.dtype)
        )
        assert torch.equal(nearest, torch.maximum(torch.minimum(slope, bound), -bound))
