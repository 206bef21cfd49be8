"""GPTQ, and with error correction GPTAQ and QEP."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints import Grid
from convexprune.constraints._abstract_grid import AbstractGrid, rounded_scale
from convexprune.core._setting_types import NotNegative
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.quantizers._base import AbstractQuantizer, OnGrid
from convexprune.quantizers._sweep import Sweep, minimizer


@dataclass(frozen=True)
class GPTQ(AbstractQuantizer):
    """Frantar et al., arXiv 2210.17323 (IST-DASLab/gptq) with act_order, static_groups, symmetric, mse.

    The sweep starts at the minimizer of the error. With `error_correction=0` that is the dense weight: GPTQ. With 1 the
    target is that of GPTAQ (arXiv 2504.02692), with 1/2 of QEP (arXiv 2504.09629); starting there is Qronos
    (arXiv 2505.11695). Scales are the authors' search: of the largest weight over 2^(bits-1) - 1/2, shrunk to 20 % in
    steps of 1 %, that with the least sum of |error|^2.4.

    Coded weights have one scale for all: Huffman-GPTQ, as WaterSIC (arXiv 2603.04956) calls it.

    Differences to the authors' code: scales are rounded to bfloat16. Of a pruned weight the zeros are rounded to zero
    in the sweep, as in SparseGPT's joint pruning and quantization.

    Args:
        damping: the ridge, in units of the mean diagonal of H.
    """

    damping: NotNegative = 0.01

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: AbstractGrid) -> OnGrid:
        """See `AbstractQuantizer.on_grid`."""
        gram = problem.quadratic.gram.clone()
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        target, sweep = minimizer(problem.quadratic.cross, gram, problem.weight), Sweep(gram)

        def attempt(rows: slice, scales: Tensor) -> OnGrid:
            return sweep.onto(target[rows], OnGrid.nearest(grid, target[rows], scales), pruned.mask[rows])

        def searched(groups: Grid) -> Tensor:
            return _searched(groups, pruned.weight)

        return grid.search(target, lambda: torch.ones_like(target[0]), searched, attempt)


def _searched(grid: Grid, weight: Tensor) -> Tensor:
    """The authors' scales [m n/group] of a weight [m n]."""
    groups = weight.unflatten(1, (-1, grid.width(weight.shape[1])))
    whole = groups.abs().amax(2, keepdim=True) / (grid.highest + 0.5)
    best, least = torch.ones_like(whole), torch.full_like(whole, torch.inf)
    for percent in range(100, 20, -1):
        scale = rounded_scale(whole * (percent / 100))
        off = (groups / scale).round_().clamp_(grid.lowest, grid.highest).mul_(scale).sub_(groups)
        error = off.abs_().pow_(2.4).sum(2, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.squeeze(2)
