"""The interface of quantizers: a pruned weight in, the weight on its grid out, with its zeros."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._setting_types import check_settings
from convexprune.constraints import Codebook, OnGrid
from convexprune.pruners import Cost, LayerEdit, LayerProblem


class AbstractQuantizer(ABC):
    """Settings of a quantizer, a dataclass."""

    input_errors: ClassVar[bool] = False  # true if errors of inputs are read, not of outputs (`ErrorMoments`)
    corrects_last: ClassVar[bool] = True  # true if operators of a layer's last stage make up for earlier errors, too

    def __post_init__(self) -> None:
        check_settings(self)

    def cost(self, grid: Codebook, dense: bool) -> Cost:
        """Return the needs of a dense weight, or of one with zeros, on a grid."""
        return Cost()

    @torch.no_grad()
    def quantize(self, problem: LayerProblem, pruned: LayerEdit) -> LayerEdit:
        """Put kept values on the grids that the problem's pattern has for its operators; operators without stay."""
        parts = problem.pattern.parts(len(problem.weight))
        grids = {number: own.grid for number, (_, own) in enumerate(parts) if own.grid is not None}
        if not grids:
            return pruned
        weight, filled = pruned.weight.clone(), problem
        if bool(problem.dead.any()):  # their weights change nothing here, and are rounded as they are
            moments = problem.moments.with_dead_inputs_filled(problem.weight)
            filled = replace(problem, moments=moments.with_errors(problem.moments.errors))
        blocks: list[Tensor | None] = [None] * len(parts)
        facts = dict(pruned.facts)
        for grid, numbers in _together(grids):
            own = [torch.arange(parts[number][0].start, parts[number][0].stop) for number in numbers]
            rows = torch.cat(own).to(weight.device)
            part = filled.rows(rows, problem.pattern)
            mask = pruned.mask[rows]
            on_grid = self.on_grid(part, replace(pruned, weight=weight[rows], mask=mask), grid)
            weight[rows] = on_grid.weight * mask
            facts |= on_grid.facts
            if (packed := grid.pack(on_grid.codes, on_grid.scales)) is not None:
                for number, data in zip(numbers, packed.split([len(each) for each in own]), strict=True):
                    blocks[number] = data
        kept = tuple(blocks) if any(data is not None for data in blocks) else ()
        return replace(pruned, weight=weight, mask=weight != 0, blocks=kept, facts=facts)

    @abstractmethod
    def on_grid(self, problem: LayerProblem, pruned: LayerEdit, grid: Codebook) -> OnGrid:
        """Return the weight of rows that share a grid, on inputs that all have energy; masked entries are zero."""


def _together(grids: Mapping[int, Codebook]) -> list[tuple[Codebook, list[int]]]:
    """Return grids and the numbers of their operators: all on a grid whose rows share nothing, else one."""
    together = dict[object, tuple[Codebook, list[int]]]()
    for number, grid in grids.items():
        together.setdefault(grid if grid.by_row else number, (grid, []))[1].append(number)
    return list(together.values())
