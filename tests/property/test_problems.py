"""The public problem set: values are what they are said to be, and every solver finds them."""

import pytest

from convexprune import problems
from convexprune.core._problem import certify
from convexprune.errors import ProblemError
from convexprune.solvers import make_solver

SOLVERS = {
    "fista": {"tolerance": 1e-8, "max_iterations": 20_000},
    "cg": {"tolerance": 1e-8, "max_iterations": 1000},
    "scipy": {},
    "cvxpy": {},
}


@pytest.mark.parametrize("name", problems.names())
def test_the_solution_has_the_value_and_is_certified(name):
    named = problems.load(name)
    assert named.problem.value(named.solution) == pytest.approx(named.value, rel=1e-9)
    assert certify(named.problem, named.solution).gap <= 1e-9 * named.value


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_passes_in_one_line(name):
    results = list(problems.check(make_solver(name, **SOLVERS[name])))
    assert len(results) >= 4
    assert all(result.passed for result in results), results


def test_a_solver_that_stops_too_early_does_not_pass():
    assert not all(result.passed for result in problems.check(make_solver("fista", tolerance=0, max_iterations=2)))


def test_an_unknown_problem_is_refused_with_a_guess():
    with pytest.raises(ProblemError, match="Did you mean 'single-column'"):
        problems.load("single-colum")


def test_there_are_closed_forms_and_real_ones():
    assert {"orthogonal-design", "single-column", "diagonal-gram"} <= set(problems.names())
    assert sum(name.startswith("opt-") for name in problems.names()) >= 6
