"""Whole input channels: the same columns are zero in all rows of an operator."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from convexprune._device.select import kth_smallest
from convexprune.constraints._base import Constraint, Mask, Quota, keep_largest
from convexprune.constraints._share import check_share, percent, share_of, shares_around


@dataclass(frozen=True)
class Columns(Mask):
    """round(sparsity * n) columns of a weight [m n] are zero in all rows, those of the least energy sum_i S_ij^2.

    Raises:
        PatternError: `sparsity` outside [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_share(self.sparsity)

    def describe(self) -> str:
        return f"columns {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share = share_of("columns", text, sparsity, quota, "columns from all rows")
        return None if share is None else cls(share)

    @property
    def continuous(self) -> bool:
        """To a column."""
        return True

    @property
    def by_column(self) -> bool:
        """They are."""
        return True

    @property
    def by_row(self) -> bool:
        """All rows choose together."""
        return False

    def zeros(self, rows: int, columns: int) -> int:
        return rows * self._removed(columns)

    def violation(self, weight: Tensor) -> int:
        kept = int((weight != 0).any(0).sum())
        return max(0, kept - weight.shape[1] + self._removed(weight.shape[1]))

    def with_share(self, share: float) -> "Columns":
        return replace(self, sparsity=share)

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [self.with_share(each) for each in shares_around(self.sparsity, reach, step)]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        columns = scores.shape[1]
        removed = self._removed(first + columns) - self._removed(first)
        return keep_largest(_norms(scores), columns - removed).expand(scores.shape).clone()

    def threshold(self, scores: Tensor) -> Tensor:
        """A column counts as a whole: each of its scores is to its threshold as its norm is to that of all columns."""
        norms = _norms(scores)
        between = kth_smallest(norms, min(self._removed(norms.shape[1]) + 1, norms.shape[1]))
        return scores.abs() * (between / norms.clamp_min(torch.finfo(scores.dtype).tiny))

    def _removed(self, columns: int) -> int:
        return round(self.sparsity * columns)


def _norms(scores: Tensor) -> Tensor:
    """That of each column [1 n]."""
    return scores.square().sum(0, keepdim=True).sqrt()
