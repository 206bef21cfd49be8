from math import inf

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    KINDS,
    PENALTIES,
    make_layer,
    make_problem,
    problems,
    random,
    seeds,
    sizes,
)

from convexprune.core._certificate import Certificate, certify, row_gaps
from convexprune.core._penalty import L1, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._side_by_side import SideBySide
from convexprune.errors import ProblemError
from convexprune.solvers import Status, make_solver

ROUNDING = 1e-10  # of the objective and of the energy: float64, Gram matrices of condition up to 1e12 or so
SINGLE = 1e-5  # the same for data in float32
ORACLE = 1e-6  # what SciPy promises of its own solutions
NEGLIGIBLE = 1e-6  # of the energy: an objective below this is known to this times ORACLE at best
L1S = PENALTIES[:3]
TAME = ("full rank", "rank deficient")  # where data and Gram agree to rounding whatever the weight

radii = st.sampled_from((1e-3, 1.0, 30.0))


def rows_of(problem, weight):
    quadratic = problem.quadratic
    residual = quadratic.residual(weight)
    return row_gaps(problem, weight, residual, quadratic.values(weight, residual), problem.penalty.values(weight))


def feasible(problem, weight):
    return weight * problem.penalty.mask if isinstance(problem.penalty, Support) else weight


@given(problems(), seeds, radii)
def test_no_known_solution_is_below_the_dual_bound(case, seed, radius):
    layer, problem = case
    weight = feasible(problem, layer.weight + radius * random(seed, *problem.shape))
    best = problem.value(make_solver("scipy").solve(problem).weight)
    certificate = certify(problem, weight)
    assert certificate.dual <= best + ROUNDING * (best + certificate.primal)


@given(problems(), seeds)
def test_the_bound_holds_near_the_solution_too(case, seed):
    _, problem = case
    best = make_solver("scipy").solve(problem).weight
    near = feasible(problem, best * (1 + 1e-3 * random(seed, *problem.shape)))
    excess = problem.value(near) - problem.value(best)
    assert certify(problem, near).gap >= excess - ROUNDING * problem.value(near)


@given(problems(penalties=L1S))
def test_the_gap_of_an_oracle_solution_is_next_to_nothing(case):
    layer, problem = case
    certificate = certify(problem, make_solver("scipy").solve(problem).weight)
    assert certificate.gap <= ORACLE * max(certificate.primal, NEGLIGIBLE * layer.energy)


@given(sizes, sizes, seeds, st.booleans())
def test_gap_and_kkt_residual_vanish_at_the_solution_known_in_closed_form(m, n, seed, anchored):
    # With an identity Gram matrix the solution is the soft threshold of the target.
    target, anchor = random(seed, m, n), random(seed + 1, m, n)
    plain = Quadratic(torch.eye(n, dtype=torch.float64), target, target.square().sum(1))
    problem = Problem(plain.at(anchor if anchored else None), L1(0.5))
    certificate = certify(problem, L1(0.5).prox(target, 1.0))
    assert certificate.gap <= ROUNDING * m * n
    assert certificate.kkt_residual <= ROUNDING


@given(sizes, sizes, seeds)
def test_the_kkt_residual_is_large_away_from_the_solution(m, n, seed):
    target = random(seed, m, n)
    problem = Problem(Quadratic(torch.eye(n, dtype=torch.float64), target, target.square().sum(1)), L1(0.5))
    moved = L1(0.5).prox(target, 1.0)
    moved[0, 0] += target.norm() / 10
    assert certify(problem, moved).kkt_residual == pytest.approx(0.1)  # a unit Gram: one step undoes the move


@given(
    st.builds(
        make_problem, st.just("full rank"), st.sampled_from(PENALTIES), sizes, sizes, seeds, st.just(0.0), st.just(0.3)
    )
)
def test_without_a_penalty_the_gap_is_the_excess_itself(case):
    layer, problem = case
    problem = Problem(problem.quadratic, L1(0.0))
    best = layer.weight + torch.linalg.solve(problem.quadratic.gram, problem.quadratic.cross.T).T
    weight = random(0, *problem.shape)
    excess = problem.value(weight) - problem.value(best)
    assert certify(problem, weight).gap == pytest.approx(excess, rel=1e-6)


