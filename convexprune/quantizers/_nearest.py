"""Round to nearest."""

from dataclasses import dataclass

from convexprune.constraints import Grid
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.quantizers._base import AbstractQuantizer, OnGrid


@dataclass(frozen=True)
class Nearest(AbstractQuantizer):
    """Every kept value goes to the nearest point of its grid, whose scale is that of the least squared error.

    It knows no inputs. Of a pruner's `rtn` in the literature the scale is often the largest weight over the largest
    code, which is never better.
    """

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Grid) -> OnGrid:
        """See `AbstractQuantizer.on_grid`."""
        return OnGrid.nearest(grid, pruned.weight, grid.fit(pruned.weight))
