"""Solvers by name. To add a solver: a file here, a line in `_PLACES`, a line in tests/property/test_solvers.py."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from math import inf
from typing import Any

import torch
from torch import Tensor

from convexprune._progress import begin
from convexprune._setting_types import make
from convexprune.core import Problem
from convexprune.core._abstract_penalty import Elementwise
from convexprune.core._arrays import TENSORS, Array
from convexprune.core._side_by_side import joined
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

AT_ONCE = 2**31  # rows times inputs^2 of a path that are solved together


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
    made = _made(solver, settings, problem)
    solution = run(made, problem, None if start is None else _admitted(problem, start))
    return _in_form(problem, solution, solver)


def solve_all(
    problems: Sequence[Problem],
    solver: str | AbstractSolver = "auto",
    starts: Sequence[Array | None] | Array | None = None,
    **settings: Any,
) -> list[Solution]:
    """Solve many problems in one call. Each has a certificate, and meets the tolerance for itself.

    Problems of equal shape with penalties of one kind, sums over entries, are solved together: as rows if they share
    the tensor of a Gram matrix, else with a stack of Gram matrices, except by `sklearn` and `working-set`. Others are
    solved one after another.

    Args:
        problems: min q + p of each.
        solver: see `solve`.
        starts: where to begin [m n] for each problem, a list or an array of them, or None.
        settings: of the solver, see `solve`.

    Returns:
        The solutions, in the order of the problems.

    Raises:
        ProblemError: a problem or a start has another type or number.
    """
    problems = list(problems) if isinstance(problems, Iterable) else [problems]
    made, given = _made(solver, settings, *problems), [None] * len(problems)
    if starts is not None:
        given = list(starts) if isinstance(starts, Iterable) else [starts]
    if len(given) != len(problems):
        raise ProblemError(f"{len(given)} starts for {len(problems)} problems; give one for each, or None.")
    groups, found = dict[Any, list[int]](), dict[int, Solution]()
    for i, problem in enumerate(problems):
        q, gram = problem.quadratic, id(problem.quadratic.gram) if made.batches == "rows" else None
        groups.setdefault((gram, q.shape, q.cross.dtype, q.cross.device, type(problem.penalty)), []).append(i)
    for numbers in groups.values():
        group, begin_at = [problems[i] for i in numbers], [given[i] for i in numbers]
        whole = joined(group) if made.batches and len(group) > 1 else None
        if whole is None:
            each = [solve(problem, made, start) for problem, start in zip(group, begin_at, strict=True)]
        else:
            known = all(start is not None for start in begin_at)
            rows = [_admitted(p, s) for p, s in zip(group, begin_at, strict=True) if s is not None]
            each = made.solve(whole, torch.cat(rows) if known else None).each
        found |= {i: _in_form(problems[i], part, solver) for i, part in zip(numbers, each, strict=True)}
    return [found[i] for i in range(len(problems))]


def _made(solver: str | AbstractSolver, settings: dict[str, Any], *problems: Problem) -> AbstractSolver:
    """Return the solver, if it and the problems are what they have to be."""
    if wrong := [type(each).__name__ for each in problems if not isinstance(each, Problem)]:
        accepted = "Problem(quadratic, penalty); `solve_all` takes a list of them"
        raise ProblemError(f"A problem of type {wrong[0]}. Accepted: {accepted}.")
    if isinstance(solver, str):
        return make_solver(solver, **settings)
    if not isinstance(solver, AbstractSolver):
        raise RecipeError(
            f"The solver is of type {type(solver).__name__}. Accepted: {', '.join(_PLACES)}, or a solver."
        )
    if settings:
        raise RecipeError(f"Settings {sorted(settings)} are for a solver by name; {solver} has its own.")
    return solver


def _admitted(problem: Problem, start: Array) -> Tensor:
    if not bool((weight := problem.admit(start)).isfinite().all()):
        raise ProblemError("`start` holds a value that is NaN or infinite.")
    return weight


def _in_form(problem: Problem, solution: Solution, solver: str | AbstractSolver) -> Solution:
    """Return the solution with arrays as those in which the problem was stated, and the solver's name."""
    data = problem.quadratic.data or TENSORS
    weight = solution.weight
    name = solution.solver or (solver if isinstance(solver, str) else type(solver).__name__)
    if isinstance(weight, Tensor):
        solution = replace(solution, weight=data.weight(weight), intercept=data.intercept(weight))
    return replace(solution, solver=name)


def path(
    problem: Problem, strengths: Iterable[float], solver: str | AbstractSolver = "auto", **settings: Any
) -> list[Solution]:
    """Solve a problem at many strengths of its penalty, from the largest on, each from an answer before.

    Strengths of a penalty by entry are solved together, as many as a few seconds of work: see `solve_all`.

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
    try:
        factors = [float(strength) for strength in strengths]
    except (TypeError, ValueError) as cause:
        raise ProblemError(f"Strengths of a path: {strengths!r}. Accepted: a list of positive numbers.") from cause
    if wrong := [factor for factor in factors if not 0 < factor < inf]:
        raise ProblemError(f"Strengths of a path: {wrong} among them. Accepted: positive, finite numbers.")
    made = _made(solver, settings, problem)
    posed = {factor: Problem(problem.quadratic, problem.penalty.times(factor)) for factor in factors}
    ordered, found, done = sorted(posed, reverse=True), dict[float, Solution](), begin("path", len(posed))
    together = max(1, AT_ONCE // (problem.shape[0] * problem.shape[1] ** 2))
    if not made.batches or not isinstance(problem.penalty, Elementwise):
        together = 1
    for first in range(0, len(ordered), together):
        part = ordered[first : first + together]
        starts = [found[ordered[first - 1]].weight] * len(part) if first else None
        for factor, solution in zip(part, solve_all([posed[f] for f in part], made, starts), strict=True):
            found[factor] = solution
            done(f"strength {factor:.3g}")
    return [found[factor] for factor in factors]


__all__ = ["AbstractSolver", "Solution", "Status", "make_solver", "path", "solve", "solve_all", "solver_names"]
