"""Constraints made of constraints: kept values on a grid, and the operators of a stack."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from math import lcm

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint
from convexprune.constraints._budget import Budget
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Quantized(Constraint):
    """Weights in `support` whose `values` are on a grid. A kept value may round to zero: there may be more zeros.

    `sparsity` is the support's.

    Args:
        support: which entries may be kept.
        values: the grid of what is kept.

    Raises:
        PatternError: the support removes columns for good, or has zeros that the grid does not have.
    """

    support: Constraint
    values: Codebook
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        if removed := self.support.removes:
            raise PatternError(
                f"{removed.capitalize()} are removed before a model is quantized: prune twice, the smaller model last."
            )
        if self.support.sparsity and not self.values.has_zero:
            raise PatternError(f"{self.values} has no zero, so nothing can be pruned there. Take a sparsity of 0.")
        object.__setattr__(self, "sparsity", self.support.sparsity)

    def describe(self) -> str:
        return f"{self.support}, {self.values}"

    @property
    def grid(self) -> Codebook:
        return self.values

    @property
    def continuous(self) -> bool:
        return self.support.continuous if self.values.share is None else True

    @property
    def by_column(self) -> bool:
        return self.support.by_column

    @property
    def by_row(self) -> bool:
        return self.support.by_row

    @property
    def block(self) -> int:
        return self.support.block

    def check(self, rows: int, columns: int) -> None:
        self.support.check(rows, columns)
        self.values.check(rows, columns)

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Project on the support first, then put what is kept on the grid."""
        return self.values.project(self.support.project(weight, metric), metric)

    def violation(self, weight: Tensor) -> int:
        return self.support.violation(weight) + self.values.violation(weight)

    def budget(self, shape: Sequence[int]) -> Budget | None:
        return self.support.budget(shape)

    def zeros(self, rows: int, columns: int) -> int:
        return self.support.zeros(rows, columns)

    @property
    def share(self) -> float:
        saved = self.values.share
        return self.support.share if saved is None else saved

    def with_share(self, share: float) -> "Quantized":
        if self.values.share is None:
            return replace(self, support=self.support.with_share(share))
        return replace(self, values=self.values.with_share(share))

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        grids = self.values.ladder()
        if grids == [self.values]:
            return [replace(self, support=each) for each in self.support.ladder(reach, step)]
        return [replace(self, values=each) for each in grids]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self.support.mask(scores, first)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.support.threshold(scores)

    def masks(self, scores: Tensor) -> Tensor:
        return self.support.masks(scores)

    def thresholds(self, scores: Tensor) -> Tensor:
        return self.support.thresholds(scores)


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
        return all(each.by_column for each in self.constraints)

    @property
    def by_row(self) -> bool:
        return all(each.by_row for each in self.constraints)

    @property
    def compensates(self) -> bool:
        return any(each.compensates for each in self.constraints)

    @property
    def block(self) -> int:
        """Return the number of columns after which a block of every operator ends."""
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
