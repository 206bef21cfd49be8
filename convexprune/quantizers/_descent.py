"""Our quantizer: a sweep or rounding to begin with, then codes and scales in turn, each the best for the other."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from convexprune._setting_types import NotNegative, Whole
from convexprune.constraints import Codebook, OnGrid, Scales
from convexprune.core import Quadratic
from convexprune.pruners import LayerEdit, LayerProblem, choose_damping, damped
from convexprune.quantizers._base import AbstractQuantizer
from convexprune.quantizers._passes import Sweep, exchanged, minimizer

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
    """

    sweeps: Whole = 2  # over all columns, before and after the scales
    rounds: Whole = 1  # in which scales and codes take turns; 0: the scales stay as they begin
    damping: NotNegative | None = None  # None: of the pruner that found the zeros, or from the sample's noise

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        damping = choose_damping(problem, self.damping) if self.damping is not None else pruned.damping
        quadratic = damped(problem, damping or choose_damping(problem, None))
        assert quadratic.anchor is not None
        gram, dense = quadratic.gram, bool(pruned.mask.all())
        weight = minimizer(quadratic.cross, gram, quadratic.anchor) if dense else pruned.weight
        sweep = cache(lambda: Sweep(gram))

        def attempt(rows: slice, scales: Scales) -> OnGrid:
            found, mask = OnGrid.nearest(grid, weight[rows], scales), pruned.mask[rows]
            if dense:
                found = sweep().onto(weight[rows], found, mask)
            price = grid.price(scales, lambda: sweep().shape)
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
    """Return the codes with better scales, in the rows where rounding leaves them better, and the residual there."""
    fitted = OnGrid(found.grid, fitted_scales(quadratic.gram, found, residual), found.codes)
    after = quadratic.residual(fitted.weight)
    better = quadratic.values(fitted.weight, after) < quadratic.values(found.weight, residual)
    scales = fitted.scales.where(better, found.scales)
    return OnGrid(found.grid, scales, found.codes), torch.where(better[:, None], after, residual)


def fitted_scales(gram: Tensor, found: OnGrid, residual: Tensor) -> Scales:
    """Return the scales of least error for given codes, where the residual is K, rounded as a file has them.

    Of row i, with C_g the row's codes of group g and zero elsewhere, q is a quadratic of its scales s: its Gram matrix
    is C_g H C_h', and its residual K C_g'. Offsets have -1 in place of the codes. Scales that are multiples of units
    then descend: each becomes the best multiple while all others stay.
    """
    start, grid = found.scales, found.grid
    count, kinds = start.step.shape[1], 1 if start.offset is None else 2
    group, parts = len(gram) // count, list[Scales]()
    for rows in torch.arange(len(residual), device=gram.device).split(max(1, ROOM // (kinds * count) ** 2)):
        codes, begin = found.codes[rows].unflatten(1, (count, group)), start.map(lambda each, rows=rows: each[rows])
        units = [codes] if start.offset is None else [codes, torch.full_like(codes, -1)]
        slope = torch.cat([(residual[rows].view_as(codes) * unit).sum(2) for unit in units], dim=1)
        images = (u[:, g] @ gram[g * group : (g + 1) * group] for u in units for g in range(count))
        seen = ([(image.view_as(codes) * unit).sum(2) for unit in units] for image in images)
        square = torch.stack([torch.cat(each, dim=1) for each in seen], dim=1)
        square.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(square.dtype).tiny)
        best = grid.rounded(begin.with_flat(begin.flat + torch.linalg.solve(square, slope)))
        parts.append(grid.settled(best, square, slope - _times(square, best.flat - begin.flat)))
    return Scales.cat(parts)


def _times(square: Tensor, change: Tensor) -> Tensor:
    return (square @ change[..., None]).squeeze(2)
