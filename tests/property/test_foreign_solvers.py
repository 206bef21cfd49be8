"""Solvers that are not ours, whose answers are certified by us; and settings, of any solver, that are refused."""

from dataclasses import replace

import pytest
import torch
from strategies import make_problem

from convexprune.core._penalty import AbstractPenalty
from convexprune.core._problem import Certificate, certify
from convexprune.errors import ProblemError, RecipeError
from convexprune.solvers import AbstractSolver, Solution, Status, make_solver, solve


class Stranger(AbstractSolver):
    """A user's solver, which says what it likes."""

    def __init__(self, answer):
        self.answer = answer

    @property
    def penalties(self):
        return (AbstractPenalty,)

    def solve(self, problem, start=None):
        return self.answer


def test_the_certificate_of_a_users_solver_is_ours():
    _, problem = make_problem("full rank", "L1", 2, 4, 0, 0.1, 0.3)
    wrong = torch.ones(2, 4, dtype=torch.float64)
    boast = Solution(wrong, Status.SOLVED, Certificate(0.0, 0.0, 0.0), 1, 1, 0.0, residual=wrong)
    solution = solve(Stranger(boast), problem)
    assert solution.certificate == certify(problem, wrong)
    assert (solution.status, solution.residual) == (Status.UNCONFIRMED, None)
    modest = replace(boast, weight=make_solver("scipy").solve(problem).weight, status=Status.ITERATION_LIMIT)
    advanced = Stranger(modest).step(problem, wrong, wrong).solution
    assert advanced is not None and advanced.status is Status.SOLVED


@pytest.mark.parametrize("answer", [None, torch.zeros(2, 4), torch.zeros(3, 3)])
def test_what_is_no_solution_is_refused(answer):
    _, problem = make_problem("full rank", "L1", 2, 4, 0, 0.1, 0.3)
    if answer is not None and answer.shape == (3, 3):
        answer = Solution(answer, Status.SOLVED, Certificate(0.0, 0.0, 0.0), 1, 1, 0.0)
    with pytest.raises(ProblemError, match=r"Stranger\.solve"):
        solve(Stranger(answer), problem)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fista", {"tolerance": -1.0}),
        ("fista", {"tolerance": float("nan")}),
        ("admm", {"tolerance": "1e-8"}),
        ("fista", {"check_every": 0}),
        ("cg", {"max_iterations": -1}),
        ("cg", {"max_iterations": 1.5}),
        ("cvxpy", {"engine": "GUROBI"}),
        ("cvxpy", {"engine": "clarabell"}),
        ("scipy", {"tolerance": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        make_solver(name, **settings)


def test_an_unknown_setting_names_those_that_there_are():
    with pytest.raises(RecipeError, match=r"'tol'.*Known: check_every, max_iterations"):
        make_solver("fista", tol=1e-8)
