"""Least squares on a support, and on every choice of whole columns where choices are few."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from convexprune._setting_types import NotNegative
from convexprune.constraints import Constraint
from convexprune.core import Problem, Quadratic, Support, cholesky
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, Score, filled, with_dead_weights
from convexprune.pruners._cost import Cost
from convexprune.pruners._damped import choose_damping, damped
from convexprune.solvers import AbstractSolver, Solution
from convexprune.solvers._base import require_penalty, run
from convexprune.solvers._cg import ConjugateGradient


@dataclass(frozen=True)
class Refitted(AbstractPruner):
    """A pruner's support, with the best values on the support.

    Args:
        pruner: the pruner of the support.
        refit: the solver of the values.
        damping: damping of the refit alone: 0 is plain least squares, None follows the sample's noise
            (`choose_damping`).
    """

    pruner: AbstractPruner
    refit: AbstractSolver = field(default_factory=ConjugateGradient)
    damping: NotNegative | None = None

    def __post_init__(self) -> None:
        AbstractPruner.__post_init__(self)
        require_penalty(self.refit, Support)

    @property
    def scores(self) -> Mapping[str, Score]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the scores of the pruner."""
        return self.pruner.scores

    @property
    def cost(self) -> Cost:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the needs of the pruner and of the refit."""
        return self.pruner.cost.then(Cost(8.3, 29.2, 60, 2, 3.0))

    def require(self, pattern: Constraint) -> None:
        self.pruner.require(pattern)

    @torch.no_grad()
    def prune(self, problem: LayerProblem) -> LayerEdit:
        pruned, alive = self.pruner.prune(problem), filled(problem)
        damping, start = choose_damping(alive, self.damping), pruned.weight.masked_fill(problem.dead, 0)
        weight, refits = refitted(damped(alive, damping), pruned.mask, start, self.refit)
        edit = replace(pruned, weight=weight, solutions=pruned.solutions + refits, damping=pruned.damping or damping)
        return edit if alive is problem else with_dead_weights(problem, edit)


def refitted(
    quadratic: Quadratic, mask: Tensor, start: Tensor, refit: AbstractSolver | None
) -> tuple[Tensor, tuple[Solution, ...]]:
    """Return the best values on a support [m n], and the solution, if any; without a solver those of `start` stay.

    If all rows have the same support, a single factorisation serves all rows, and the solver certifies.
    """
    start = start * mask
    if refit is None:
        return start, ()
    if quadratic.gram.ndim == 2 and bool((mask == mask[:1]).all()):
        start = on_columns(quadratic, mask[0], start)
    solution = run(refit, Problem(quadratic, Support(mask)), start)
    return solution.weight, (solution,)


def on_columns(quadratic: Quadratic, kept: Tensor, start: Tensor) -> Tensor:
    """Return the best weights on some columns, from zeros elsewhere; `start` if the columns leave the weights open."""
    factor = cholesky(quadratic.gram[kept][:, kept])
    if factor is None:
        return start
    weight = start.clone()
    weight[:, kept] += torch.cholesky_solve(quadratic.residual(start)[:, kept].T, factor).T  # a small step rounds less
    return weight


def choices(pattern: Constraint, shape: tuple[int, int]) -> int | None:
    """Count the choices of a pattern; None if it does not choose whole columns, alike in all rows."""
    if not pattern.by_column or len(pattern.parts(shape[0])) > 1:
        return None
    return comb(*_blocks(pattern, shape))


def _blocks(pattern: Constraint, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the number of blocks of columns, and the number that a pattern removes."""
    rows, columns = shape
    return columns // pattern.block, pattern.zeros(rows, columns) // (rows * pattern.block)


def best_choice(quadratic: Quadratic, pattern: Constraint) -> Tensor:
    """Return the choice of whole columns with the least error, with its best values.

    The values belong to the choice: a column that is compensated best may be the one that is missed most without
    compensation.
    """
    dense = quadratic.anchor
    assert dense is not None
    blocks, removed = _blocks(pattern, quadratic.shape)

    def without(gone: tuple[int, ...]) -> Tensor:
        kept = torch.ones(blocks, dtype=torch.bool, device=dense.device)
        kept[list(gone)] = False
        kept = kept.repeat_interleave(pattern.block)
        return on_columns(quadratic, kept, dense * kept)

    return min(
        map(without, combinations(range(blocks), removed)), key=lambda weight: float(quadratic.values(weight).sum())
    )
