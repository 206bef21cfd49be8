"""Our quantizer: a sweep or rounding to begin with, then codes and scales in turn, each the best for the other."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from convexprune.constraints._abstract_grid import AbstractGrid, rounded_scale
from convexprune.core._quadratic import Quadratic
from convexprune.core._setting_types import NotNegative, Whole
from convexprune.pruners import LayerEdit, LayerProblem
from convexprune.pruners._damped import choose_damping, damped
from convexprune.quantizers._base import AbstractQuantizer, OnGrid
from convexprune.quantizers._exchange import exchanged
from convexprune.quantizers._sweep import Sweep, minimizer

PRICE = 0.1  # of a bit, over the squared step: measured, see lab/tried.md
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

    Coded weights have a scale for each column, with which an error of half a step costs the same in every column
    (WaterSIC, arXiv 2603.04956), and what descends is the error plus the bits at a price.

    Args:
        sweeps: over all columns, before and after the scales.
        rounds: how often scales and codes take turns; 0: the scales stay as they begin.
        damping: as of the pruners; None: of the pruner that found the zeros, or from the sample's noise.
    """

    sweeps: Whole = 2
    rounds: Whole = 1
    damping: NotNegative | None = None

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: AbstractGrid) -> OnGrid:
        """See `AbstractQuantizer.on_grid`.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        damping = choose_damping(problem, self.damping) if self.damping is not None else pruned.damping
        quadratic = damped(problem, damping or choose_damping(problem, None))
        assert quadratic.anchor is not None
        gram, dense = quadratic.gram, bool(pruned.mask.all())
        weight = minimizer(quadratic.cross, gram, quadratic.anchor) if dense else pruned.weight
        sweep = cache(lambda: Sweep(gram))

        def attempt(rows: slice, scales: Tensor) -> OnGrid:
            found, mask, price = OnGrid.nearest(grid, weight[rows], scales), pruned.mask[rows], 0.0
            if dense:
                found = sweep().onto(weight[rows], found, mask)
            if not grid.by_row:
                price = (
                    PRICE * float((scales / sweep().shape).quantile(0.5)) ** 2
                )  # of most columns, not of those in need
            return self._descended(quadratic.rows(rows), found, mask, price)

        return grid.search(weight, lambda: sweep().shape, lambda groups: groups.fit(weight, gram.diagonal()), attempt)

    def _descended(self, quadratic: Quadratic, found: OnGrid, mask: Tensor, price: float) -> OnGrid:
        """Codes, scales and codes in turn; scales only where groups of a row have theirs."""
        residual = quadratic.residual(found.weight)
        for round_number in range(1 + (self.rounds if found.grid.by_row else 0)):
            if round_number:
                found, residual = _rescaled(quadratic, found, residual)
            for _ in range(self.sweeps):
                found, residual = exchanged(quadratic.gram, found, residual, mask, price)
        return found


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
