"""The constraints of operators with a common input, solved as one problem."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import lcm

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint


@dataclass(frozen=True)
class Stacked(Constraint):
    """The `constraints` of the operators of a stack, with `heights` rows."""

    constraints: tuple[Constraint, ...]
    heights: tuple[int, ...]

    @classmethod
    def alike(cls, constraint: Constraint, heights: tuple[int, ...]) -> "Stacked":
        """Apply a constraint to every operator.

        Args:
            constraint: the constraint.
            heights: rows by operator.

        Returns:
            The stack.
        """
        return cls((constraint,) * len(heights), heights)

    @classmethod
    def of(cls, stacks: Sequence[tuple[Constraint, int]]) -> "Stacked":
        """Join stacks.

        Args:
            stacks: constraint and rows by stack.

        Returns:
            A stack of all operators.
        """
        parts = [part for constraint, rows in stacks for part in constraint.parts(rows)]
        return cls(tuple(own for _, own in parts), tuple(rows.stop - rows.start for rows, _ in parts))

    @property
    def by_column(self) -> bool:
        """True if all operators choose whole columns, separately."""
        return all(each.by_column for each in self.constraints)

    @property
    def by_row(self) -> bool:
        """True if rows compete in no operator."""
        return all(each.by_row for each in self.constraints)

    @property
    def compensates(self) -> bool:
        """True if any operator compensates."""
        return any(each.compensates for each in self.constraints)

    @property
    def block(self) -> int:
        """Number of columns after which a block of every operator ends."""
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
        if first:
            return torch.cat([each.mask(part, first) for each, part in self._split(scores)])
        return torch.cat([each.masks(parts).flatten(0, 1) for each, parts in self._runs(scores)])

    def threshold(self, scores: Tensor) -> Tensor:
        runs = [(parts.shape, each.thresholds(parts)) for each, parts in self._runs(scores)]
        width = max(level.shape[2] for _, level in runs)  # 1, where each row has one
        return torch.cat([level.expand(count, height, width).flatten(0, 1) for (count, height, _), level in runs])

    def _runs(self, scores: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
        """Yield runs of equal neighbouring operators: a constraint, and the scores [k m n] of k operators."""
        runs = [(each, height, len(list(alike))) for (each, height), alike in groupby(self._pairs())]
        parts = scores.split([height * count for _, height, count in runs])
        for (each, height, count), part in zip(runs, parts, strict=True):
            yield each, part.unflatten(0, (count, height))

    def _pairs(self) -> Iterator[tuple[Constraint, int]]:
        return zip(self.constraints, self.heights, strict=True)

    def _split(self, tensor: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
        return zip(self.constraints, tensor.split(self.heights), strict=True)
