"""What a gap is worth: in any units, on singular Gram matrices, near the optimum, and where rounding hides the rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PENALTIES, make_chain, make_layer, make_penalty, problems, random, seeds

from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem, certify
from convexprune.core._quadratic import Quadratic
from convexprune.solvers import Status, make_solver

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
