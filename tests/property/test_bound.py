"""The lower bound is below the best pruning, whatever weight and split it is made of."""

from itertools import combinations

import cvxpy as cp
import pytest
import torch
from brute_force import best_pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import layer_problem
from strategies import KINDS, make_chain, make_layer, random, seeds

from convexprune.constraints import Columns, SemiStructured, Stacked, Unstructured
from convexprune.core._bound import LowerBound, budget_of, lower_bound, without_dead_inputs
from convexprune.core._quadratic import Quadratic
from convexprune.core._relaxation import Relaxed, _price, first_split, fractions, relax, safe_split
from convexprune.errors import ProblemError
from convexprune.pruners import Convex, Wanda

PATTERNS = {
    "matrix": Unstructured(0.5),
    "row": Unstructured(0.5, "row"),
    "2:4": SemiStructured(2, 4),
    "columns": Columns(0.5),
    "blocks": Columns(0.5, block=2),
}
QUICK = LowerBound(rounds=4, iterations=20, last_iterations=40)
SHARED = LowerBound(rounds=4, iterations=20, last_iterations=40, per_row=False)
ROUNDING = 1e-9  # of the energy: what the optimum of an ill-conditioned problem is known to

patterns = st.sampled_from(tuple(PATTERNS.values()))


def case(kind, seed, change, n=8, m=2):
    return make_layer(kind, m, n, seed, change)


@settings(max_examples=25)
@given(st.sampled_from(KINDS), patterns, seeds, st.sampled_from((0.0, 0.3)), st.booleans())
def test_no_pruning_is_better_than_the_bound(kind, pattern, seed, change, per_row):
    layer = case(kind, seed, change)
    problem = layer_problem(layer, pattern)
    best = best_pruning(problem)
    bound = (QUICK if per_row else SHARED).of(problem.quadratic, pattern, best)
    assert bound.error == pytest.approx(float(problem.squared_error(best).sum()))
    assert 0 <= bound.lower <= bound.error + ROUNDING * layer.energy


@settings(max_examples=40)
@given(st.sampled_from(KINDS), patterns, seeds, st.floats(0, 1), st.sampled_from((1e-3, 1.0, 30.0)))
def test_any_weight_and_any_split_below_the_gram_matrix_give_a_bound(kind, pattern, seed, share, radius):
    layer = case(kind, seed, 0.3)
    problem = layer_problem(layer, pattern)
    best = best_pruning(problem)
    first = first_split(problem.quadratic.gram)
    if first is None:
        return
    _, split = first
    budget, kept = budget_of(pattern, best)
    anywhere = layer.weight + radius * random(seed, *layer.weight.shape)
    bound = 2 * lower_bound(problem.quadratic, share * split.expand(2, 8), anywhere, budget, kept)
    assert 0 <= bound <= float(problem.squared_error(best).sum()) + ROUNDING * layer.energy


@settings(max_examples=20)
@given(patterns, seeds)
def test_a_split_that_is_too_large_is_shrunk_until_it_gives_a_bound(pattern, seed):
    layer = case("full rank", seed, 0.3)
    problem = layer_problem(layer, pattern)
    best = best_pruning(problem)
    budget, kept = budget_of(pattern, best)
    gram, anywhere = problem.quadratic.gram, layer.weight + 30 * random(seed, *layer.weight.shape)
    large = 30 * gram.diagonal().expand(2, 8)
    bound = 2 * lower_bound(problem.quadratic, safe_split(gram, large), anywhere, budget, kept)
    assert 0 <= bound <= float(problem.squared_error(best).sum()) + ROUNDING * layer.energy


