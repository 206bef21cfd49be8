"""Wanda-sp: Wanda's scores, added up over the outputs, choose whole columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first


@dataclass(frozen=True)
class WandaSP(AbstractPruner):
    """Score sum_i |W_ij| |X_j|_2 of column j; kept weights do not change (An et al., arXiv 2312.11983, section 4.1).

    Wanda for columns, as the nearest weight in the pattern, takes the root of the sum of squares, |W_:j|_2 |X_j|_2.
    FLAP's score is the square, with the variance of x_j in place of its mean square. For blocks of columns, such as
    heads, the scores of columns are added up, as in FLAP's code.
    """

    columns_only = True

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`."""
        scores = problem.weight.abs() * problem.scale
        parts = [_added_up(scores[rows], own.block) for rows, own in problem.pattern.parts(len(scores))]
        mask = problem.pattern.mask(torch.cat(parts))
        return LayerEdit(problem.weight * mask, mask)


def _added_up(scores: Tensor, block: int) -> Tensor:
    """Add up an operator's scores [m n] over rows and over blocks of columns, in place of every score."""
    return scores.sum(0).view(-1, block).sum(1).repeat_interleave(block).expand_as(scores)
