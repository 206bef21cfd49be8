"""Solvers that are not ours, whose answers are certified by us; and settings, of any solver, that are refused."""

from dataclasses import replace

import cvxpy
import pytest
import torch
from strategies import make_problem, random

from convexprune.core._certificate import Certificate, certify
from convexprune.core._group_lasso import GroupLasso
from convexprune.core._nuclear import NuclearNorm
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
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
    solution = solve(problem, Stranger(boast))
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
        solve(problem, Stranger(answer))


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


@pytest.mark.parametrize("name", ["L1", "group LASSO", "group LASSO of blocks", "reverse Huber"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1e-8, 1e-8), (1e8, 1e8), (1.0, 1e6), (1e-8, 1e8)])
def test_cvxpy_solves_in_any_units(name, inputs, outputs):
    quadratic = Quadratic.least_squares(inputs * random(0, 30, 4), outputs * random(1, 30, 2))
    slope, price = 0.1 * float(quadratic.cross.abs().max()), torch.full((4,), 0.01 * outputs**2, dtype=torch.float64)
    penalty = {
        "L1": L1(slope),
        "group LASSO": GroupLasso(slope),
        "group LASSO of blocks": GroupLasso(slope, block=2),
        "reverse Huber": ReverseHuber(0.3 * quadratic.gram.diagonal(), price),
    }[name]
    solution = make_solver("cvxpy").solve(Problem(quadratic, penalty))
    assert solution.status is Status.SOLVED and solution.certificate.relative_gap <= 1e-8


@pytest.mark.parametrize("engine", ["CLARABEL", "OSQP", "SCS"])
@pytest.mark.parametrize("kept", [[0, 0], [1, 0], [1, 1]])
def test_cvxpy_takes_a_support_without_a_live_input(engine: str, kept: list[int]):
    nothing = Quadratic(torch.zeros(2, 2), torch.zeros(1, 2), torch.zeros(1))
    solution = make_solver("cvxpy", engine=engine).solve(Problem(nothing, Support(torch.tensor([kept]).bool())))
    assert solution.certificate.primal == solution.certificate.gap == 0 and not solution.weight.any()


PANIC = type("PanicException", (BaseException,), {})  # as in pyo3, of Clarabel


@pytest.mark.parametrize("cause", [cvxpy.SolverError("no"), PANIC("no")])
def test_an_engine_that_raises_is_a_status(cause: BaseException, monkeypatch):
    def raises(*_, **__):
        raise cause

    monkeypatch.setattr(cvxpy.Problem, "solve", raises)
    quadratic = Quadratic.least_squares(random(0, 30, 4), random(1, 30, 2))
    for penalty in (L1(0.1), NuclearNorm(0.1)):
        assert make_solver("cvxpy").solve(Problem(quadratic, penalty)).status is Status.FAILED


def test_inputs_that_are_all_zero_make_no_complaint(capfd):
    zero = torch.zeros(2, 3, dtype=torch.float64)
    problem = Problem(Quadratic(torch.zeros(3, 3, dtype=torch.float64), zero, zero[:, 0]), L1(0.1))
    assert not make_solver("scipy").solve(problem).weight.any()
    assert capfd.readouterr() == ("", "")
