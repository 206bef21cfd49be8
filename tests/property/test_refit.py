from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_layer, make_problem, problems, random, seeds, sizes

from convexprune.core._penalty import Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.solvers import Status
from convexprune.solvers._cg import ConjugateGradient

TIGHT = ConjugateGradient(tolerance=1e-12, max_iterations=200)
SOLVED = 1e-6  # float64 normal equations of condition up to 1e6 or so
CERTIFIED = 1e-8  # relative gap: the square of the solver's tolerance, times the condition number


def by_cholesky(problem, mask):
    """The minimiser of every row on its support, by the normal equations of the support alone."""
    plain = problem.quadratic.at(None)
    weight = torch.zeros_like(plain.cross)
    for i, row in enumerate(mask):
        kept = row.nonzero()[:, 0]
        if len(kept):
            factor = torch.linalg.cholesky(plain.gram[kept][:, kept])
            weight[i, kept] = torch.cholesky_solve(plain.cross[i, kept, None], factor)[:, 0]
    return weight


@given(problems(("full rank",), ("Support",)))
def test_the_refit_is_the_exact_solution_of_every_row(case):
    _, problem = case
    assert isinstance(problem.penalty, Support)
    expected = by_cholesky(problem, problem.penalty.mask)
    found = TIGHT.solve(problem).weight
    torch.testing.assert_close(found, expected, rtol=SOLVED, atol=SOLVED * float(expected.abs().max()))


@given(problems(("rank deficient", "ill-conditioned"), ("Support",)))
def test_a_singular_or_badly_scaled_refit_has_the_least_value(case):
    layer, problem = case
    assert isinstance(problem.penalty, Support)
    x, z = layer.pruned, layer.targets()
    found = problem.quadratic.values(TIGHT.solve(problem).weight)
    for i, row in enumerate(problem.penalty.mask):
        scale = x[:, row].norm(dim=0)
        best = torch.zeros(0, dtype=x.dtype)
        if row.any():
            best = torch.linalg.lstsq(x[:, row] / scale, z[:, i, None], driver="gelsd").solution[:, 0] / scale
        least = float((z[:, i] - x[:, row] @ best).square().mean() / 2)
        assert float(found[i]) == pytest.approx(least, rel=SOLVED, abs=1e-12 * layer.energy)


@given(st.builds(make_layer, st.just("full rank"), sizes, sizes, seeds))
def test_a_full_support_gives_the_minimiser(layer):
    quadratic = layer.quadratic()
    found = TIGHT.solve(Problem(quadratic, Support(torch.ones_like(layer.weight, dtype=torch.bool)))).weight
    expected = layer.weight + torch.linalg.solve(quadratic.gram, quadratic.cross.T).T
    torch.testing.assert_close(found, expected, rtol=SOLVED, atol=SOLVED * float(expected.abs().max()))


def test_an_empty_row_stays_empty_and_leaves_the_others_alone():
    _, problem = make_problem("full rank", "Support", 3, 6, 0, 0.1, 0.3)
    mask = random(1, 3, 6) > 0
    mask[1] = False
    found = TIGHT.solve(Problem(problem.quadratic, Support(mask))).weight
    assert not found[1].any()
    torch.testing.assert_close(found, by_cholesky(problem, mask), rtol=SOLVED, atol=SOLVED)


def test_an_empty_support_is_zero_and_needs_no_iteration():
    _, problem = make_problem("full rank", "Support", 3, 6, 0, 0.1, 0.3)
    solution = TIGHT.solve(Problem(problem.quadratic, Support(torch.zeros(3, 6, dtype=torch.bool))))
    assert not solution.weight.any()
    assert (solution.iterations, solution.status) == (0, Status.SOLVED)


@given(problems(("full rank",), ("Support",)), seeds)
def test_the_start_does_not_matter(case, seed):
    _, problem = case
    first, second = TIGHT.solve(problem).weight, TIGHT.solve(problem, 10 * random(seed, *problem.shape)).weight
    torch.testing.assert_close(first, second, rtol=SOLVED, atol=SOLVED * float(first.abs().max() + 1))


