from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PENALTIES, make_problem, problems, random, seeds

from convexprune.core._certificate import certify
from convexprune.core._penalty import L1
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.solvers import Status, make_solver
from convexprune.solvers._fista import FISTA

ROUNDING = 1e-12  # float64, a handful of operations
LONG = 1e-9  # float64, hundreds of iterations
L1S = PENALTIES[:3]
FEW = settings(max_examples=10)


def textbook(iterations, **settings):
    """Exactly so many iterations of the algorithm as published, whatever the gap."""
    return FISTA(
        tolerance=0, max_iterations=iterations, check_every=iterations + 1, scale=False, restart=False, **settings
    )


# The golden problem: 1/2 v H v' - g v' + strength |v|_1 about an anchor, with eigenvalues 3 and 1 and L = 3.03.
GRAM, CROSS, ANCHOR, STRENGTH, LIPSCHITZ = ((2.0, 1.0), (1.0, 2.0)), (3.0, -1.0), (0.5, -0.25), 0.2, 3.03
START = (1.0, 1.0)
GOLDEN = (
    (1.181518151815, -0.254125412541),
    (1.657125118452, -0.740352253047),
    (2.070036735638, -1.153398643112),
)


def golden_problem():
    tensor = torch.tensor
    quadratic = Quadratic(
        tensor(GRAM, dtype=torch.float64),
        tensor([CROSS], dtype=torch.float64),
        tensor([20.0], dtype=torch.float64),
        tensor([ANCHOR], dtype=torch.float64),
    )
    return Problem(quadratic, L1(STRENGTH))


def slow_fista(iterations, momentum):
    """The textbook, number by number; `momentum` maps (t_k, t_k+1) to the factor of the extrapolation."""
    z, y, t = list(START), list(START), 1.0
    for _ in range(iterations):
        displaced = [y[0] - ANCHOR[0], y[1] - ANCHOR[1]]
        new = []
        for j in range(2):
            gradient = displaced[0] * GRAM[0][j] + displaced[1] * GRAM[1][j] - CROSS[j]
            moved = y[j] - gradient / LIPSCHITZ
            threshold = STRENGTH / LIPSCHITZ
            new.append(moved - threshold if moved > threshold else moved + threshold if moved < -threshold else 0.0)
        t_next = (1 + sqrt(1 + 4 * t * t)) / 2
        y = [new[j] + momentum(t, t_next) * (new[j] - z[j]) for j in range(2)]
        z, t = new, t_next
    return z


def published(t, t_next):
    return (t - 1) / t_next


def nearest(iterates):
    """Whether three iterates are the golden ones."""
    return all(
        abs(a - b) <= LONG for row, gold in zip(iterates, GOLDEN, strict=True) for a, b in zip(row, gold, strict=True)
    )


def test_the_golden_lipschitz_constant_is_the_one_in_use():
    assert golden_problem().quadratic.lipschitz == pytest.approx(LIPSCHITZ, rel=ROUNDING)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_first_iterates_are_those_of_the_textbook(iterations):
    start = torch.tensor([START], dtype=torch.float64)
    found = textbook(iterations).solve(golden_problem(), start).weight
    torch.testing.assert_close(found[0].tolist(), slow_fista(iterations, published), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found[0].tolist(), list(GOLDEN[iterations - 1]), rtol=0, atol=LONG)


def test_three_iterates_tell_fista_from_its_look_alikes():
    look_alikes = {
        "ISTA": lambda t, t_next: 0.0,
        "t / t_next": lambda t, t_next: t / t_next,
        "(t - 1) / t": lambda t, t_next: (t - 1) / t,
        "(t_next - 1) / t_next": lambda t, t_next: (t_next - 1) / t_next,
    }
    assert nearest([slow_fista(k, published) for k in (1, 2, 3)])
    for name, momentum in look_alikes.items():
        assert not nearest([slow_fista(k, momentum) for k in (1, 2, 3)]), name


def hard_problem(seed, at):
    """A quadratic whose error sits in the direction that gradient descent finds hardest to halve in `at` steps."""
    n = 6
    basis = torch.linalg.qr(random(seed, n, n)).Q
    values = torch.logspace(0, -6, n, dtype=torch.float64)
    values[1] = 1 / (2 * at + 1)
    coefficients = torch.full((n,), 0.01, dtype=torch.float64)
    coefficients[1] = 1.0
    gram = basis * values @ basis.T
    target = (basis @ coefficients)[None]
    quadratic = Quadratic((gram + gram.T) / 2, target @ gram, (target @ gram * target).sum(1))
    return Problem(quadratic, L1(1e-9)), target


