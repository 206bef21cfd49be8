"""Our quantizer: a sweep or rounding to begin with, then codes and scales in turn, each the best for the other."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from convexprune._setting_types import Count, NotNegative, Whole
from convexprune.constraints import Codebook, OnGrid, Scales
from convexprune.core import Quadratic
from convexprune.pruners import Cost, LayerEdit, LayerProblem, choose_damping, damped
from convexprune.quantizers._base import AbstractQuantizer
from convexprune.quantizers._passes import Sweep, exchanged, minimizer

RIDGE = 1e-4  # of the equations of scales, relative: groups whose codes are all zero have none
ROOM = 2**22  # entries of these equations, of some rows at a time
JUDGED, WIDE = 4, 64  # rows whose error is compared with what a beam of so many sweeps finds


@dataclass(frozen=True)
class Descent(AbstractQuantizer):
    """Coordinate descent on the damped error: min q(V) over codes, one at a time, and over scales, all at once.

    A dense weight begins with GPTQ's sweep from the minimizer of the damped error; a pruned one, whose values are
    fitted to its zeros already, with its nearest codes. Then, column by column, each code becomes the best one while
    all others stay as they are,

        V_ij <- nearest(V_ij + K_ij / H_jj),   K the residual,

    (QuantEase, arXiv 2309.01885), so that the error never grows. For given codes it is a quadratic of a row's scales,
    whose minimum is one small solve. The scales are rounded to bfloat16, and the codes descend again.

    With the scales of this answer a dense weight then begins a second time, with a beam: sweeps that branch at every
    column (the M-algorithm, or K-best sphere decoding). They descend likewise, and the better answer of a row stays.

    Coded weights have a scale for each column, with which an error of half a step costs the same in every column
    (WaterSIC, arXiv 2603.04956), and what descends is the error plus the bits at a price. They have no beam.

    Args:
        sweeps: over all columns, before and after the scales, at most. A row in which no code moves is done.
        rounds: how often scales and codes take turns, at most; 0: the scales stay as they begin.
        beam: sweeps of the beam; 1: none. The report compares the error of a few rows with what a beam of 64 finds.
        damping: a ridge; None: that of the pruner that found the zeros, or from the sample's noise.
    """

    sweeps: Whole = 3
    rounds: Whole = 2
    beam: Count = 8
    damping: NotNegative | None = None

    def cost(self, grid: Codebook, dense: bool) -> Cost:
        """See `AbstractQuantizer.cost`: products of a descent, a dense weight's sweep, and a second one with a beam."""
        if not grid.by_row:  # a price of the bits is looked for, and scales are not fitted
            return Cost(5.2, 3.5, 2 * (1 + self.sweeps), 2, 3.0, apart=14.0)
        descent = self.sweeps * (1 + self.rounds) + 2 * self.rounds
        if not dense or self.beam == 1:
            return Cost(4.5, 20.0, descent + dense, 2, 3.0)
        return Cost(4.5, 13.0 + 6.6 * self.beam, 1 + 2 * descent + self.beam, 2, 3.0)

    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        dense, damping = bool(pruned.mask.all()), pruned.damping if self.damping is None else None
        quadratic = damped(problem, damping or choose_damping(problem, self.damping, codes=dense))
        assert quadratic.anchor is not None
        gram = quadratic.gram
        weight = minimizer(quadratic.cross, gram, quadratic.anchor) if dense else pruned.weight
        sweep = cache(lambda: Sweep(gram))

        def attempt(rows: slice, scales: Scales) -> OnGrid:
            own, begin, mask = quadratic.rows(rows), weight[rows], pruned.mask[rows]
            found = OnGrid.nearest(grid, begin, scales)
            if dense:
                found = sweep().onto(begin, found, mask)
            found = self._descended(own, found, mask, grid.price(scales, lambda: sweep().shape))
            if not dense or not grid.by_row or self.beam == 1:
                return found
            return self._better(own, found, sweep().beam(begin, found, self.beam))

        found = grid.search(weight, lambda: sweep().shape, lambda kind: kind.fit(weight, gram.diagonal()), attempt)
        if not dense or not grid.by_row:
            return found
        some = torch.linspace(0, len(weight) - 1, min(JUDGED, len(weight)), device=weight.device).long()
        return replace(found, facts=self._judged(quadratic.rows(some), weight[some], found.rows(some), sweep()))

    def _better(self, quadratic: Quadratic, found: OnGrid, other: OnGrid) -> OnGrid:
        """Return the better of two answers in each row, once the other one has descended."""
        other = self._descended(quadratic, other, torch.ones_like(other.codes, dtype=torch.bool), 0.0)
        return other.where(quadratic.values(other.weight) < quadratic.values(found.weight), found)

    def _judged(self, quadratic: Quadratic, weight: Tensor, found: OnGrid, sweep: Sweep) -> dict[str, float]:
        """Return the mean error of some rows over that of the best answer that a wide beam finds from theirs."""
        best = self._better(quadratic, found, sweep.beam(weight, found, WIDE))
        values, least = quadratic.values(found.weight), quadratic.values(best.weight)
        least = torch.maximum(least, torch.finfo(least.dtype).eps * values)  # no ratio is infinite
        return {"codes_over_best": float(torch.where(values > 0, values / least, 1.0).mean())}

    def _descended(self, quadratic: Quadratic, found: OnGrid, mask: Tensor, price: float) -> OnGrid:
        """Codes, scales and codes in turn, in rows where something moves; scales only where rows share none."""
        residual, rows = quadratic.residual(found.weight), torch.arange(len(mask), device=mask.device)
        for round_number in range(1 + (self.rounds if found.grid.by_row else 0)):
            if round_number:
                better, part, rest = _rescaled(quadratic.rows(rows), found.rows(rows), residual[rows])
                found, residual[rows] = found.put(rows, part), rest
                rows = rows[better]
            moving = rows
            for _ in range(self.sweeps):
                if not len(moving):
                    break
                part, rest = exchanged(quadratic.gram, found.rows(moving), residual[moving], mask[moving], price)
                moved = (part.codes != found.codes[moving]).any(1)
                found, residual[moving] = found.put(moving, part), rest
                moving = moving[moved if found.grid.by_row else moved.any().expand_as(moved)]
            if not len(rows):
                break
        return found