@given(problems(("full rank",), ("Support",)))
def test_the_certificate_of_a_refit_is_small(case):
    layer, problem = case
    certificate = TIGHT.solve(problem).certificate
    assert certificate.gap <= CERTIFIED * max(certificate.primal, 1e-9 * layer.energy)


@given(problems(("full rank",), ("Support",)))
def test_nothing_outside_the_support_moves_from_zero(case):
    _, problem = case
    assert isinstance(problem.penalty, Support)
    for iterations in (0, 1, 3):
        weight = ConjugateGradient(max_iterations=iterations).solve(problem).weight
        assert not weight[~problem.penalty.mask].any()


@given(problems(("full rank",), ("Support",)))
def test_more_iterations_are_never_worse(case):
    _, problem = case
    values = [problem.value(ConjugateGradient(0, k).solve(problem).weight) for k in range(6)]
    for before, after in pairwise(values):
        assert after <= before * (1 + 1e-9)


@given(st.integers(1, 6), seeds)
def test_as_many_iterations_as_inputs_are_enough_in_exact_arithmetic(n, seed):
    _, problem = make_problem("full rank", "Support", 3, n, seed, 0.1, 0.3)
    assert isinstance(problem.penalty, Support)
    found = ConjugateGradient(tolerance=0, max_iterations=n).solve(problem).weight
    expected = by_cholesky(problem, problem.penalty.mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "kept"), [(14, 0.5), (14, 0.3), (5, 0.9), (20, 1.0)])
def test_on_fewer_tokens_than_inputs_it_ends_at_the_solution_nearest_to_the_start(dtype, tokens, kept):
    layer = make_layer("full rank", 6, 32, seed=1, tokens=tokens, mixing=0.2)
    x, w = layer.pruned.to(dtype), layer.weight.to(dtype)
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(2)) < kept
    q = Quadratic.least_squares(x, x @ w.T + 0.3 * random(3, tokens, 6).to(dtype), w)
    found = ConjugateGradient(0, 1000).solve(Problem(q, Support(mask)))
    assert found.iterations <= 200
    exact, scale = q.double, q.double.scale()
    gradient = exact.residual(w.double() * mask) / scale
    for i, row in enumerate(mask):
        gram = (exact.gram / scale / scale[:, None])[row][:, row]
        nearest = torch.linalg.pinv(gram, rtol=1e-5, hermitian=True) @ gradient[i, row]
        moved = ((found.weight - w).double()[i] * scale)[row]
        assert (moved - nearest).norm() <= 1e4 * torch.finfo(dtype).eps * nearest.norm()


def test_too_few_iterations_end_at_the_limit():
    _, problem = make_problem("full rank", "Support", 3, 8, 0, 0.1, 0.3)
    assert ConjugateGradient(1e-12, 1).solve(problem).status is Status.ITERATION_LIMIT


def test_data_that_is_not_finite_is_a_status():
    cross = torch.tensor([[float("nan"), 1.0]])
    problem = Problem(
        Quadratic(torch.eye(2), cross, torch.ones(1), checked=False), Support(torch.ones(1, 2, dtype=torch.bool))
    )
    assert ConjugateGradient().solve(problem).status is Status.NON_FINITE


@given(problems(("full rank",), ("Support",)), st.sampled_from((1e-2, 1e-4, 1e-6)))
def test_a_refit_stops_at_the_gap_that_it_promises_and_not_much_later(case, tolerance):
    _, problem = case
    solution = ConjugateGradient(tolerance, check_every=1).solve(problem)
    assert solution.status is Status.SOLVED and solution.certificate.relative_gap <= 1.01 * tolerance
    if solution.iterations > 1:  # where the last iteration gained much, the gap is tested after one more
        before = ConjugateGradient(0, solution.iterations - 2).solve(problem)
        assert before.certificate.relative_gap > 0.99 * tolerance
