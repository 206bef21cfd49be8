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
    """Weights in `support` whose kept `values` are on a grid. One may round to zero: there may be more zeros.

    `sparsity` is the support's.
    """

    support: Constraint
    values: Codebook
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        support, grid = self.support, self.values
        if removed := support.removes:
            raise PatternError(
                f"{removed.capitalize()} are removed before a model is quantized: prune twice, the smaller model last."
            )
        if support.sparsity and not grid.has_zero:
            raise PatternError(f"{grid} has no zero, so nothing can be pruned there. Take a sparsity of 0.")
        self._derive(grid=grid, continuous=support.continuous or grid.share is not None)
        self._derive(**{name: getattr(support, name) for name in ("sparsity", "by_row", "by_column", "block")})

    def describe(self) -> str:
        return f"{self.support}, {self.values}"

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
        return self.support.share if self.values.share is None else self.values.share

    def with_share(self, share: float) -> "Quantized":
        if self.values.share is None:
            return replace(self, support=self.support.with_share(share))
        return replace(self, values=self.values.with_share(share))

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        grids = self.values.ladder()
        if grids == [self.values]:
            return [replace(self, support=support) for support in self.support.ladder(reach, step)]
        return [replace(self, values=grid) for grid in grids]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self.support.mask(scores, first)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.support.threshold(scores)


@dataclass(frozen=True)
class Stacked(Constraint):
    """The `constraints` of the operators of a stack, with `heights` rows."""

    constraints: tuple[Constraint, ...]
    heights: tuple[int, ...]

    def __post_init__(self) -> None:
        kinds = self.constraints
        self._derive(
            by_column=all(kind.by_column for kind in kinds),
            by_row=all(kind.by_row for kind in kinds),
            compensates=any(kind.compensates for kind in kinds),
            block=lcm(*(kind.block for kind in kinds)),
        )

    @classmethod
    def alike(cls, constraint: Constraint, heights: tuple[int, ...]) -> "Stacked":
        """Apply a constraint to every operator."""
        return cls((constraint,) * len(heights), heights)

    @classmethod
    def of(cls, stacks: Sequence[tuple[Constraint, int]]) -> "Stacked":
        """Join `stacks`, given by constraint and rows, to a stack of all operators."""
        parts = [part for constraint, rows in stacks for part in constraint.parts(rows)]
        return cls(tuple(own for _, own in parts), tuple(rows.stop - rows.start for rows, _ in parts))

    def describe(self) -> str:
        return "; ".join(f"{height} rows {kind.describe()}" for kind, height in self._pairs())

    def check(self, rows: int, columns: int) -> None:
        if rows != (accepted := sum(self.heights)):
            raise PatternError(f"Pattern {self} does not fit a weight [{rows} {columns}]. Accepted: {accepted} rows.")
        for kind, height in self._pairs():
            kind.check(height, columns)

    def zeros(self, rows: int, columns: int) -> int:
        return sum(kind.zeros(height, columns) for kind, height in self._pairs())

    def parts(self, rows: int) -> list[tuple[slice, Constraint]]:
        ends = pairwise(accumulate(self.heights, initial=0))
        return [(slice(*pair), kind) for pair, kind in zip(ends, self.constraints, strict=True)]

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        return torch.cat([kind.project(part, metric) for kind, part in self._split(weight)])

    def violation(self, weight: Tensor) -> int:
        return sum(kind.violation(part) for kind, part in self._split(weight))

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return torch.cat([kind.mask(parts, first).flatten(0, 1) for kind, parts in self._runs(scores)])

    def threshold(self, scores: Tensor) -> Tensor:
        runs = [(parts.shape, kind.threshold(parts)) for kind, parts in self._runs(scores)]
        width = max(level.shape[2] for _, level in runs)  # 1, where each row has one
        return torch.cat([level.expand(count, height, width).flatten(0, 1) for (count, height, _), level in runs])

    def _runs(self, scores: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
        """Yield runs of equal neighbouring operators: a constraint, and the scores [k m n] of k operators."""
        first = 0
        for (kind, height), alike in groupby(self._pairs()):
            count = len(list(alike))
            yield kind, scores[first : (first := first + count * height)].unflatten(0, (count, height))

    def _pairs(self) -> Iterator[tuple[Constraint, int]]:
        return zip(self.constraints, self.heights, strict=True)

    def _split(self, tensor: Tensor) -> Iterator[tuple[Constraint, Tensor]]:
        return zip(self.constraints, tensor.split(self.heights), strict=True)
