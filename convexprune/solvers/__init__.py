"""Solvers by name. To add a solver: a file here, a line in `_PLACES`, a line in tests/property/test_solvers.py."""

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from math import inf
from typing import Any

from convexprune._progress import begin
from convexprune._setting_types import make
from convexprune.core import Problem
from convexprune.core._arrays import TENSORS, Array
from convexprune.errors import DependencyError, ProblemError, RecipeError, install_hint, unknown
from convexprune.solvers._base import AbstractSolver, Solution, Status, run

_PLACES = {
    "admm": ("_admm", "ADMM"),
    "auto": ("_auto", "Auto"),
    "cg": ("_cg", "ConjugateGradient"),
    "cvxpy": ("_cvxpy", "CVXPY"),
    "fista": ("_fista", "FISTA"),
    "scipy": ("_scipy", "SciPy"),
    "sklearn": ("_sklearn", "ScikitLearn"),
    "working-set": ("_working_set", "WorkingSet"),
}


def solver_names() -> list[str]:
    """The names that `make_solver` knows."""
    return sorted(_PLACES)


def make_solver(name: str, **settings: Any) -> AbstractSolver:
    """The solver of that name; its module, and a foreign library behind it, is imported only now.

    Args:
        name: one of `solver_names()`.
        settings: those of its class, by name.

    Returns:
        The solver.

    Raises:
        RecipeError: there is no such solver, or it has no such setting.
        DependencyError: the library behind it is not installed.
    """
    if name not in _PLACES:
        raise RecipeError(unknown("solver", name, _PLACES))
    module, cls = _PLACES[name]
    try:
        solver = getattr(import_module(f"convexprune.solvers.{module}"), cls)
    except ModuleNotFoundError as cause:
        if cause.name != name:
            raise
        raise DependencyError(f"The solver {name!r} needs {name}, an extra: {install_hint(name)}") from cause
    return make(solver, name, settings)


def solve(
    problem: Problem, solver: str | AbstractSolver = "auto", start: Array | None = None, **settings: Any
) -> Solution:
    """Solve a problem, and answer in the kind of arrays in which the problem was stated.

    A problem of NumPy arrays gets a NumPy weight, a one-dimensional response a one-dimensional weight.

    Args:
        problem: min q + p.
        solver: one of `solver_names()`, or a solver.
        start: where to begin [m n]: the answer to a problem nearby saves iterations.
        settings: of the solver, by name, such as `tolerance`: the relative gap that is asked for.

    Returns:
        The solution, certified here whoever found it.

    Raises:
        RecipeError: there is no such solver, or it has no such setting.
        UnsupportedError: the solver does not take the penalty.
    """
    made = make_solver(solver, **settings) if isinstance(solver, str) else solver
    solution = run(made, problem, None if start is None else problem.admit(start))
    data = problem.quadratic.data or TENSORS
    return replace(
        solution,
        weight=data.weight(solution.weight),
        intercept=data.intercept(solution.weight),
        solver=solution.solver or (solver if isinstance(solver, str) else type(solver).__name__),
    )


def path(
    problem: Problem, strengths: Iterable[float], solver: str | AbstractSolver = "auto", **settings: Any
) -> list[Solution]:
    """Solve a problem at many strengths of its penalty, from the largest on, each from the answer before.

    Args:
        problem: min q + p. Strengths are those of `L1(1.0)`, for example.
        strengths: factors of p, positive.
        solver: see `solve`.
        settings: of the solver, see `solve`.

    Returns:
        The certified solution at each strength, in the given order.

    Raises:
        ProblemError: a strength is not positive.
    """
    factors = [float(strength) for strength in strengths]
    if wrong := [factor for factor in factors if not 0 < factor < inf]:
        raise ProblemError(f"Strengths of a path: {wrong} among them. Accepted: positive, finite numbers.")
    found: dict[float, Solution] = {}
    start, done = None, begin("path", len(factors))
    for factor in sorted(set(factors), reverse=True):
        found[factor] = solve(Problem(problem.quadratic, problem.penalty.times(factor)), solver, start, **settings)
        start = found[factor].weight
        done(f"strength {factor:.3g}")
    return [found[factor] for factor in factors]


__all__ = ["AbstractSolver", "Solution", "Status", "make_solver", "path", "solve", "solver_names"]