def _rescaled(quadratic: Quadratic, found: OnGrid, residual: Tensor) -> tuple[Tensor, OnGrid, Tensor]:
    """Return the rows that rounded better scales improve (a mask), the codes with these there, and the residual."""
    fitted = OnGrid(found.grid, fitted_scales(quadratic.gram, found, residual), found.codes)
    after = quadratic.residual(fitted.weight)
    better = quadratic.values(fitted.weight, after) < quadratic.values(found.weight, residual)
    return better, fitted.where(better, found), torch.where(better[:, None], after, residual)


def fitted_scales(gram: Tensor, found: OnGrid, residual: Tensor) -> Scales:
    """Return the scales of least error for given codes, where the residual is K, rounded as a file has them.

    Of row i, with C_g the row's codes of group g and zero elsewhere, q is a quadratic of its scales s: its Gram matrix
    is C_g H C_h', and its residual K C_g'. Offsets have -1 in place of the codes. A row whose Gram matrix is indefinite
    by rounding keeps its scales. Scales that are multiples of units then descend: each becomes the best multiple while
    all others stay.
    """
    start, grid = found.scales, found.grid
    count, kinds = start.step.shape[1], 1 if start.offset is None else 2
    group, parts = len(gram) // count, list[Scales]()
    for rows in torch.arange(len(residual), device=gram.device).split(max(1, ROOM // (kinds * count) ** 2)):
        part = found.rows(rows)
        codes, begin = part.codes.unflatten(1, (count, group)), part.scales
        rest = residual[rows].view_as(codes)
        slope = torch.cat([(rest * codes).sum(2), -rest.sum(2)][:kinds], dim=1)
        square = _gram_of_scales(codes, gram, kinds)
        square.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(square.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(square)  # LU of many fails with threads (pytorch/pytorch#142815)
        change = torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
        best = grid.rounded(begin.with_flat(begin.flat + torch.where(failed[:, None] > 0, 0.0, change)))
        parts.append(grid.settled(best, square, slope - _times(square, best.flat - begin.flat)))
    return Scales.cat(parts)


def _gram_of_scales(codes: Tensor, gram: Tensor, kinds: int) -> Tensor:
    """Return the matrices C_g H C_h' [m k k] of the codes [m groups width] of rows, and with two kinds of offsets."""
    rows, count, group = codes.shape
    square = codes.new_empty(rows, kinds * count, kinds * count)
    for g in range(count):  # symmetric: from the diagonal on
        image = codes[:, g] @ gram[g * group : (g + 1) * group, g * group :]
        square[:, g, g:count] = square[:, g:count, g] = (image.view(rows, -1, group) * codes[:, g:]).sum(2)
    if kinds > 1:  # offsets are the same in all rows
        sums = gram.view(count, group, count, group).sum(1)
        square[:, count:, count:] = sums.sum(2)
        across = -(codes.transpose(0, 1) @ sums.permute(1, 2, 0)).permute(1, 2, 0)
        square[:, count:, :count], square[:, :count, count:] = across, across.mT
    return square


def _times(square: Tensor, change: Tensor) -> Tensor:
    return (square @ change[..., None]).squeeze(2)
