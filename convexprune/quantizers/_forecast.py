"""Forecast the error of a quantization: errors of rounding, and of a sweep over a few rows."""

from dataclasses import replace

import torch
from torch import Tensor

from convexprune.constraints import Codebook, Constraint, OnGrid, entropy
from convexprune.pruners import LayerProblem, choose_damping, damped
from convexprune.quantizers._passes import Sweep

ROWS = 64  # that are swept, at least


class Forecast:
    """Errors of a dense weight at some bits, for a single factorisation.

    After a sweep the damped error of a row is sum_j e_ij^2 / U_jj^2, with e the rounding errors of weights that took up
    errors of earlier columns. At many bits these weights are spread like the dense weights; few bits spread them
    further. So some rows are swept to measure the growth of the error and of the bits: a bit more divides the error by
    four. The descent after the sweep lowers the error by about the same factor for every operator.
    """

    def __init__(self, problem: LayerProblem) -> None:
        filled = replace(problem, moments=problem.moments.with_dead_inputs_filled(problem.weight))
        self._weight = problem.weight
        self._gram = damped(filled, choose_damping(filled, None, codes=True)).gram
        self._sweep = Sweep(self._gram)
        self._metric = self._sweep.shape.square().reciprocal()

    def errors(self, constraint: Constraint) -> Tensor:
        """Estimate the squared error mean |V x - W x|^2 by row [m]."""
        parts = constraint.parts(len(self._weight))
        return torch.cat([self._of(self._weight[rows], own.grid) for rows, own in parts if own.grid is not None])

    def _of(self, weight: Tensor, grid: Codebook) -> Tensor:
        some = slice(None, None, max(1, len(weight) // ROWS))
        if grid.by_row:
            return self._like_sample(weight, some, grid)
        near = OnGrid.nearest(grid, weight, grid.fit(weight, self._metric))
        errors = (near.weight - weight).square() @ self._metric
        swept, error = self._swept(weight[some], near)
        growth = error / errors[some].sum().clamp_min(torch.finfo(errors.dtype).tiny)
        return errors * growth * 4 ** (entropy(swept.codes) - entropy(near.codes[some]))

    def _like_sample(self, weight: Tensor, some: slice, grid: Codebook) -> Tensor:
        """Return the errors of rows that share nothing: relative to their energy, those of some rows."""
        energy, rows = weight.square() @ self._metric, weight[some]
        _, error = self._swept(rows, OnGrid.nearest(grid, rows, grid.fit(rows, self._metric)))
        return energy * (error / energy[some].sum().clamp_min(torch.finfo(energy.dtype).tiny))

    def _swept(self, weight: Tensor, near: OnGrid) -> tuple[OnGrid, Tensor]:
        """Return the weight after a sweep, and its damped error."""
        swept = self._sweep.onto(weight, near, torch.ones_like(weight))
        off = swept.weight - weight
        return swept, (off @ self._gram * off).sum()
