"""The common part of pruners that search a support: damping, coordinates, rounding, refit."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from convexprune._setting_types import NotNegative
from convexprune.constraints import Constraint, Stacked
from convexprune.core import Quadratic, SideBySide, Support
from convexprune.pruners._base import AbstractPruner, Damping, LayerEdit, LayerProblem, filled, with_dead_weights
from convexprune.pruners._damped import choose_damping, damped, saliency_coordinates
from convexprune.pruners._refit import refitted
from convexprune.solvers import AbstractSolver, Solution
from convexprune.solvers._base import require_penalty
from convexprune.solvers._cg import ConjugateGradient

COLUMNS = Damping(0.3)  # the damping of a search for whole columns, if its pruner leaves it open


@dataclass(frozen=True, eq=False)
class Found:
    scores: Tensor
    solutions: tuple[Solution, ...] = ()
    products: int = 0  # [m n] x [n n], outside the solves


@dataclass(frozen=True)
class AbstractSearch(AbstractPruner):
    """Search scores on the damped problem, keep the largest scores by the pattern, and refit the values.

    The search works in the coordinates of `saliency_coordinates`. `damping` is the r of r/2 sum_ij H_jj (V - W)_ij^2,
    in the search and in the refit; None follows the sample's noise (`choose_damping`). Then a search for whole columns
    takes `COLUMNS` in its place, and the refit does not: a column is worth the part that the rest cannot compensate,
    and compensation differs between texts (lab/tried.md has the figures). If the problem has the loss's need of every
    column, the need chooses, without a search. `refit` is the solver of the values; None keeps the scores on the
    support.
    """

    refit: AbstractSolver | None = field(default_factory=lambda: ConjugateGradient(scale=False))
    damping: NotNegative | None = None

    def __post_init__(self) -> None:
        AbstractPruner.__post_init__(self)
        if self.refit is not None:
            require_penalty(self.refit, Support)

    @abstractmethod
    def search(self, quadratic: Quadratic, pattern: Constraint) -> Found:
        """Return scores whose largest are worth keeping: a weight near the optimum, in the search's coordinates."""

    def prune(self, problem: LayerProblem) -> LayerEdit:
        return self.prune_all([problem])[0]

    @torch.no_grad()
    def prune_all(self, problems: Sequence[LayerProblem]) -> list[LayerEdit]:
        together = len(problems) > 1 and all(map(self._is_batched, problems))
        each = [problems] if together else [[problem] for problem in problems]
        return list(chain.from_iterable(map(self._pruned, each)))

    def _pruned(self, problems: Sequence[LayerProblem]) -> list[LayerEdit]:
        """Prune a problem, or several side by side."""
        alive = [filled(problem) for problem in problems]
        dampings = [choose_damping(problem, self.damping) for problem in alive]
        alone, heights = len(alive) == 1, [len(problem.weight) for problem in alive]
        mask = _known_support(alive[0]) if alone else None
        searched, quadratic, scales = self._posed(alive, dampings, mask is not None)
        if mask is None:
            stacks = zip((problem.pattern for problem in alive), heights, strict=True)
            pattern = alive[0].pattern if alone else Stacked.of(list(stacks))
            found = self.search(searched, pattern)
            mask = pattern.mask(found.scores.abs())
        else:  # the values are all there is to find
            found = Found(alive[0].weight * scales[0])
        weight, refits = refitted(quadratic, mask, found.scores, self.refit)
        solved = list(zip(*(solution.each for solution in found.solutions + refits), strict=True)) or [()] * len(alive)
        edits = []
        parts = zip(weight.split(heights), mask.split(heights), scales, solved, dampings, strict=True)
        for problem, filled_in, (values, kept, scale, solutions, damping) in zip(problems, alive, parts, strict=True):
            edit = LayerEdit(values / scale, kept, solutions, damping, other_products=found.products)
            edits.append(edit if filled_in is problem else with_dead_weights(problem, edit))
        return edits

    def _posed(
        self, problems: Sequence[LayerProblem], dampings: Sequence[Damping], is_known: bool
    ) -> tuple[Quadratic, Quadratic, list[Tensor]]:
        """Return the quadratics of the search and of the refit in units of scales, and the scales by problem."""
        if len(problems) > 1:
            posed = [saliency_coordinates(*each) for each in zip(problems, dampings, strict=True)]
            together = SideBySide.of([quadratic for quadratic, _ in posed])
            return together, together, [scale for _, scale in posed]
        problem, damping = problems[0], dampings[0]
        if is_known:
            quadratic = damped(problem, damping)
            scale = quadratic.scale()  # without, it may have no float32 factor to tell a gap by
            return quadratic, quadratic.scaled(scale), [scale]
        if problem.pattern.by_column and self.damping is None:
            searched, scale = saliency_coordinates(problem, COLUMNS)
            unit = scale.new_full(scale.shape, (1 + COLUMNS.strength) ** 0.5)  # the diagonal is 1 with the pull, too
            scale = scale * unit
            return searched.scaled(unit), damped(problem, damping).scaled(scale), [scale]
        searched, scale = saliency_coordinates(problem, damping)
        return searched, searched, [scale]

    def _is_batched(self, problem: LayerProblem) -> bool:
        """Return True if search and refit treat many problems as they treat one; a subclass has to declare this."""
        known = self.refit is None or isinstance(self.refit, ConjugateGradient)
        searched = not problem.pattern.by_column and problem.pattern.zeros(*problem.weight.shape) > 0
        return known and searched and vars(type(self)).get("side_by_side", False)


def _known_support(problem: LayerProblem) -> Tensor | None:
    """Return the support [m n] where nothing has to be searched: all, or the columns that the loss needs most."""
    if problem.pattern.zeros(*problem.weight.shape) == 0:
        return torch.ones_like(problem.weight, dtype=torch.bool)
    return None if problem.importance is None else problem.pattern.mask(problem.importance.sqrt())
