"""The constraints of operators that share an input, and are solved as one problem."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import lcm

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint


@dataclass(frozen=True)
class Stacked(Constraint):
    """The `constraints` of the operators of a stack, which have so many rows each: its `heights`."""

    constraints: tuple[Constraint, ...]
    heights: tuple[int, ...]

    @classmethod
    def alike(cls, constraint: Constraint, heights: tuple[int, ...]) -> "Stacked":
        """One constraint applied to each operator.

        Args:
            constraint: of each.
            heights: their rows.

        Returns:
            The stack.
        """
        return cls((constraint,) * len(heights), heights)

    @property
    def by_column(self) -> bool:
        """Whether all do, each for itself."""
        return all(each.by_column for each in self.constraints)

    @property
    def by_row(self) -> bool:
        """Whether in none of them rows compete."""
        return all(each.by_row for each in self.constraints)

    @property
    def compensates(self) -> bool:
        """Whether any of them does."""
        return any(each.compensates for each in self.constraints)

    @property
    def block(self) -> int:
        """Columns after which a block of each of them ends."""
        return lcm(*(each.block for each in self.constraints))

    def describe(self) -> str:
        return "; ".join(f"{height} rows {each.describe()}" for each, height in self._pairs())

    def check(self, rows: int, columns: int) -> None:
        assert rows == sum(self.heights), f"a stack of {self.heights} rows got {rows}"
        for each, height in self._pairs():
            each.check(height, columns)

    def zeros(self, rows: int, columns: int) -> int:
        return sum(each.zeros(height, columns) for each, height in self._pairs())

    def parts(self, rows: int) -> list[tuple[slice, Constraint]]:
        ends = pairwise(accumulate(self.heights, initial=0))
        return [(slice(*pair), each) for pair, each in zip(ends, self.constraints, strict=True)]

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        return torch.cat([each.project(part, metric) for each, part in self._split(weight)])

    def violation(self, weight: Tensor) -> int:
        return sum(each.violation(part) for each, part in self._split(weight))

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return torch.cat([each.mask(part, first) for each, part in self._split(scores)])

    def threshold(self, scores: Tensor) -> Tensor:
        levels = [each.threshold(part) for each, part in self._split(scores)]
        width = max(level.shape[1] for level in levels)  # 1, where each row has one
        return torch.cat([level.expand(height, width) for level, height in zip(levels, self.heights, strict=True)])

    def _pairs(self) -> Iterator[tuple[Constraint, int]]:
        return zip(self.constraints, self.heights, strict=True)

    def _split(self, tensor: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
        return zip(self.constraints, tensor.split(self.heights), strict=True)