BOUND_AT = (1, 2, 5, 20, 100, 400)


def ratio_to_bound(problem, weight, best, iterations):
    """F(x_k) - F* over 2 L |x_0 - x*|^2 / (k + 1)^2, from x_0 = 0."""
    bound = 2 * problem.quadratic.lipschitz * float(best.square().sum()) / (iterations + 1) ** 2
    return (problem.value(weight) - problem.value(best)) / bound


@pytest.mark.parametrize("iterations", BOUND_AT)
@settings(max_examples=5)
@given(seeds)
def test_the_error_falls_as_the_square_of_the_iterations_where_it_is_hardest(iterations, seed):
    problem, target = hard_problem(seed, iterations)
    best = make_solver("scipy").solve(problem).weight
    weight = textbook(iterations).solve(problem, torch.zeros_like(target)).weight
    assert ratio_to_bound(problem, weight, best, iterations) <= 1


def test_plain_gradient_descent_would_break_that_bound():
    problem, target = hard_problem(0, 400)
    best = make_solver("scipy").solve(problem).weight
    weight, step = torch.zeros_like(target), 1 / problem.quadratic.lipschitz
    for _ in range(400):
        weight = problem.penalty.prox(weight + step * problem.quadratic.residual(weight), step)
    assert ratio_to_bound(problem, weight, best, 400) > 2


@FEW
@given(problems(penalties=L1S), st.sampled_from(BOUND_AT))
def test_the_error_falls_as_the_square_of_the_iterations_on_random_layers(case, iterations):
    _, problem = case
    best = make_solver("scipy").solve(problem).weight
    start = torch.zeros_like(best)
    weight = textbook(iterations).solve(problem, start).weight
    excess = problem.value(weight) - problem.value(best)
    bound = 2 * problem.quadratic.lipschitz * float(best.square().sum()) / (iterations + 1) ** 2
    assert excess <= bound + LONG * problem.value(start)


@pytest.mark.parametrize("restart", [False, True])
@FEW
@given(case=problems(penalties=L1S[:2]))
def test_rows_do_not_influence_each_other(restart, case):
    _, problem = case
    q = problem.quadratic
    solver = FISTA(tolerance=0, max_iterations=150, check_every=151, restart=restart)
    together = solver.solve(problem).weight
    for i in range(problem.shape[0]):
        row = slice(i, i + 1)
        alone = Quadratic(q.gram, q.cross[row], q.energy[row], None if q.anchor is None else q.anchor[row])
        found = solver.solve(Problem(alone, problem.penalty)).weight
        torch.testing.assert_close(found, together[row], rtol=LONG, atol=LONG * float(together.abs().max()))


@FEW
@given(problems(("full rank", "ill-conditioned"), L1S))
def test_restarts_forget_the_momentum_row_by_row_and_solve_no_slower(case):
    _, problem = case
    with_restart, without = (
        FISTA(tolerance=1e-8, max_iterations=20_000, restart=r).solve(problem).iterations for r in (True, False)
    )
    assert with_restart <= without + 20  # one check of the gap


@pytest.mark.parametrize("restart", [False, True])
@FEW
@given(case=problems(("full rank",), PENALTIES))
def test_scaled_coordinates_are_the_same_problem(restart, case):
    _, problem = case
    first, second = (
        FISTA(tolerance=1e-8, max_iterations=5000, scale=s, restart=restart).solve(problem) for s in (True, False)
    )
    # Both are within their certified gaps of one optimum, also where the iterations of the slower one run out.
    certified = max(first.certificate.gap, second.certificate.gap)
    assert first.certificate.primal == pytest.approx(second.certificate.primal, rel=1e-8, abs=certified)


def test_scaled_coordinates_solve_badly_scaled_inputs_in_far_fewer_iterations():
    _, problem = make_problem("ill-conditioned", "L1 of scaled columns", 4, 8, 1, 0.1, 0.3)
    scaled = FISTA(tolerance=1e-6, max_iterations=3000).solve(problem)
    plain = FISTA(tolerance=1e-6, max_iterations=3000, scale=False).solve(problem)
    assert scaled.status is Status.SOLVED
    assert plain.status is Status.ITERATION_LIMIT


