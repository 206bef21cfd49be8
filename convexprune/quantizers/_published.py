"""Published quantizers: rounding to nearest, GPTQ, and what GPTAQ and QEP add for the errors of earlier operators."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._setting_types import NotNegative
from convexprune.constraints import Codebook, OnGrid, Scales
from convexprune.core import ridged
from convexprune.pruners import Cost, LayerEdit, LayerProblem
from convexprune.quantizers._base import AbstractQuantizer
from convexprune.quantizers._passes import Sweep, minimizer


@dataclass(frozen=True)
class Nearest(AbstractQuantizer):
    """Every kept value goes to the nearest point of its grid, whose scale has the least squared error of a few.

    It knows no inputs. In the literature the scale of `rtn` is often the largest weight over the largest code.
    """

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        def attempt(rows: slice, scales: Scales) -> OnGrid:
            return OnGrid.nearest(grid, pruned.weight[rows], scales)

        weight = pruned.weight
        return grid.search(weight, lambda: torch.ones_like(weight[0]), lambda groups: groups.fit(weight), attempt)


@dataclass(frozen=True)
class GPTQ(AbstractQuantizer):
    """Frantar et al., arXiv 2210.17323 (IST-DASLab/gptq) with act_order, static_groups, symmetric, mse.

    The sweep starts at the minimizer of the error. With `error_correction=0` that is the dense weight, as published;
    with 1 it is Qronos (arXiv 2505.11695). Scales are the authors' search: of the largest weight over 2^(bits-1) - 1/2,
    shrunk to 20 % in steps of 1 %, that with the least sum of |error|^2.4.

    Coded weights have one scale for all: Huffman-GPTQ, as WaterSIC (arXiv 2603.04956) calls it.

    Differences to the authors' code: scales are rounded to bfloat16. Of a pruned weight the zeros are rounded to zero
    in the sweep, as in SparseGPT's joint pruning and quantization.
    """

    damping: NotNegative = 0.01  # the ridge, in units of the mean diagonal of H

    def cost(self, grid: Codebook, dense: bool) -> Cost:
        return Cost(6.0, 14.0, 1, 2, 12.0)

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        gram = ridged(problem.gram, self.damping)
        return self._swept(gram, minimizer(problem.quadratic.cross, gram, problem.weight), pruned, grid)

    def _swept(
        self, gram: Tensor, weight: Tensor, pruned: LayerEdit, grid: Codebook, cross: Tensor | None = None
    ) -> OnGrid:
        sweep = Sweep(gram)

        def attempt(rows: slice, scales: Scales) -> OnGrid:
            return sweep.onto(weight[rows], OnGrid.nearest(grid, weight[rows], scales), pruned.mask[rows], cross)

        def searched(groups: Codebook) -> Scales:
            return groups.fit(pruned.weight) if groups.has_offsets else _searched(groups, pruned.weight)

        return grid.search(weight, lambda: torch.ones_like(weight[0]), searched, attempt)


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Li et al., arXiv 2504.02692 (Intelligent-Computing-Lab-Yale/GPTAQ, gptaq_utils.py).

    The sweep starts at the dense weight and adds a first-order term for the errors of earlier operators to the columns
    that are left, times alpha = `error_correction`: .25 in the authors' code. All else is as `GPTQ` has it.
    """

    input_errors: ClassVar[bool] = True

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        cross = problem.moments.cross
        cross = None if cross is None else problem.correction * cross
        return self._swept(ridged(problem.gram, self.damping), problem.weight, pruned, grid, cross)


@dataclass(frozen=True)
class QEP(GPTQ):
    """Arai and Ichikawa, arXiv 2504.09629 (FujitsuResearch/qep, gptq.py): the weight is corrected, then GPTQ.

    It becomes W + alpha W C (H + c mean(diag H) I)^-1 with C = mean (x - x*) x*' and alpha = `error_correction`. As in
    the authors' code alpha is 1/2, c is 1, and the operators of a layer's last stage (down_proj) are not corrected.
    """

    corrects_last: ClassVar[bool] = False
    correction_damping: NotNegative = 1.0  # c

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        gram = ridged(problem.gram, self.correction_damping)
        weight = minimizer(problem.quadratic.cross, gram, problem.weight)
        corrected = replace(problem, weight=weight, moments=problem.moments.with_errors(None))
        return super().on_grid(corrected, replace(pruned, weight=weight * pruned.mask), grid)


def _searched(grid: Codebook, weight: Tensor) -> Scales:
    """Return the authors' scales of a weight [m n]."""
    groups = weight.unflatten(1, (-1, grid.width(weight.shape[1])))
    whole = groups.abs().amax(2) / ((grid.values[-1] - grid.values[0]) / 2)
    shrunk = (whole * (percent / 100) for percent in range(100, 20, -1))
    return grid.rounded(grid.best(groups, shrunk, lambda off: off.abs_().pow_(2.4)))
