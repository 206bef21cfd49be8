"""Magnitude pruning: keep the largest weights."""

from dataclasses import dataclass

from convexprune.pruners.base import AbstractPruner, Pruned, PruningProblem


@dataclass(frozen=True)
class Magnitude(AbstractPruner):
    """Score |W_ij|; kept weights do not change (Han et al. 2015, without the retraining).

    It knows no inputs, dead ones neither.
    """

    def prune(self, problem: PruningProblem) -> Pruned:
        """See `AbstractPruner.prune`."""
        mask = problem.pattern.mask(problem.weight.abs())
        return Pruned(problem.weight * mask, mask)
