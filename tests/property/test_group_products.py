"""The penalty for n:m: its prox against a search with many starts, and what its certificate may say."""

from itertools import combinations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_layer, random, seeds

from convexprune.errors import ProblemError
from convexprune.group_products import GroupProducts
from convexprune.problem import Problem, certify
from convexprune.solvers import make_solver

PATTERNS = ((2, 4), (1, 2), (1, 4), (3, 4), (2, 3))
NEAR = 1e-6  # of the objective: where the prox stops its updates
ROUNDING = 1e-12
patterns, steps, strengths = (st.sampled_from(x) for x in (PATTERNS, (0.3, 1.0, 2.0), (0.1, 0.5, 1.0, 3.0, 10.0)))


def slow_values(penalty: GroupProducts, weight: torch.Tensor, group: int) -> list[float]:
    """The sum of the products of any kept + 1 magnitudes of a group, one by one."""
    totals = []
    for row in weight.abs().tolist():
        groups = [row[i : i + group] for i in range(0, len(row), group)]
        totals.append(penalty.strength * sum(prod(c) for g in groups for c in combinations(g, penalty.kept + 1)))
    return totals


@given(patterns, strengths, seeds)
def test_values_are_the_products_one_by_one(pattern, strength, seed):
    penalty, weight = GroupProducts(pattern[0], pattern[1], strength), random(seed, 2, 2 * pattern[1])
    found = penalty.values(weight).tolist()
    assert found == pytest.approx(slow_values(penalty, weight, pattern[1]))


@given(patterns, strengths, seeds)
def test_it_vanishes_on_the_pattern_and_only_there(pattern, strength, seed):
    kept, group = pattern
    weight = random(seed, 1, group)
    penalty = GroupProducts(kept, group, strength)
    assert penalty.values(weight) > 0
    weight[0, kept:] = 0
    assert penalty.values(weight) == 0
    assert torch.equal(penalty.prox(weight, 1.0), weight)  # and what fits the pattern is not shrunk


def searched(penalty: GroupProducts, point: torch.Tensor, step: float, starts: int = 12) -> torch.Tensor:
    """The least objective of each row found by exact coordinate minimisation from many random starts [rows].

    Magnitudes suffice: the penalty does not see signs, and a minimiser has those of the point.
    """
    point = point.abs()

    def objective(u):
        return (u - point).square().sum(1) / 2 + step * penalty.values(u)

    best = objective(point)
    for start in range(starts):
        u = point * random(start, *point.shape).abs().clamp_max(1) * (random(start + 99, *point.shape) > -0.6)
        for sweep in range(20):
            for i in random(start + sweep, point.shape[1]).argsort().tolist():
                zero, one = u.clone(), u.clone()
                zero[:, i], one[:, i] = 0, 1
                slope = step * (penalty.values(one) - penalty.values(zero))  # p is linear in each magnitude
                u[:, i] = (point[:, i] - slope).clamp_min(0)
        best = torch.minimum(best, objective(u))
    return best


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_search_finds_a_point_below_the_prox(pattern, weighted):
    kept, group = pattern
    point = 2 * random(7, 30, group)
    for strength in (0.3, 1.5):
        weights = random(8, group).exp() if weighted else None
        penalty = GroupProducts(kept, group, strength, weights)
        found = penalty.prox(point, 0.7)
        objective = (found - point).square().sum(1) / 2 + 0.7 * penalty.values(found)
        assert (objective <= searched(penalty, point, 0.7) * (1 + NEAR) + ROUNDING).all()


@given(patterns, strengths, steps, seeds)
def test_the_prox_keeps_signs_and_shrinks(pattern, strength, step, seed):
    point = random(seed, 3, 2 * pattern[1])
    found = GroupProducts(pattern[0], pattern[1], strength).prox(point, step)
    assert (found * point >= 0).all()
    assert (found.abs() <= point.abs() + ROUNDING).all()


@given(patterns, strengths, seeds)
def test_the_prox_may_overwrite_its_argument(pattern, strength, seed):
    penalty, point = GroupProducts(pattern[0], pattern[1], strength), random(seed, 2, 2 * pattern[1])
    expected = penalty.prox(point.clone(), 0.7)
    assert penalty.prox(point, 0.7, out=point) is point
    assert torch.equal(point, expected)


def test_a_strong_penalty_leaves_the_largest_of_each_group():
    point = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert GroupProducts(2, 4, 1e6).prox(point, 1.0).tolist() == [[3.0, 0.0, 2.0, 0.0]]


@given(patterns, strengths, seeds)
def test_a_scaled_penalty_is_the_same_function_of_the_scaled_weight(pattern, strength, seed):
    penalty, weight, scale = (
        GroupProducts(pattern[0], pattern[1], strength),
        random(seed, 2, pattern[1]),
        random(seed, pattern[1]).exp(),
    )
    torch.testing.assert_close(penalty.scaled(scale).values(weight * scale), penalty.values(weight))
    twice = penalty.scaled(scale).scaled(1 / scale).values(weight)
    torch.testing.assert_close(twice, penalty.values(weight))


@settings(max_examples=5)
@given(st.sampled_from(((2, 4), (1, 2))), seeds)
def test_its_certificate_is_a_true_bound_that_shows_no_point_optimal(pattern, seed):
    layer = make_layer("full rank", 2, 4, seed)
    quadratic = layer.quadratic()
    problem = Problem(quadratic, GroupProducts(pattern[0], pattern[1], 0.5))
    solution = make_solver("fista", max_iterations=40, scale=False).solve(problem)
    assert quadratic.anchor is not None
    best = quadratic.anchor + torch.linalg.solve(quadratic.gram, quadratic.cross.T).T  # where the quadratic is least
    least = float(quadratic.values(best).sum())
    certificate = certify(problem, solution.weight)
    assert certificate.primal - certificate.gap <= least * (1 + 1e-9) + ROUNDING  # so it is below every point's value
    assert certificate.dual == pytest.approx(least, rel=1e-6, abs=1e-9 * layer.energy)


def test_fista_lowers_the_objective_of_the_penalty():
    layer = make_layer("full rank", 4, 8, 0)
    problem = Problem(layer.quadratic(), GroupProducts(2, 4, 0.5))
    found = make_solver("fista", max_iterations=40, scale=False).solve(problem).weight
    assert problem.value(found) < problem.value(layer.weight)


@pytest.mark.parametrize("arguments", [(-1.0,), (float("nan"),), (1.0, torch.tensor([1.0, 0.0]))])
def test_strengths_and_weights_out_of_range_are_refused(arguments):
    with pytest.raises(ProblemError, match="n:m penalty"):
        GroupProducts(1, 2, *arguments)