@settings(max_examples=6)
@given(patterns, seeds)
def test_the_relaxation_is_solved(pattern, seed):
    # Its value and the bound at its solution are equal (strong duality), and every line keeps what it may.
    layer = case("full rank", seed, 0.3)
    problem = layer_problem(layer, pattern)
    q, best = problem.quadratic, best_pruning(problem)
    first = first_split(q.gram)
    assert first is not None
    inverse, split = first[0], (first[1] * 0.9).expand(2, 8)
    budget, kept = budget_of(pattern, best)
    found = relax(q, inverse, split, Relaxed.at(best), budget, kept, 1000)  # one case in 120 needs more than 500
    curved = torch.where(
        found.fraction > 0, split * found.weight.square() * (1 / found.fraction.clamp_min(1e-300) - 1), 0.0
    )
    value = float(q.values(found.weight).sum() + curved.sum() / 2)
    bound = lower_bound(q, split, found.point, budget, kept)
    assert bound <= value <= bound + 1e-5 * layer.energy
    fractions_of_units = budget.sums(found.fraction) / (budget.rows * budget.block)
    assert bool((fractions_of_units.sum(1, keepdim=True) <= kept + 1e-9).all())


@pytest.mark.parametrize("name", ["row", "columns", "blocks"])
def test_the_relaxation_has_the_value_that_cvxpy_finds(name: str):
    # 1/2 tr V (H - B) V' - <C, V> + 1/2 |T|^2 + 1/2 sum_u |sqrt(B) V_u|^2 / z_u over units u of entries or columns.
    pattern, layer = PATTERNS[name], case("full rank", 3, 0.3)
    problem = layer_problem(layer, pattern)
    q, best = problem.quadratic.at(None), best_pruning(problem)
    first = first_split(q.gram)
    assert first is not None
    budget, kept = budget_of(pattern, best)
    split = first[1] * 0.9
    found = relax(q, first[0], split.expand(2, 8), Relaxed.at(best), budget, kept, 1000)
    weight, z = cp.Variable((2, 8)), cp.Variable((1 if pattern.by_column else 2, budget.width))
    rest = torch.linalg.cholesky(q.gram - split.diag()).numpy()
    scaled = cp.multiply(weight, split.sqrt().numpy()[None].repeat(2, 0))
    rows = [slice(0, 2)] if pattern.by_column else [0, 1]
    perspective = sum(
        cp.quad_over_lin(scaled[row, j : j + budget.block], z[i, k])
        for i, row in enumerate(rows)
        for k, j in enumerate(range(0, 8, budget.block))
    )
    value = (cp.sum_squares(weight @ rest) + perspective + float(q.energy.sum())) / 2 - cp.sum(
        cp.multiply(weight, q.cross.numpy())
    )
    limits = [z >= 0, z <= 1, cp.sum(z, axis=1) <= float(kept[0])]
    least = cp.Problem(cp.Minimize(value), limits).solve(solver=cp.CLARABEL)
    assert lower_bound(q, split.expand(2, 8), found.point, budget, kept) == pytest.approx(least, rel=1e-5)


@settings(max_examples=4)
@given(patterns, seeds)
def test_the_bound_is_exact_where_inputs_do_not_correlate(pattern, seed):
    # The quadratic is separable: the best pruning drops what costs least.
    diagonal, weight = random(seed, 8).abs() + 0.1, random(seed + 1, 3, 8)
    quadratic = Quadratic(diagonal.diag(), torch.zeros_like(weight), weight.new_zeros(3), weight)
    kept = weight * pattern.mask(weight.abs() * diagonal.sqrt())
    assert LowerBound().of(quadratic, pattern, kept).ratio == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_bound_is_near_what_pruners_reach_where_neighbours_correlate(pattern):
    problem = layer_problem(make_chain(3, 24, 0, 0.5, tokens=400), pattern)
    achieved = Convex(damping=1e-3).prune(problem).weight
    own, shared = (QUICK.of(problem.quadratic, pattern, achieved), SHARED.of(problem.quadratic, pattern, achieved))
    assert own.ratio > 0.8
    assert own.lower > shared.lower  # a split of its own for every row is tighter


