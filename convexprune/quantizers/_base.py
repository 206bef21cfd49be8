"""The interface of quantizers: a pruned weight in, the weight on its grid out, with its zeros."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._setting_types import check_settings
from convexprune.constraints._codebook import Codebook, Scales
from convexprune.pruners import LayerEdit, LayerProblem


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A weight [m n] on a grid: codes [m n], multiples of scales."""

    grid: Codebook
    scales: Scales
    codes: Tensor

    @classmethod
    def nearest(cls, grid: Codebook, weight: Tensor, scales: Scales) -> "OnGrid":
        """Return the nearest weight with these scales.

        Args:
            weight: V [m n].
            scales: scales of the grid.
        """
        return cls(grid, scales, grid.codes(weight, scales))

    @property
    def weight(self) -> Tensor:
        """The weight [m n]."""
        return self.grid.weight(self.codes, self.scales)


class AbstractQuantizer(ABC):
    """Settings of a quantizer, a dataclass.

    Raises:
        RecipeError: a setting has a wrong type, or is out of range.
    """

    input_errors: ClassVar[bool] = False
    """True if the quantizer reads the errors of inputs, which those of outputs do not give (`ErrorMoments`)."""
    corrects_last: ClassVar[bool] = True
    """True if operators of a layer's last stage make up for earlier errors, too."""

    def __post_init__(self) -> None:
        check_settings(self)

    @torch.no_grad()
    def quantize(self, problem: LayerProblem, pruned: LayerEdit) -> LayerEdit:
        """Put the values that a pruner kept on the grids that the problem's pattern has for its operators.

        Args:
            problem: with the rows as they are, none of them scaled.
            pruned: what a pruner made of it.

        Returns:
            The weight on its grids; entries that the pruner zeroed stay zero. What has no grid is as it was.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        parts = [(rows, own.grid) for rows, own in problem.pattern.parts(len(problem.weight)) if own.grid is not None]
        if not parts:
            return pruned
        weight, filled = pruned.weight.clone(), problem
        if bool(problem.dead.any()):  # their weights change nothing here, and are rounded as they are
            moments = problem.moments.with_dead_inputs_filled(problem.weight)
            filled = replace(problem, moments=moments.with_errors(problem.moments.errors))
        for grid, rows in _together(parts):
            rows = rows.to(weight.device)
            part = filled.rows(rows, problem.pattern)
            mask = pruned.mask[rows]
            weight[rows] = self.on_grid(part, replace(pruned, weight=weight[rows], mask=mask), grid).weight * mask
        return replace(pruned, weight=weight, mask=weight != 0)

    @abstractmethod
    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        """The weight of rows that share a grid.

        Args:
            problem: of these rows, in which every input has energy.
            pruned: what the pruner made of them.
            grid: of all of them.

        Returns:
            A weight that is zero where the pruner's mask is.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """


def _together(parts: Sequence[tuple[slice, Codebook]]) -> list[tuple[Codebook, Tensor]]:
    """Grids and their rows: one for all operators whose rows are on it by themselves, else one for each operator."""
    found = list[tuple[Codebook, Tensor]]()
    for rows, grid in parts:
        own = torch.arange(rows.start, rows.stop)
        same = next((i for i, (other, _) in enumerate(found) if grid.by_row and other == grid), None)
        if same is None:
            found.append((grid, own))
        else:
            found[same] = (grid, torch.cat([found[same][1], own]))
    return found
