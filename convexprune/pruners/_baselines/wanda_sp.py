"""Wanda-sp: Wanda's scores, added up over the outputs, choose whole columns."""

from dataclasses import dataclass

import torch

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first


@dataclass(frozen=True)
class WandaSP(AbstractPruner):
    """Score sum_i |W_ij| |X_j|_2 of column j; kept weights do not change (An et al., arXiv 2312.11983, section 4.1).

    Wanda itself, as the nearest weight in the pattern, takes the root of the sum of squares, |W_:j|_2 |X_j|_2. FLAP's
    own score is the square of that, with the variance of x_j in place of its mean square.
    """

    columns_only = True

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`."""
        scores = problem.weight.abs() * problem.scale
        parts = [scores[rows] for rows, _ in problem.pattern.parts(len(scores))]
        mask = problem.pattern.mask(torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in parts]))
        return LayerEdit(problem.weight * mask, mask)
