"""SparseGPT: a sweep over the columns that pushes errors to later columns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._device.precision import bare_product
from convexprune._setting_types import Count, NotNegative
from convexprune.constraints import Constraint
from convexprune.core import ridged, upper_factor
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first
from convexprune.pruners._cost import Cost


@dataclass(frozen=True)
class SparseGPT(AbstractPruner):
    """Frantar and Alistarh, arXiv 2301.00774, Algorithm 1 (IST-DASLab/sparsegpt, sparsegpt.py).

    With U the upper Cholesky factor of (H + damping mean(diag H) I)^-1, the score of an entry is (W_ij / U_jj)^2 on the
    weight as updated so far; a column's error (W_j - V_j) / U_jj is subtracted along U_j from later columns. For n:m
    the scores of a group are taken at its first column.

    Differences from the authors' code: exact counts (the code's `<=` overshoots on ties); with a whole-matrix quota
    every block of columns holds an equal share, as in the code; a dead input has the energy of a mean input instead of
    1, and keeps its weights if its block has more of them than zeros. With error correction the sweep starts at the
    damped minimiser W + G (H + damping)^-1 instead of W, so that all methods can share a target; with correction=0 it
    is the published method.

    Args:
        block: columns of a block.
        damping: the ridge, in units of the mean diagonal of H.
    """

    one_by_one = True
    cost: ClassVar[Cost] = Cost(4.5, 7.9, 1, 2, 8.0)

    block: Count = 128
    damping: NotNegative = 0.01

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        upper, cross = upper_factor(ridged(problem.quadratic.gram, self.damping)), problem.quadratic.cross
        weight = problem.weight.clone()
        if bool(cross.any()):
            weight += bare_product(bare_product(cross, upper.T), upper)
        width, group = weight.shape[1], problem.pattern.block
        block = max(group, self.block // group * group)  # a block ends where a group ends
        mask = torch.empty_like(weight, dtype=torch.bool)
        for first in range(0, width, block):
            last = min(first + block, width)
            part, u = weight[:, first:last], upper[first:last, first:last]
            mask[:, first:last], errors = self._sweep(part, u, problem.pattern, first)
            weight[:, last:] -= bare_product(errors, upper[first:last, last:].contiguous())
        return LayerEdit(weight * mask, mask)

    def _sweep(self, part: Tensor, u: Tensor, pattern: Constraint, first: int) -> tuple[Tensor, Tensor]:
        """Prune a block of columns [m b] in place; return its mask and its errors [m b]."""
        columns = part.shape[1]
        at_once = pattern.block if pattern.block > 1 else columns
        mask, errors = torch.empty_like(part, dtype=torch.bool), torch.empty_like(part)
        for j in range(columns):
            if j % at_once == 0:
                ahead = slice(j, j + at_once)
                mask[:, ahead] = pattern.mask((part[:, ahead] / u.diagonal()[ahead]).square(), first + j)
            errors[:, j] = part[:, j] * ~mask[:, j] / u[j, j]
            part[:, j:] -= errors[:, j, None] * u[j, j:]
        return mask, errors