def test_a_constant_error_that_no_weight_can_change_is_part_of_the_bound():
    layer = case("full rank", 5, 0.3)
    problem = layer_problem(layer, PATTERNS["row"])
    constant = 2 * float(problem.quadratic.values(layer.weight).sum())
    shifted = Quadratic(problem.quadratic.gram, problem.quadratic.cross, problem.quadratic.energy + 10, layer.weight)
    achieved = Wanda().prune(problem).weight
    plain = QUICK.of(problem.quadratic, problem.pattern, achieved)
    assert constant > 0
    assert QUICK.of(shifted, problem.pattern, achieved).lower == pytest.approx(plain.lower + 20)


def test_dead_inputs_do_not_spoil_the_bound():
    layer = case("full rank", 6, 0.0)
    layer.pruned[:, 3] = 0
    problem = layer_problem(layer, PATTERNS["row"])
    achieved = Convex(damping=0.06).prune(problem).weight
    bound = QUICK.of(problem.quadratic, problem.pattern, achieved)
    assert 0.1 < bound.ratio <= 1
    alive = without_dead_inputs(problem.quadratic)
    torch.testing.assert_close(alive.values(achieved), problem.quadratic.values(achieved))


def test_a_gram_matrix_of_too_few_tokens_has_no_bound_but_zero():
    problem = layer_problem(case("rank deficient", 0, 0.0), PATTERNS["row"])
    achieved = Wanda().prune(problem).weight
    assert QUICK.of(problem.quadratic, problem.pattern, achieved).lower == 0


def test_what_breaks_the_pattern_is_refused():
    layer = case("full rank", 0, 0.0)
    quadratic = layer.quadratic()
    with pytest.raises(ProblemError, match="keeps up to 4 in a line of 4; 2:4 keeps 2"):
        QUICK.of(quadratic, PATTERNS["2:4"], layer.weight)
    with pytest.raises(ProblemError, match="one operator"):
        QUICK.of(quadratic, Stacked.alike(Unstructured(0.5), (1, 1)), layer.weight)
    with pytest.raises(ProblemError, match=r"\[2, 3\]"):
        QUICK.of(quadratic, PATTERNS["row"], layer.weight[:, :3])


@settings(max_examples=5)
@given(patterns, seeds)
def test_the_best_pruning_is_the_best_of_all_supports(pattern, seed):
    # A twin with no shared line: every support of a row, or of the columns of two, each solved by lstsq on the tokens.
    layer = make_layer("full rank", 2 if pattern.by_column else 1, 4, seed, 0.3)
    problem = layer_problem(layer, pattern)
    target = layer.targets()
    least = float("inf")
    for columns in map(list, combinations(range(4), 2)):
        weight = torch.zeros_like(layer.weight)
        weight[:, columns] = torch.linalg.lstsq(layer.pruned[:, columns], target).solution.T
        if pattern.violation(weight) == 0:
            least = min(least, float((layer.pruned @ weight.T - target).square().sum(1).mean()))
    assert float(problem.squared_error(best_pruning(problem)).sum()) == pytest.approx(least)


@given(st.integers(1, 9), st.integers(0, 10), st.sampled_from((1.0, 4.0)), seeds)
def test_at_the_price_as_much_is_kept_as_may_be(kept, zeros, spread, seed):
    scores = random(seed, 5, 20).abs() ** spread
    scores[:, :zeros] = 0
    budget = torch.full((5, 1), float(kept), dtype=torch.float64)
    can = budget.clamp_max((scores > 0).sum(1, keepdim=True))
    price = _price(scores, budget, None)
    for moved in (0.0, 0.3, -0.3):
        price = _price(scores, budget, price + moved)
        for _ in range(2):  # the iterations that follow
            price = _price(scores, budget, price)
        torch.testing.assert_close(fractions(scores, price).sum(1, keepdim=True), can, rtol=1e-9, atol=1e-9)