def test_a_coefficient_that_is_negatively_correlated_is_solved_too():
    # Two inputs of correlation -0.9: the largest eigenvector has mixed signs.
    gram = torch.tensor([[1.0, -0.9], [-0.9, 1.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    problem = Problem(Quadratic(gram, target, target.square().sum(1) * 10), L1(0.01))
    assert FISTA(tolerance=1e-8).solve(problem).status is Status.SOLVED


def test_too_few_iterations_end_at_the_limit():
    _, problem = make_problem("full rank", "L1", 2, 6, 3, 0.1, 0.3)
    solution = FISTA(tolerance=1e-12, max_iterations=3).solve(problem)
    assert (solution.status, solution.iterations) == (Status.ITERATION_LIMIT, 3)


def test_a_solution_that_is_good_enough_at_the_limit_counts_as_solved():
    _, problem = make_problem("full rank", "L1", 2, 6, 3, 0.1, 0.3)
    solution = FISTA(tolerance=1e-4, max_iterations=1000, check_every=5000).solve(problem)
    assert (solution.status, solution.iterations) == (Status.SOLVED, 1000)


def test_the_loop_stops_at_the_first_check_that_meets_the_tolerance():
    _, problem = make_problem("full rank", "L1", 2, 6, 3, 0.1, 0.3)
    loose, tight = (FISTA(tolerance=t, check_every=7).solve(problem).iterations for t in (1e-2, 1e-6))
    assert 0 < loose < tight
    assert loose % 7 == tight % 7 == 0


def test_products_count_one_an_iteration_one_a_check_and_one_certificate():
    _, problem = make_problem("full rank", "L1", 2, 6, 3, 0.1, 0.3)
    solver = FISTA(tolerance=0, max_iterations=10, check_every=5)
    assert solver.solve(problem, torch.zeros(2, 6, dtype=torch.float64)).products == 10 + 2 + 1
    assert solver.solve(problem).products == 9 + 2 + 1  # at the anchor, the gradient is known


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("iterations", [1, 4])
def test_to_advance_is_to_solve_from_a_residual_that_is_known(scale, iterations):
    _, problem = make_problem("full rank", "L1", 3, 6, 3, 0.1, 0.3)
    solver = FISTA(tolerance=0, max_iterations=iterations, scale=scale, precise=False)
    start = torch.ones(3, 6, dtype=torch.float64)
    solution = solver.solve(problem, start)
    known = problem.quadratic.residual(start)
    for certified in (False, True):
        step = solver.step(problem, start, known, certified)
        torch.testing.assert_close(step.weight, solution.weight)
        torch.testing.assert_close(step.residual, problem.quadratic.residual(step.weight))
        assert step.products == solution.products - 1  # that of the start is known
        if certified:
            assert step.solution is not None and step.solution.certificate.gap == pytest.approx(
                solution.certificate.gap, rel=1e-6
            )
        else:
            assert step.solution is None


def test_a_certificate_does_not_trust_the_residual_at_the_start():
    _, problem = make_problem("full rank", "L1", 3, 6, 3, 0.1, 0.3)
    start = torch.ones(3, 6, dtype=torch.float64)
    wrong = problem.quadratic.residual(start) + 1
    found = FISTA(tolerance=0, max_iterations=3, precise=False).step(problem, start, wrong, certified=True).solution
    assert found is not None and found.residual is not None
    torch.testing.assert_close(found.residual, problem.quadratic.residual(found.weight))
    own = certify(problem, found.weight, precise=False)
    assert (found.certificate.primal, found.certificate.gap) == pytest.approx((own.primal, own.gap))


@FEW
@given(problems(("full rank",), L1S))
def test_a_start_at_the_solution_stays_there(case):
    layer, problem = case
    best = FISTA(tolerance=1e-14, max_iterations=20_000).solve(problem).weight
    after = textbook(50).solve(problem, best).weight
    atol = 1e-5 * float(layer.weight.abs().max())  # the square root of the gap
    torch.testing.assert_close(after, best, rtol=0, atol=atol)


@pytest.mark.parametrize("check_every", [5, 1000])
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("tensor", ["gram", "cross"])
def test_data_that_is_not_finite_is_a_status(tensor, value, check_every):
    _, problem = make_problem("full rank", "L1", 2, 6, 3, 0.1, 0.3)
    tensors = {name: getattr(problem.quadratic, name).clone() for name in ("gram", "cross", "energy")}
    tensors[tensor][0, 0] = value
    solution = FISTA(max_iterations=10, check_every=check_every).solve(
        Problem(Quadratic(**tensors, checked=False), L1(0.1))
    )
    assert solution.status is Status.NON_FINITE