def data_gap(layer, strengths, weight):
    """P(V) - D(theta) of every row, from the tokens, for the residual r scaled into the dual ball: theta = s r.

    max_theta <theta, z> - |theta|^2 / 2  over  |X' theta|_j <= strength_j  is the dual of  |z - X v|^2 / 2 + penalty.
    """
    tokens = len(layer.pruned)
    x, z = layer.pruned / tokens**0.5, layer.targets() / tokens**0.5
    gaps = []
    for i, row in enumerate(weight):
        r = z[:, i] - x @ row
        slopes = (x.T @ r).abs()
        limits = [float(s / g) for s, g in zip(strengths[i], slopes, strict=True) if g > 0]
        s = min([*limits, max(0.0, float(r @ z[:, i] / (r @ r)))])
        primal = r @ r / 2 + (strengths[i] * row.abs()).sum()
        gaps.append(primal - (s * r @ z[:, i] - s * s * (r @ r) / 2))
    return torch.stack(gaps)


@given(problems(("rank deficient",), L1S), seeds, radii)
def test_the_gap_from_the_gram_matrix_is_the_gap_from_the_tokens(case, seed, radius):
    # Without a factor of the Gram matrix, only the residual scaled into the dual ball gives a bound.
    layer, problem = case
    assume(problem.quadratic.factor is None)
    weight = layer.weight + radius * random(seed, *problem.shape)
    assert isinstance(problem.penalty, L1)
    strengths = torch.as_tensor(problem.penalty.strength, dtype=torch.float64).expand(problem.shape)
    expected = data_gap(layer, strengths, weight)
    primal = problem.value(weight)
    torch.testing.assert_close(rows_of(problem, weight), expected, rtol=1e-6, atol=ROUNDING * primal)


@given(problems(("full rank",), L1S), seeds, radii)
def test_the_gap_is_never_above_the_gap_from_the_tokens(case, seed, radius):
    layer, problem = case
    weight = layer.weight + radius * random(seed, *problem.shape)
    assert isinstance(problem.penalty, L1)
    strengths = torch.as_tensor(problem.penalty.strength, dtype=torch.float64).expand(problem.shape)
    assert (rows_of(problem, weight) <= data_gap(layer, strengths, weight) + ROUNDING * problem.value(weight)).all()


@given(problems(TAME, L1S), seeds)
def test_the_gap_does_not_depend_on_the_units_of_the_inputs(case, seed):
    layer, problem = case
    weight, scale = layer.weight + random(seed, *problem.shape), random(seed + 1, problem.shape[1]).exp()
    other = Problem(problem.quadratic.scaled(scale), problem.penalty.scaled(scale))
    first, second = certify(problem, weight), certify(other, weight * scale)
    assert first.gap == pytest.approx(second.gap, rel=1e-6)
    assert first.kkt_residual == pytest.approx(second.kkt_residual, rel=1e-6)


@given(problems(TAME, L1S[:2]), seeds)
def test_the_gap_of_a_row_does_not_depend_on_the_other_rows(case, seed):
    layer, problem = case
    weight = layer.weight + random(seed, *problem.shape)
    quadratic, order = problem.quadratic, random(seed + 1, problem.shape[0]).argsort()
    anchor = None if quadratic.anchor is None else quadratic.anchor[order]
    permuted = Problem(
        Quadratic(quadratic.gram, quadratic.cross[order], quadratic.energy[order], anchor), problem.penalty
    )
    torch.testing.assert_close(rows_of(permuted, weight[order]), rows_of(problem, weight)[order], rtol=1e-6, atol=0)


