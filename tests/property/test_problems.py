"""The public problem set: values are what they are said to be, and every solver finds them."""

import pytest
import torch

from convexprune import problems
from convexprune.core._certificate import certify
from convexprune.core._group_lasso import GroupLasso
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.errors import ProblemError, UnsupportedError
from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, solver_names

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
    results = list(problems.check(make_solver(name, **SOLVERS[name]), 1e-6))
    assert len(results) >= 4
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("name", solver_names())
def test_every_solver_of_ours_keeps_by_default_what_it_promises(name):
    solver = make_solver(name)
    results = list(problems.check(solver))
    assert {result.tolerance for result in results} == {solver.tolerance}  # pyright: ignore[reportAttributeAccessIssue]
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("settings", [{}, {"tolerance": 0}, {"tolerance": 1e-9}])
def test_a_solver_that_stops_too_early_does_not_pass(settings):
    assert not all(result.passed for result in problems.check(make_solver("fista", max_iterations=2, **settings)))


class Off(AbstractSolver):
    """A user's own, without a tolerance: the solutions, of which one part is off."""

    def __init__(self, off: float, takes: tuple[type[AbstractPenalty], ...] = (L1, Support)) -> None:
        self.off, self.takes = off, takes

    @property
    def penalties(self):
        return self.takes

    def solve(self, problem, start=None):
        weight = make_solver("scipy").solve(problem).weight
        weight = torch.where(weight == 0, self.off, weight)
        return Solution(weight, Status.SOLVED, certify(problem, weight), 0, 0, 0.0)


def test_a_users_solver_without_a_tolerance_is_judged_at_one_in_ten_thousand():
    assert all(result.passed and result.tolerance == 1e-4 for result in problems.check(Off(0.0)))
    assert not any(r.passed for r in problems.check(Off(1e-3)) if "support" in r.name)  # an infinite objective
    assert not all(result.passed for result in problems.check(Off(0.1, (L1,))))
    assert all(result.passed for result in problems.check(Off(0.1, (L1,)), tolerance=1.0))


def test_an_objective_below_the_least_value_does_not_pass(monkeypatch):
    monkeypatch.setattr(Problem, "value", lambda self, weight: 1e-9)
    assert not any(result.passed for result in problems.check(Off(0.0)))


def test_a_solver_that_would_be_tested_on_nothing_is_refused():
    with pytest.raises(UnsupportedError, match="Off takes no penalty"):
        list(problems.check(Off(0.0, (GroupLasso,))))


def test_an_unknown_problem_is_refused_with_a_guess():
    with pytest.raises(ProblemError, match="Did you mean 'single-column'"):
        problems.load("single-colum")


def test_there_are_closed_forms_and_real_ones():
    assert {"orthogonal-design", "single-column", "diagonal-gram"} <= set(problems.names())
    assert sum(name.startswith("opt-") for name in problems.names()) >= 6
