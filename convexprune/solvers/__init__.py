"""Solvers by name. To add one: a file here, a line in `_PLACES`, a line in the table of tests/test_solvers.py."""

from dataclasses import fields
from importlib import import_module
from typing import Any

from convexprune.errors import RecipeError, unknown
from convexprune.solvers.base import AbstractSolver, Solution, Status, solve

_PLACES = {
    "admm": ("admm", "ADMM"),
    "cg": ("cg", "ConjugateGradient"),
    "cvxpy": ("cvxpy_", "CVXPY"),
    "fista": ("fista", "FISTA"),
    "scipy": ("scipy_", "SciPy"),
}


def solver_names() -> list[str]:
    """The names that `make_solver` knows."""
    return sorted(_PLACES)


def make_solver(name: str, **settings: Any) -> AbstractSolver:
    """The solver of that name; its module (and a foreign library behind it) is imported only now.

    Raises:
        RecipeError: unknown name or setting.
    """
    if name not in _PLACES:
        raise RecipeError(unknown("solver", name, _PLACES))
    module, cls = _PLACES[name]
    solver = getattr(import_module(f"convexprune.solvers.{module}"), cls)
    known = [field.name for field in fields(solver)]
    for setting in settings:
        if setting not in known:
            raise RecipeError(f"Solver {name!r}: {unknown('setting', setting, known)}")
    return solver(**settings)


__all__ = ["AbstractSolver", "Solution", "Status", "make_solver", "solve", "solver_names"]
