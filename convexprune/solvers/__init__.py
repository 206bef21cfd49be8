"""Solvers by name. To add a solver: a file here, a line in `_PLACES`, a line in tests/property/test_solvers.py."""

from importlib import import_module
from typing import Any

from convexprune.core._setting_types import make
from convexprune.errors import RecipeError, unknown
from convexprune.solvers._base import AbstractSolver, Solution, Status, solve

_PLACES = {
    "admm": ("_admm", "ADMM"),
    "cg": ("_cg", "ConjugateGradient"),
    "cvxpy": ("_cvxpy", "CVXPY"),
    "fista": ("_fista", "FISTA"),
    "scipy": ("_scipy", "SciPy"),
}


def solver_names() -> list[str]:
    """The names that `make_solver` knows."""
    return sorted(_PLACES)


def make_solver(name: str, **settings: Any) -> AbstractSolver:
    """Return a solver by name; its module, and a foreign library behind it, is imported only now.

    Args:
        name: an entry of `solver_names()`.
        settings: settings of the solver's class, by name.

    Returns:
        The solver.

    Raises:
        RecipeError: unknown solver, or unknown setting.
    """
    if name not in _PLACES:
        raise RecipeError(unknown("solver", name, _PLACES))
    module, cls = _PLACES[name]
    solver = getattr(import_module(f"convexprune.solvers.{module}"), cls)
    return make(solver, name, settings)


__all__ = ["AbstractSolver", "Solution", "Status", "make_solver", "solve", "solver_names"]
