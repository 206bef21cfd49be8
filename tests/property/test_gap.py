"""What a gap is worth: in any units, on singular Gram matrices, near the optimum, and where rounding hides the rest."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PENALTIES, make_chain, make_layer, make_penalty, problems, random, seeds

from convexprune.core import _on_kept as on_kept
from convexprune.core._certificate import certify, row_gaps
from convexprune.core._on_kept import gaps_on_kept
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.solvers import Status, make_solver
from convexprune.solvers._fista import FISTA

L1S = PENALTIES[:3]
TAME = ("full rank", "rank deficient")  # where data and Gram agree to rounding whatever the weight


@pytest.mark.parametrize("spread", [1e0, 1e5, 1e10])
@pytest.mark.parametrize("name", ["L1 of scaled columns", "Support"])
def test_the_units_of_the_inputs_do_not_make_an_answer_uncertain(name, spread):
    layer = make_layer("full rank", 2, 8, seed=0)
    scales = torch.logspace(0, 1, 8, dtype=torch.float64) ** torch.tensor(spread).log10()
    quadratic = layer.quadratic().at(None).scaled(1 / scales)
    problem = Problem(quadratic, make_penalty(name, quadratic, seed=0))
    solver = make_solver("cg" if name == "Support" else "fista", tolerance=1e-8)
    solution = solver.solve(problem)
    assert solution.status is Status.SOLVED
    assert solution.certificate.relative_gap <= 1e-8


@given(problems(TAME, L1S), seeds, st.sampled_from((2.0**-40, 2.0**30)), st.sampled_from((2.0**-20, 2.0**20)))
def test_powers_of_two_in_inputs_and_weights_change_no_bit_of_a_certificate(case, seed, inputs, weights):
    layer, problem = case
    q, weight = problem.quadratic, layer.weight + random(seed, *problem.shape)
    anchor = None if q.anchor is None else q.anchor * weights
    outputs = inputs * weights
    scaled = Quadratic(q.gram * inputs**2, q.cross * inputs * outputs, q.energy * outputs**2, anchor)
    assert isinstance(problem.penalty, L1)
    second = certify(Problem(scaled, L1(problem.penalty.strength * inputs * outputs)), weight * weights)
    first = certify(problem, weight)
    assert (second.primal, second.gap) == (first.primal * outputs**2, first.gap * outputs**2)


@pytest.mark.parametrize("tokens", [3, 5])
def test_least_squares_on_a_support_is_certified_on_fewer_tokens_than_inputs(tokens):
    # H is singular, but not where the weights are: its own factor prices what they could still gain.
    layer = make_layer("full rank", 3, 8, seed=1, tokens=tokens)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, :2], mask[1, 3:5], mask[2, 6:] = True, True, True
    problem = Problem(layer.quadratic(), Support(mask))
    assert problem.quadratic.unit_free[0].factor is None
    solution = make_solver("cg", tolerance=1e-10).solve(problem)
    assert solution.status is Status.SOLVED
    moved = solution.weight * (1 + 1e-2 * random(2, 3, 8))
    excess = problem.value(moved) - problem.value(solution.weight)
    assert certify(problem, moved).gap == pytest.approx(excess, rel=1e-6)


@given(seeds, st.sampled_from(("L1", "L1 of every entry")))
def test_the_gap_falls_with_the_square_of_the_distance_to_the_optimum(seed, name):
    layer = make_chain(3, 8, seed, correlation=0.3, tokens=400)
    quadratic = layer.quadratic()
    problem = Problem(quadratic, make_penalty(name, quadratic, seed, strength=0.2))
    best = make_solver("scipy").solve(problem).weight
    direction = best * random(seed, *problem.shape).clamp(-1, 1)  # zeros stay zero, as they do behind a prox
    gaps = [certify(problem, best + step * direction).gap for step in (1e-2, 1e-4)]
    assert gaps[1] <= gaps[0] / 2000 + 1e-11 * problem.value(best)


def test_fista_needs_fewer_iterations_to_prove_its_answer(monkeypatch):
    layer = make_chain(6, 40, seed=0, correlation=0.9, tokens=400)
    quadratic = layer.quadratic()
    problem = Problem(quadratic, make_penalty("L1 of scaled columns", quadratic, seed=0, strength=0.02))
    solver = make_solver("fista", tolerance=1e-6, check_every=10)
    after = solver.solve(problem).iterations
    monkeypatch.setattr(L1, "subgradient", AbstractPenalty.subgradient)
    assert after <= 0.8 * solver.solve(problem).iterations


def test_what_float32_cannot_resolve_is_not_certified():
    # The targets are all but realizable: the energy's rounding is larger than what is left to fit.
    x, w = random(0, 60, 6).float(), random(1, 2, 6).float()
    y = x @ w.T + 1e-4 * random(2, 60, 2).float()
    plain, anchored = Quadratic.least_squares(x, y), Quadratic.least_squares(x, y, w)
    on = Support(torch.ones(2, 6, dtype=torch.bool))
    assert make_solver("cg").solve(Problem(plain, on)).status is Status.UNCONFIRMED
    solution = make_solver("cg").solve(Problem(anchored, on))
    assert solution.status is Status.SOLVED
    exact = torch.linalg.lstsq(x.double(), y.double() - x.double() @ w.double().T).solution.T + w
    torch.testing.assert_close(solution.weight.double() - w, exact - w, rtol=1e-2, atol=1e-7)


def test_a_rounded_fit_that_leaves_nothing_is_not_taken_for_perfect():
    # One token: the residual is all rounding, and scaling it up would multiply that.
    x, w = torch.tensor([[3.1, -0.7, 1.3]], dtype=torch.float64), torch.tensor([[0.3, 0.9, -1.7]], dtype=torch.float64)
    quadratic = Quadratic.least_squares(x, x @ w.T)
    problem = Problem(quadratic, L1(1e-9 * float(quadratic.cross.abs().max())))
    best = problem.value(make_solver("scipy").solve(problem).weight)
    assert certify(problem, w).gap >= problem.value(w) - best


def rows_of(problem, weight):
    """The gaps that need no factor for each row [m]."""
    quadratic, residual = problem.quadratic, problem.quadratic.residual(weight)
    return row_gaps(problem, weight, residual, quadratic.values(weight, residual), problem.penalty.values(weight))


def reweighted(quadratic, seed):
    """L1 as on the path of `convex`: a third of the entries, clearly kept, has strengths down to 1e-60, or none."""
    scores = quadratic.anchor.abs() * quadratic.scale()
    threshold = scores.quantile(0.65)
    strength = 0.05 * threshold * torch.exp(-(scores / threshold).pow(6).clamp_max(140)) * quadratic.scale()
    strength[(scores > threshold) & (random(seed, *scores.shape) > 1)] = 0.0
    return Problem(quadratic, L1(strength))


def kept_gaps(problem, weight):
    """The gaps on what is kept [m], and the objectives [m], in coordinates with a diagonal near one."""
    quadratic, unit = problem.quadratic.unit_free
    penalty, point = problem.penalty.to(torch.float64).scaled(unit), weight * unit
    residual = quadratic.residual(point)
    values, slack = quadratic.values(point, residual), penalty.values(point)
    gaps = gaps_on_kept(quadratic, penalty, point, residual, values, slack)
    return gaps, values + slack


def excesses(problem, weight, best):
    """How much each row [m] of `weight` is above that of `best`."""
    values = [problem.quadratic.values(point) + problem.penalty.values(point) for point in (weight, best)]
    return values[0] - values[1]


FAR = st.sampled_from((0.0, 1e-6, 1e-3, 1e-1, 3.0))
PARTS = st.sampled_from((0.0, 0.5, 1.0))


@given(seeds, st.sampled_from((5, 9, 12, 40)), FAR, PARTS)
def test_a_bound_on_what_is_kept_is_never_too_small(seed, tokens, radius, part):
    problem = reweighted(make_layer("full rank", 3, 12, seed, tokens=tokens).quadratic(), seed)
    best = make_solver("scipy").solve(problem).weight
    weight = part * best + radius * random(seed + 1, *problem.shape)
    gaps, objectives = kept_gaps(problem, weight)
    assert (gaps >= excesses(problem, weight, best) - 1e-9 * objectives).all()


@given(problems(TAME, PENALTIES), seeds, FAR, PARTS)
def test_nor_is_it_where_all_strengths_are_much_alike(case, seed, radius, part):
    _, problem = case
    best = make_solver("scipy").solve(problem).weight
    weight = part * best + radius * random(seed + 1, *problem.shape)
    weight = weight * problem.penalty.mask if isinstance(problem.penalty, Support) else weight
    gaps, objectives = kept_gaps(problem, weight)
    assert (gaps >= excesses(problem, weight, best) - 1e-9 * objectives).all()


@given(seeds, st.sampled_from((9, 12, 40)), st.sampled_from((1e-3, 1e-2, 0.1, 1.0)), st.sampled_from((1e-3, 0.1, 1.0)))
def test_nor_where_the_step_is_off_by_as_much_as_it_says(seed, tokens, radius, far):
    problem = reweighted(make_layer("full rank", 3, 12, seed, tokens=tokens).quadratic(), seed)
    best = make_solver("scipy").solve(problem).weight
    weight = best + radius * random(seed + 1, *problem.shape)
    exact = on_kept._least_squares

    def off(gram, kept, gradient, doubt):
        price, step, error, norm = exact(gram, kept, gradient, doubt)
        moved = far * random(seed + 2, *step.shape) * kept
        return price, step + moved, error + torch.linalg.vecdot(moved @ gram, moved).sqrt(), norm

    with patch.object(on_kept, "_least_squares", off):
        gaps, objectives = kept_gaps(problem, weight)
    assert (gaps >= excesses(problem, weight, best) - 1e-9 * objectives).all()


def test_nor_where_least_squares_on_what_is_kept_leave_the_domain_elsewhere():
    for seed, part in ((0, 0.9), (1, 0.0), (1, 0.5)):
        quadratic = make_layer("full rank", 3, 8, seed, tokens=40, mixing=1.0).quadratic()
        for strength in (0.1, 0.5):
            problem = Problem(quadratic, make_penalty("L1 of scaled columns", quadratic, seed, strength))
            best = make_solver("scipy").solve(problem).weight
            gaps, _ = kept_gaps(problem, part * best)
            assert (gaps >= (1 - 1e-9) * excesses(problem, part * best, best)).all()


@pytest.mark.parametrize("tokens", [9, 14, 20])
def test_on_few_tokens_entries_next_to_free_do_not_make_a_gap_loose(tokens):
    # At a strength of 1e-60 the residual is above it by a rounding error, and no factor scales that into its box.
    layer = make_layer("full rank", 4, 24, seed=3, tokens=tokens)
    problem = reweighted(layer.quadratic(), seed=3)
    assert problem.quadratic.unit_free[0].factor is None
    solution = make_solver("fista").solve(problem)
    assert solution.status is Status.SOLVED
    exact = make_solver("fista", tolerance=1e-10).solve(problem)
    assert exact.status is Status.SOLVED
    excess = problem.value(solution.weight) - problem.value(exact.weight)
    assert excess <= solution.certificate.gap <= 1e-4 * problem.value(solution.weight)
    oracle = make_solver("cvxpy").solve(problem)
    assert oracle.status is Status.SOLVED
    assert problem.value(exact.weight) == pytest.approx(problem.value(oracle.weight), rel=1e-9)


def test_an_ill_conditioned_answer_is_proven_early():
    directions = torch.linalg.qr(random(0, 40, 40)).Q * torch.logspace(0, -5, 40, dtype=torch.float64)[:, None]
    x, w = random(1, 100, 40) @ directions, random(2, 4, 40)
    y = x @ w.T
    problem = reweighted(Quadratic.least_squares(x, y + 0.05 * y.std() * random(3, 100, 4), w), seed=4)
    assert problem.quadratic.unit_free[0].factor is not None
    weight = make_solver("fista", tolerance=0, max_iterations=1600).solve(problem).weight
    assert certify(problem, weight).gap <= rows_of(problem, weight).sum() / 100


@pytest.mark.parametrize("kept", [0, 1])
def test_rows_that_keep_nothing_have_a_bound_too(kept):
    layer = make_layer("full rank", 2, 6, seed=0, tokens=3)
    problem = Problem(layer.quadratic(), L1(1e9))
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[:kept, 0] = 1.0
    gaps, objectives = kept_gaps(problem, weight)
    assert gaps.isfinite().all() and (gaps <= 1e-9 * objectives)[kept:].all()
    zero = certify(problem, torch.zeros_like(weight))
    assert zero.relative_gap <= 1e-12


@pytest.mark.parametrize(("apart", "iterations"), [(0.0, 4720), (1.0, 1780)])
def test_weights_leave_the_dearer_of_two_equal_columns_slowly_on_few_tokens(apart: float, iterations: int):
    """Nothing but the strengths tells such columns apart: docs/certificates.md says how long it takes."""
    x = random(2, 2, 8).repeat(1, 2) + apart * random(4, 2, 16)
    quadratic = Quadratic.least_squares(x, random(3, 2, 2))
    strength = 0.3 * float(quadratic.cross.abs().max()) * torch.logspace(-4, 0, 16, dtype=torch.float64)
    problem = Problem(quadratic, L1(strength))
    solution = FISTA(max_iterations=10_000).solve(problem)
    assert solution.status is Status.SOLVED and solution.iterations == pytest.approx(iterations, rel=0.2)
    assert FISTA().solve(problem).status is (Status.SOLVED if apart else Status.ITERATION_LIMIT)
    assert apart or not solution.weight[:, 8:].any()