@given(problems(TAME, L1S), seeds)
def test_the_gap_does_not_change_when_the_tokens_are_rotated(case, seed):
    layer, problem = case
    weight, tokens = layer.weight + random(seed, *problem.shape), len(layer.pruned)
    turn = torch.linalg.qr(random(seed + 1, tokens, tokens)).Q
    x, z = layer.pruned, layer.targets()
    first = Problem(Quadratic.least_squares(x, z), problem.penalty)
    second = Problem(Quadratic.least_squares(turn @ x, turn @ z), problem.penalty)
    assume((first.quadratic.factor is None) == (second.quadratic.factor is None))
    assert certify(first, weight).gap == pytest.approx(certify(second, weight).gap, rel=1e-6)


@given(problems(TAME, L1S), seeds)
def test_the_gap_does_not_depend_on_the_anchor(case, seed):
    layer, problem = case
    weight = layer.weight + random(seed, *problem.shape)
    moved = Problem(problem.quadratic.at(random(seed + 1, *problem.shape)), problem.penalty)
    first, second = certify(problem, weight), certify(moved, weight)
    assert first.gap == pytest.approx(second.gap, rel=1e-6, abs=ROUNDING * first.primal)


@given(problems(("full rank",), L1S), seeds)
def test_a_float32_problem_is_certified_as_its_float64_twin(case, seed):
    layer, problem = case
    q, weight = problem.quadratic, (layer.weight + random(seed, *problem.shape)).float()
    anchor = None if q.anchor is None else q.anchor.float()
    single = Problem(
        Quadratic(q.gram.float(), q.cross.float(), q.energy.float(), anchor), problem.penalty.to(torch.float32)
    )
    first, second = certify(single, weight), certify(problem, weight.double())
    assert first.primal == pytest.approx(second.primal, rel=SINGLE)
    assert first.gap == pytest.approx(second.gap, rel=1e-3)


def test_a_weight_outside_its_support_has_no_finite_certificate():
    _, problem = make_problem("full rank", "Support", 2, 4, seed=0, strength=0, change=0.3)
    certificate = certify(problem, torch.ones(2, 4, dtype=torch.float64))
    assert (certificate.primal, certificate.gap, certificate.kkt_residual) == (inf, inf, inf)
    assert (certificate.dual, certificate.relative_gap) == (-inf, inf)


@pytest.mark.parametrize("value", [float("nan"), inf])
def test_a_weight_that_is_not_finite_has_no_finite_certificate(value):
    _, problem = make_problem("full rank", "L1", 2, 4, seed=0, strength=0.1, change=0.3)
    weight = torch.zeros(2, 4, dtype=torch.float64)
    weight[1, 1] = value
    assert certify(problem, weight).gap == inf


def test_a_singular_problem_on_a_support_has_no_small_gap_off_its_solution():
    # No scaled residual is a dual point then, except zero, whose price is the whole value.
    layer, problem = make_problem("rank deficient", "Support", 2, 8, seed=0, strength=0, change=0.3)
    certificate = certify(problem, feasible(problem, layer.weight))
    assert certificate.gap >= certificate.primal > 0


def test_a_penalty_that_keeps_zero_optimal_is_certified_to_the_rounding_of_the_energy():
    layer = make_layer("full rank", 2, 4, seed=0)
    quadratic = layer.quadratic().at(None)
    problem = Problem(quadratic, L1(2 * float(quadratic.cross.abs().max())))
    certificate = certify(problem, torch.zeros(2, 4, dtype=torch.float64))
    assert certificate.gap == float(quadratic.rounding.sum())


def test_a_problem_that_costs_nothing_has_no_gap():
    zero = torch.zeros(2, 3)
    problem = Problem(Quadratic(torch.zeros(3, 3), zero, torch.zeros(2)), L1(1.0))
    certificate = certify(problem, zero)
    assert (certificate.gap, certificate.relative_gap, certificate.kkt_residual) == (0, 0, 0)


