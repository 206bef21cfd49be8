"""Our quantizer: a sweep or rounding to begin with, then codes and scales in turn, each the best for the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints import Grid
from convexprune.constraints._grid import rounded_scale, spread
from convexprune.core._quadratic import Quadratic
from convexprune.core._setting_types import Count, NotNegative, Whole
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.pruners._damped import choose_damping, damped
from convexprune.quantizers._base import AbstractQuantizer, OnGrid
from convexprune.quantizers._sweep import minimizer, swept

BLOCK = 64  # columns between two products
RIDGE = 1e-4  # of the equations of scales, relative: groups whose codes are all zero have none
ROOM = 2**26  # entries of these equations, of some rows at a time


@dataclass(frozen=True)
class Descent(AbstractQuantizer):
    """Coordinate descent on the damped error: min q(V) over codes, one at a time, and over scales, all at once.

    A dense weight begins with GPTQ's sweep from the minimizer of the damped error; a pruned one, whose values are
    fitted to its zeros already, with its nearest codes. Then, column by column, each code becomes the best one while
    all others stay as they are,

        V_ij <- nearest(V_ij + K_ij / H_jj),   K the residual,

    (QuantEase, arXiv 2309.01885), so that the error never grows. For given codes it is a quadratic of a row's scales,
    whose minimum is one small solve. The scales are rounded to bfloat16, and the codes descend again.

    Args:
        sweeps: over all columns, before and after the scales.
        rounds: how often scales and codes take turns; 0: the scales stay as they begin.
        damping: as of the pruners; None: of the pruner that found the zeros, or from the sample's noise.
    """

    sweeps: Count = 2
    rounds: Whole = 1
    damping: NotNegative | None = None

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Grid) -> OnGrid:
        """See `AbstractQuantizer.on_grid`.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        damping = choose_damping(problem, self.damping) if self.damping is not None else pruned.damping
        quadratic = damped(problem, damping or choose_damping(problem, None))
        found = self._begin(quadratic, pruned, grid)
        found, residual = self._descend(quadratic, found, quadratic.residual(found.weight), pruned.mask)
        for _ in range(self.rounds):
            found, residual = _rescaled(quadratic, found, residual)
            found, residual = self._descend(quadratic, found, residual, pruned.mask)
        return found

    def _begin(self, quadratic: Quadratic, pruned: LayerEdit, grid: Grid) -> OnGrid:
        assert quadratic.anchor is not None
        if not bool(pruned.mask.all()):
            return OnGrid.nearest(grid, pruned.weight, grid.fit(pruned.weight, quadratic.gram.diagonal()))
        best = minimizer(quadratic.cross, quadratic.gram, quadratic.anchor)
        begin = OnGrid.nearest(grid, best, grid.fit(best, quadratic.gram.diagonal()))
        return swept(best, quadratic.gram, begin, pruned.mask)

    def _descend(self, quadratic: Quadratic, found: OnGrid, residual: Tensor, mask: Tensor) -> tuple[OnGrid, Tensor]:
        """The best codes one after another, `sweeps` times, and the residual there.

        Columns are rows of what is transposed, so that they lie together in memory.
        """
        gram, grid = quadratic.gram, found.grid
        codes, scales = found.codes.T.contiguous(), spread(found.scales, len(gram)).T.contiguous()
        pulls, kept = scales * gram.diagonal()[:, None], mask.T.contiguous()
        for _ in range(self.sweeps):
            for first in range(0, len(gram), BLOCK):
                last = min(first + BLOCK, len(gram))
                ahead = residual[:, first:last].T.contiguous()
                steps = torch.empty_like(ahead)
                for j in range(first, last):
                    best = codes[j] + ahead[j - first] / pulls[j]
                    code = best.round_().clamp_(grid.lowest, grid.highest) * kept[j]
                    steps[j - first] = step = (code - codes[j]) * scales[j]
                    codes[j] = code
                    ahead[j - first :] -= gram[j, j:last, None] * step
                residual.addmm_(steps.T, gram[first:last], alpha=-1)
        return OnGrid(grid, found.scales, codes.T.contiguous()), residual


def _rescaled(quadratic: Quadratic, found: OnGrid, residual: Tensor) -> tuple[OnGrid, Tensor]:
    """The codes with better scales, in the rows where rounding leaves them better, and the residual there."""
    fitted = OnGrid(found.grid, fitted_scales(quadratic.gram, found, residual), found.codes)
    after = quadratic.residual(fitted.weight)
    better = quadratic.values(fitted.weight, after) < quadratic.values(found.weight, residual)
    scales = torch.where(better[:, None], fitted.scales, found.scales)
    return OnGrid(found.grid, scales, found.codes), torch.where(better[:, None], after, residual)


def fitted_scales(gram: Tensor, found: OnGrid, residual: Tensor) -> Tensor:
    """The scales of least error for given codes, rounded to bfloat16.

    Of row i, with C_g the row's codes of group g and zero elsewhere, q is a quadratic of its scales s: its Gram matrix
    is C_g H C_h', and its residual K C_g'.

    Args:
        gram: H [n n], positive definite.
        found: the codes, and the scales to start from.
        residual: K [m n] there.

    Returns:
        [m n/group].
    """
    count = found.scales.shape[1]
    group = len(gram) // count
    parts = []
    for rows in torch.arange(len(residual), device=gram.device).split(max(1, ROOM // count**2)):
        codes = found.codes[rows].unflatten(1, (count, group))
        slope = (residual[rows].view_as(codes) * codes).sum(2)
        images = (codes[:, g] @ gram[g * group : (g + 1) * group] for g in range(count))
        square = torch.stack([(image.view_as(codes) * codes).sum(2) for image in images], dim=1)
        square.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(square.dtype).tiny)
        parts.append(found.scales[rows] + torch.linalg.solve(square, slope))
    return rounded_scale(torch.cat(parts))
