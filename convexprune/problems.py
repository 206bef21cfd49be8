"""Named problems with known least values, so that a new solver is tested in a single line.

    from convexprune import problems
    assert all(result.passed for result in problems.check(my_solver))

The yardstick is the solver's promise: its `tolerance`, a relative duality gap, or a given tolerance. Some problems have
a formula as solution; the rest are blocks of real operators of the bundled OPT, with certified values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from convexprune.core import L1, AbstractPenalty, Problem, Quadratic, Support
from convexprune.core._abstract_penalty import require_norm
from convexprune.core._arrays import require_type
from convexprune.errors import ProblemError, UnsupportedError, unknown
from convexprune.solvers import AbstractSolver
from convexprune.solvers._base import promised_gap, run

__all__ = ["Named", "PenaltyCheck", "Result", "check", "check_penalty", "load", "names"]

FOLDER = Path(__file__).parent / "data" / "problems"
CLOSE = 1e-9
"""The relative error up to which a penalty has to do what it says."""
STEP = 0.7  # of the prox that is tried
KNOWN = 1e-9
"""The relative error up to which the least values are known."""


@dataclass(frozen=True, eq=False)
class Named:
    """A problem with a known least value.

    Args:
        name: name for `load`.
        problem: the problem, in float64.
        value: the least value.
        solution: a weight [m n] with this value.
        source: reason for the value.
    """

    name: str
    problem: Problem
    value: float
    solution: Tensor
    source: str


@dataclass(frozen=True)
class Result:
    """The answer of a solver to a named problem.

    Args:
        name: name of the problem.
        excess: the objective over the least value, less 1.
        gap: the certified duality gap, relative to the objective.
        tolerance: the yardstick.
        passed: True if the objective is the least value, up to the tolerance.
    """

    name: str
    excess: float
    gap: float
    tolerance: float
    passed: bool


def names() -> list[str]:
    """All named problems."""
    return sorted([*_FORMULAS, *(path.stem for path in FOLDER.glob("*.safetensors"))])


def load(name: str) -> Named:
    """Return a named problem in float64.

    Args:
        name: an entry of `names()`.

    Returns:
        The problem with its solution.

    Raises:
        ProblemError: no problem has this name.
    """
    if name in _FORMULAS:
        return _FORMULAS[name]()
    if name not in names():
        raise ProblemError(unknown("problem", name, names()))
    data = load_file(FOLDER / f"{name}.safetensors")
    penalty = L1(data["strength"]) if "strength" in data else Support(data["mask"])
    problem = Problem(Quadratic(data["gram"], data["cross"], data["energy"], data["anchor"]), penalty)
    return Named(name, problem, float(data["value"]), data["solution"], "a block of the bundled OPT, certified")


def check(solver: AbstractSolver, tolerance: float | None = None) -> Iterator[Result]:
    """Solve every named problem whose penalty the solver takes.

    An answer V passes if |objective(V) - least value| <= tolerance * objective(V). A duality gap within the tolerance
    proves this, so a solver that keeps its promise passes. An objective below the least value fails too: no weight has
    it.

    Args:
        solver: the solver under test.
        tolerance: relative to the objective, like a gap. None means the solver's promise: its `tolerance`, or 1e-4.
            Least values are known to 1e-9, and the check allows for 1e-9.

    Yields:
        A result for every problem.

    Raises:
        UnsupportedError: the solver takes no penalty of the problems, so that nothing would be tested.
    """
    require_type(solver, AbstractSolver)
    asked = promised_gap(solver) if tolerance is None else tolerance
    found = [named for named in map(load, names()) if isinstance(named.problem.penalty, solver.penalties)]
    if not found:
        raise UnsupportedError(f"{type(solver).__name__} takes no penalty that a named problem has: L1 or Support.")
    for named in found:
        solution = run(solver, named.problem)
        objective = named.problem.value(solution.weight)
        above = (objective - named.value) / objective  # NaN, which does not pass, where the objective is infinite
        gap, passed = solution.certificate.relative_gap, -KNOWN <= above <= asked + KNOWN
        yield Result(named.name, objective / named.value - 1, gap, asked, passed)


@dataclass(frozen=True)
class PenaltyCheck:
    """The result of a check of a penalty.

    Args:
        name: name of the check.
        passed: True if the penalty keeps its promise.
        error: the largest deviation, relative to the compared numbers.
    """

    name: str
    passed: bool
    error: float


def check_penalty(penalty: AbstractPenalty, shape: tuple[int, int] = (3, 12), seed: int = 0) -> Iterator[PenaltyCheck]:
    """Try a penalty's methods on random weights, in float64.

    Args:
        penalty: to check.
        shape: (m, n) of the weights.
        seed: of the random numbers.

    Yields:
        One result for each property.

    Raises:
        ProblemError: the penalty does not fit weights of that shape, or is no norm and has no conjugate.
    """
    require_type(penalty, AbstractPenalty)
    penalty = penalty.to(torch.float64)
    penalty.check(shape)
    target, far = 2 * _normal(seed, *shape), _normal(seed + 1, *shape)
    require_norm(penalty, target)
    scale = penalty.units(_normal(seed + 2, shape[1]).exp())
    for name, error in (*_of_values(penalty, target, far, scale), *_of_duals(penalty, target, far)):
        yield PenaltyCheck(name, error <= CLOSE, error)


def _of_values(penalty: AbstractPenalty, target: Tensor, far: Tensor, scale: Tensor) -> Iterator[tuple[str, float]]:
    """The errors of values and prox."""

    def cost(weight: Tensor) -> Tensor:
        return (weight - target).square().sum() / 2 + STEP * penalty.values(weight).sum()

    at, zero = penalty.prox(target, STEP), torch.zeros_like(target)
    others = *_others(penalty, at, far), zero, 0.9 * at, 1.1 * at, at + 0.1 * (target - at)
    excess = torch.stack([cost(at) - cost(each) for each in others])
    yield "values are zero at zero", float(penalty.values(zero).abs().sum())
    yield "values are not negative", float(-penalty.values(at).sum())
    yield "prox is least", float(excess.max() / (1 + cost(at)))
    yield "scaled is the same function", _difference(penalty.scaled(scale).values(at * scale), penalty.values(at))
    if not penalty.couples_rows:
        alone = penalty.rows(slice(1, None)).values(at[1:])
        yield "rows are the same function", _difference(alone, penalty.values(at)[1:])


def _of_duals(penalty: AbstractPenalty, target: Tensor, far: Tensor) -> Iterator[tuple[str, float]]:
    """The errors of what certificates are made of."""
    if not penalty.is_convex:
        return
    at, size = penalty.prox(target, STEP), 1 + float(target.square().sum())

    def slack(weight: Tensor, dual: Tensor) -> float:
        """Return p(V) + p*(S) - <S, V>, which is never negative."""
        return float((penalty.values(weight) + penalty.conjugate(dual) - (dual * weight).sum(1)).sum()) / size

    def outside(dual: Tensor) -> float:
        return max(-slack(each, dual) for each in (*_others(penalty, at, far), at)) / (1 + float(dual.abs().max()))

    nearest, factor = penalty.subgradient(at, target), penalty.dual_scale(target)
    inside = factor.clamp_max(1e3)[:, None] * target
    moved = (1.01 * inside - penalty.project(1.01 * inside)).abs().amax(1)
    moved = moved.amax().expand_as(moved) if penalty.couples_rows else moved
    yield "conjugate is exact at a prox", abs(slack(at, (target - at) / STEP))
    yield "project is inside", outside(penalty.project(target))
    yield "subgradient is one", 0.0 if nearest is None else abs(slack(at, nearest))
    yield "dual_scale is inside", outside(inside)
    yield "dual_scale is the largest", float(((moved <= CLOSE) & (factor < 1e3) & (factor > 0)).any())


def _others(penalty: AbstractPenalty, at: Tensor, far: Tensor) -> list[Tensor]:
    """Weights near and far at which the penalty is finite."""
    return [penalty.prox(at + r * far, t) for r in (1e-3, 0.1, 1) for t in (1e-9, 0.1)]


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().sum() / (1 + second.abs().sum()))


def _thresholded(name: str, x: Tensor, y: Tensor, strength: float) -> Named:
    """Return a regression on orthogonal inputs of equal size: the soft threshold of the target, entry by entry."""
    quadratic, curvature = Quadratic.least_squares(x, y), x[:, 0].square().mean()
    solution = _soft(quadratic.cross / curvature, strength / curvature)
    value = float((y - x @ solution.T).square().sum() / (2 * len(x)) + strength * solution.abs().sum())
    return Named(name, Problem(quadratic, L1(strength)), value, solution, "soft threshold")


def _diagonal_gram() -> Named:
    """Return a problem with uncorrelated inputs of very different sizes and strengths by entry."""
    diagonal, strength = torch.logspace(-3, 3, 12, dtype=torch.float64), torch.logspace(-3, 2, 12, dtype=torch.float64)
    weight = _normal(4, 5, 12)
    quadratic = Quadratic(diagonal.diag(), torch.zeros_like(weight), weight.new_zeros(5), weight)
    solution = _soft(weight, strength / diagonal)
    value = float(((solution - weight).square() * diagonal / 2 + strength * solution.abs()).sum())
    return Named("diagonal-gram", Problem(quadratic, L1(strength)), value, solution, "soft threshold")


def _all_zero() -> Named:
    """Return a problem with a strength above every slope: the solution is zero, with half the energy as value."""
    x, y = _normal(5, 50, 6), _normal(6, 50, 2)
    quadratic = Quadratic.least_squares(x, y)
    strength = 1.01 * float(quadratic.cross.abs().max())
    return Named("all-zero", Problem(quadratic, L1(strength)), float(y.square().sum() / 100),
                 torch.zeros(2, 6, dtype=torch.float64), "every slope is inside")  # fmt: skip


def _diagonal_support() -> Named:
    """Return a problem on a support with uncorrelated inputs: kept weights stay dense."""
    diagonal, weight = torch.logspace(-2, 2, 10, dtype=torch.float64), _normal(7, 4, 10)
    mask = _normal(8, 4, 10) > 0
    quadratic = Quadratic(diagonal.diag(), torch.zeros_like(weight), weight.new_zeros(4), weight)
    value = float(((weight * ~mask).square() * diagonal).sum() / 2)
    return Named("diagonal-support", Problem(quadratic, Support(mask)), value, weight * mask, "separable")


def _soft(target: Tensor, threshold: Tensor) -> Tensor:
    return target.sign() * (target.abs() - threshold).clamp_min(0)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_FORMULAS: dict[str, Callable[[], Named]] = {
    "all-zero": _all_zero,
    "diagonal-gram": _diagonal_gram,
    "diagonal-support": _diagonal_support,
    "orthogonal-design": lambda: _thresholded(
        "orthogonal-design", 3 * torch.linalg.qr(_normal(0, 40, 8)).Q, _normal(1, 40, 3), 0.02
    ),
    "single-column": lambda: _thresholded("single-column", _normal(2, 30, 1), _normal(3, 30, 4), 0.05),
}
