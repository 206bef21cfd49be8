"""Layer problems, patterns and a solver that keeps what it was given: what the tests of all pruners share."""

from dataclasses import dataclass, field

import torch
from strategies import Layer, make_layer
from torch import Tensor

from convexprune._layerwise.steps.measure import sampled_bounds_of_all
from convexprune.constraints import Constraint, SemiStructured, Stacked, Unstructured
from convexprune.core._moments import Moments
from convexprune.core._problem import Problem
from convexprune.pruners import (
    AbstractPruner,
    Convex,
    Damping,
    LayerProblem,
)
from convexprune.solvers import AbstractSolver, Solution

CORRELATED = 2.0  # the mixing that makes neighbours matter

PATTERNS = {
    "matrix": Unstructured(0.5),
    "row": Unstructured(0.5, "row"),
    "2:4": SemiStructured(2, 4),
    "3:8": SemiStructured(3, 8),
    "stack": Stacked.alike(Unstructured(0.65), (2, 3, 1)),
    "stack of rows": Stacked.alike(Unstructured(0.65, "row"), (2, 3, 1)),
    "stack of 2:4": Stacked.alike(SemiStructured(2, 4), (2, 3, 1)),
    "uneven stack": Stacked(tuple(map(Unstructured, (0.65, 0.0, 0.8))), (2, 3, 1)),
    "uneven stack of N:M": Stacked((SemiStructured(2, 4), SemiStructured(3, 4), SemiStructured(1, 4)), (2, 3, 1)),
}


def layer_problem(
    layer: Layer, pattern: Constraint, correction: float = 1.0, folds: tuple[Moments, ...] = ()
) -> LayerProblem:
    return LayerProblem(layer.weight, layer.moments, pattern, correction, folds)


def correlated(seed: int, m: int = 8, n: int = 16, change: float = 0.0, tokens: int | None = None) -> Layer:
    return make_layer("full rank", m, n, seed, change, tokens, mixing=CORRELATED)


def error(problem: LayerProblem, pruner: AbstractPruner) -> float:
    """mean |V x* - target|^2, from the moments: they equal the tokens by test_moments.py."""
    return float(problem.squared_error(pruner.prune(problem).weight).sum())


@dataclass(frozen=True)
class Recorder(AbstractSolver):
    """Solves as another does, and keeps what it was given and what it gave."""

    solver: AbstractSolver = field(default_factory=lambda: Convex.solver_for("fista"))
    calls: list[tuple[Problem, torch.Tensor, Solution]] = field(default_factory=list)

    @property
    def penalties(self):
        return self.solver.penalties

    def solve(self, problem, start=None):
        assert start is not None
        solution = self.solver.solve(problem, start)
        self.calls.append((problem, start, solution))
        return solution


def sampled_bounds(
    problem: LayerProblem, weight: Tensor, rows: int, damping: Damping, factors: Tensor | None = None
) -> list[dict[str, float] | None]:
    """The bounds of the operators of one stack."""
    return sampled_bounds_of_all([(problem, weight, damping, factors)], rows)[0]
