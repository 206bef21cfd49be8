"""A choice of entries whose kept values are on a grid of few bits; zeros stay zero."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from convexprune.constraints._base import Budget, Constraint
from convexprune.constraints._grid import ROW, Grid
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Quantized(Constraint):
    """Weights in `support` whose `values` are on a grid. A kept value may round to zero: there may be more zeros.

    `sparsity` is the support's.

    Args:
        support: which entries may be kept.
        values: the grid of what is kept.

    Raises:
        PatternError: the support removes columns for good.
    """

    support: Constraint
    values: Grid
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        if removed := self.support.removes:
            raise PatternError(
                f"{removed.capitalize()} are removed before a model is quantized: prune twice, the smaller model last."
            )
        object.__setattr__(self, "sparsity", self.support.sparsity)

    def describe(self) -> str:
        return f"{self.support}, {self.values}"

    @classmethod
    def read(cls, text: str) -> tuple[str, Grid] | None:
        """Take a description apart.

        Args:
            text: what `describe` says.

        Returns:
            The description of the support, and the grid; None if the text is of another kind.

        Raises:
            PatternError: there is no such grid.
        """
        match = re.fullmatch(r"(.+), int(\d+) (?:in groups of (\d+)|per output channel)", text)
        return None if match is None else (match[1], Grid(int(match[2]), int(match[3] or ROW)))

    @property
    def grid(self) -> Grid:
        return self.values

    @property
    def continuous(self) -> bool:
        """As the support."""
        return self.support.continuous

    @property
    def by_column(self) -> bool:
        """As the support."""
        return self.support.by_column

    @property
    def by_row(self) -> bool:
        """As the support."""
        return self.support.by_row

    @property
    def block(self) -> int:
        """As the support."""
        return self.support.block

    def check(self, rows: int, columns: int) -> None:
        self.support.check(rows, columns)
        self.values.check(columns)

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """See `Constraint.project`: the support first, then each group by its best scale."""
        kept = self.support.project(weight, metric)
        scales, _, on = self.values.find(kept)
        scales = torch.where(on, scales.to(kept), self.values.fit(kept, metric))
        return self.values.weight(self.values.codes(kept, scales), scales)

    def violation(self, weight: Tensor) -> int:
        on = self.values.find(weight)[2]
        return self.support.violation(weight) + weight.numel() // on.numel() * int((~on).sum())

    def budget(self, shape: Sequence[int]) -> Budget | None:
        return self.support.budget(shape)

    def zeros(self, rows: int, columns: int) -> int:
        return self.support.zeros(rows, columns)

    def with_sparsity(self, sparsity: float) -> "Quantized":
        return replace(self, support=self.support.with_sparsity(sparsity))

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [replace(self, support=each) for each in self.support.ladder(reach, step)]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self.support.mask(scores, first)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.support.threshold(scores)
