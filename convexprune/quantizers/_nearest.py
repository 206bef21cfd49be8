"""Round to nearest."""

from dataclasses import dataclass

import torch

from convexprune.constraints._codebook import Codebook, Scales
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.quantizers._base import AbstractQuantizer, OnGrid


@dataclass(frozen=True)
class Nearest(AbstractQuantizer):
    """Every kept value goes to the nearest point of its grid, whose scale is that of the least squared error.

    It knows no inputs. Of a pruner's `rtn` in the literature the scale is often the largest weight over the largest
    code, which is never better.
    """

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        """See `AbstractQuantizer.on_grid`; columns have the same scale, where they have one."""

        def attempt(rows: slice, scales: Scales) -> OnGrid:
            return OnGrid.nearest(grid, pruned.weight[rows], scales)

        weight = pruned.weight
        return grid.search(weight, lambda: torch.ones_like(weight[0]), lambda groups: groups.fit(weight), attempt)