def test_a_certificate_in_the_problems_own_dtype_is_near_the_precise_one():
    layer, problem = make_problem("full rank", "L1", 3, 6, seed=0, strength=0.1, change=0.3)
    q = problem.quadratic
    assert q.anchor is not None
    single = Problem(Quadratic(q.gram.float(), q.cross.float(), q.energy.float(), q.anchor.float()), problem.penalty)
    rough, precise = (certify(single, 2 * layer.weight.float(), precise=p) for p in (False, True))
    assert rough.gap == pytest.approx(precise.gap, rel=1e-3)


def test_a_weight_of_another_shape_is_refused():
    _, problem = make_problem(KINDS[0], "L1", 2, 4, seed=0, strength=0.1, change=0.3)
    with pytest.raises(ProblemError, match=r"\[4, 2\]"):
        certify(problem, torch.zeros(4, 2))


@given(problems(("full rank",), ("L1", "Support")), seeds)
def test_inputs_that_are_always_zero_do_not_spoil_the_certificate(case, seed):
    _, problem = case
    q, n = problem.quadratic, problem.shape[1]
    assert q.anchor is not None
    wider = [torch.nn.functional.pad(t, (0, 1)) for t in (q.cross, q.anchor)]
    with_dead = Quadratic(torch.nn.functional.pad(q.gram, (0, 1, 0, 1)), wider[0], q.energy, wider[1])
    penalty = L1(0.1) if isinstance(problem.penalty, L1) else Support(torch.ones(problem.shape[0], n + 1) > 0)
    plain = L1(0.1) if isinstance(problem.penalty, L1) else Support(torch.ones(problem.shape) > 0)
    weight = random(seed, *problem.shape)
    alive = certify(Problem(q, plain), weight)
    assert certify(Problem(with_dead, penalty), torch.nn.functional.pad(weight, (0, 1))).gap == pytest.approx(alive.gap)


@given(st.sampled_from(("cg", "fista")), seeds, st.booleans())
def test_a_target_that_is_fitted_exactly_is_solved_where_the_digits_end(solver, seed, together):
    # The dense weight is in the support: the least value is zero, and no weight in float32 has it.
    layer, mask = make_layer("full rank", 3, 8, seed), random(seed + 1, 3, 8) > 0
    dense = (layer.weight * mask).float()
    single = Quadratic(layer.quadratic().gram.float(), torch.zeros(3, 8), torch.zeros(3), dense)
    problem = Problem(single, Support(mask))
    if together and solver == "cg":
        mask = mask.repeat(2, 1)
        problem = Problem(SideBySide.of([single] * 2), Support(mask))
    start = random(seed + 2, *problem.shape).float() * mask
    solution = make_solver(solver).solve(problem, start)
    certificate = solution.certificate
    assert solution.status is Status.SOLVED and certificate.relative_gap <= 1e-4
    assert certificate.resolution == pytest.approx(2**-23 * problem.quadratic.target_energy)
    assert certificate.primal <= 1e-3 * certificate.resolution or not bool(mask.any())


def test_where_the_target_is_not_fitted_exactly_the_gap_is_relative_to_the_objective():
    _, problem = make_problem("full rank", "L1", 3, 6, seed=0, strength=0.1, change=0.3)
    q = problem.quadratic
    assert q.anchor is not None
    single = Problem(Quadratic(q.gram.float(), q.cross.float(), q.energy.float(), q.anchor.float()), problem.penalty)
    certificate = certify(single, q.anchor.float())
    assert 0 < certificate.resolution < 1e-5 * certificate.primal
    assert certificate.relative_gap == certificate.gap / certificate.primal


def test_at_an_objective_of_zero_the_gap_is_relative_to_the_resolution():
    assert Certificate(0.0, 0.25, 0.0, 0.5).relative_gap == 0.5
    assert Certificate(0.0, 1e-20, 0.0).relative_gap == Certificate(inf, inf, 0.0, 1e-16).relative_gap == inf
