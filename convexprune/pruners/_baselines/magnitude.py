"""Magnitude pruning: keep the largest weights."""

from dataclasses import dataclass

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, projected


@dataclass(frozen=True)
class Magnitude(AbstractPruner):
    """Score |W_ij|; kept weights do not change (Han et al. 2015, without the retraining).

    The result is the nearest weight in the pattern with equal entries. Inputs, dead inputs too, play no part.
    """

    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`."""
        return projected(problem)
