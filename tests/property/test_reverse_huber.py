"""The reverse Huber penalty: values, prox, conjugate, and solvers that take it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_layer, random, seeds, sizes

from convexprune.core._certificate import certify
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.errors import ProblemError
from convexprune.solvers import Status, make_solver, solve

ROUNDING = 1e-12
GRID = torch.linspace(-6, 6, 101, dtype=torch.float64)

shapes = st.tuples(sizes, sizes)


def make(shape, seed):
    return ReverseHuber(random(seed, shape[1]).abs() + 0.1, random(seed + 1, *shape).abs())


def slow_value(v, curvature, price):
    """The least of B v^2 / 2 z + mu z over a fine grid of z in (0, 1]."""
    z = torch.linspace(1e-4, 1, 20_000, dtype=torch.float64)
    return float((curvature * v * v / (2 * z) + price * z).min()) if v else 0.0


@settings(max_examples=10)
@given(seeds)
def test_the_value_is_the_least_over_fractions_of_a_non_zero(seed):
    penalty, weight = make((2, 3), seed), 2 * random(seed + 2, 2, 3)
    curvature, price = penalty.curvature.expand(2, 3), penalty.price
    expected = [sum(slow_value(float(weight[i, j]), curvature[i, j], price[i, j]) for j in range(3)) for i in range(2)]
    torch.testing.assert_close(penalty.values(weight), weight.new_tensor(expected), rtol=1e-3, atol=1e-3)


@given(shapes, seeds)
def test_it_is_below_the_price_of_a_non_zero_and_touches_it(shape, seed):
    penalty, weight = make(shape, seed), random(seed + 2, *shape)
    exact = (penalty.curvature * weight.square() / 2 + penalty.price * (weight != 0)).sum(1)
    assert (penalty.values(weight) <= exact + ROUNDING).all()
    large = 100 * torch.ones(shape, dtype=torch.float64)
    exact = (penalty.curvature * large.square() / 2 + penalty.price).sum(1)
    torch.testing.assert_close(penalty.values(large), exact)


@given(shapes, seeds, st.sampled_from((0.1, 1.0, 2.5)))
def test_the_prox_minimises_its_objective(shape, seed, step):
    penalty, weight = make(shape, seed), 2 * random(seed + 2, *shape)

    def objective(point):
        return (point - weight).square().sum(1) / 2 + step * penalty.values(point)

    found = penalty.prox(weight, step)
    for value in GRID.tolist():
        other = found.clone()
        other[0, 0] = value
        assert objective(found)[0] <= objective(other)[0] + ROUNDING
    assert penalty.prox_(weight, step) is weight
    assert torch.equal(weight, found)


@given(shapes, seeds)
def test_fenchel_young_holds_and_is_an_equality_at_a_prox(shape, seed):
    penalty, weight, slope = make(shape, seed), random(seed + 2, *shape), 2 * random(seed + 3, *shape)
    bound = penalty.values(weight) + penalty.conjugate(penalty.project(slope))
    assert ((slope * weight).sum(1) <= bound + ROUNDING).all()
    at = penalty.prox(slope, 1.0)
    rest = slope - at
    torch.testing.assert_close((rest * at).sum(1), penalty.values(at) + penalty.conjugate(rest))


@given(shapes, seeds)
def test_a_scaled_penalty_is_the_same_function(shape, seed):
    penalty, weight, scale = make(shape, seed), random(seed + 2, *shape), random(seed + 3, shape[1]).exp()
    torch.testing.assert_close(penalty.scaled(scale).values(weight * scale), penalty.values(weight))
    assert penalty.to(torch.float32).curvature.dtype == torch.float32


@settings(max_examples=6)
@given(st.sampled_from(("full rank", "rank deficient")), seeds)
def test_fista_certifies_it_and_cvxpy_agrees(kind, seed):
    layer = make_layer(kind, 2, 6, seed)
    problem = Problem(layer.quadratic(), ReverseHuber(0.1 * layer.quadratic().gram.diagonal(), torch.tensor([[0.05]])))
    solution = make_solver("fista", tolerance=1e-8, max_iterations=50_000).solve(problem)
    assert solution.status is Status.SOLVED
    oracle = make_solver("cvxpy").solve(problem).weight
    assert problem.value(solution.weight) == pytest.approx(problem.value(oracle), rel=1e-6)
    assert certify(problem, oracle).dual <= problem.value(solution.weight) * (1 + 1e-9)


def test_numbers_and_other_dtypes_are_taken():
    problem = Problem(Quadratic.least_squares(torch.randn(20, 4), torch.randn(20, 2)), ReverseHuber(0.1, 0.2))  # pyright: ignore[reportArgumentType]
    solution = solve(problem)
    assert solution.status is Status.SOLVED and solution.weight.dtype == torch.float32


@pytest.mark.parametrize(("curvature", "price"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, float("inf"))])
def test_what_is_not_convex_or_not_finite_is_refused(curvature, price):
    with pytest.raises(ProblemError, match="reverse Huber"):
        ReverseHuber(torch.tensor(curvature), torch.tensor(price))
