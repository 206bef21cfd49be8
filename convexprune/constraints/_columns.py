"""Whole input channels, singly or in blocks: the same columns are zero in all rows of an operator."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from convexprune._device.select import kth_smallest
from convexprune.constraints._base import Mask, Quota
from convexprune.constraints._budget import (
    Budget,
    check_share,
    check_some,
    column_norms,
    keep_largest,
    percent,
    read_share,
)
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Columns(Mask):
    """round(sparsity * n / block) blocks of columns of a weight [m n] are zero in all rows: the blocks of least energy.

    The energy of a `block`, of so many consecutive columns, is the sum of S_ij^2 over all rows and its columns.
    `sparsity` is the share of the blocks.
    """

    kind: ClassVar[str] = "columns"
    what: ClassVar[str] = "columns from all rows"
    continuous = True  # up to a column or a block
    by_column = True
    by_row = False

    sparsity: float
    block: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_share(self.sparsity)
        if self.block < 1:
            raise PatternError(f"columns:{self.block} is no block. Accepted: columns:64, columns:128, ...")

    def describe(self) -> str:
        return f"{self.kind}{'' if self.block == 1 else f':{self.block}'} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share, block = read_share(cls.kind, text, sparsity, quota, cls.what, numbered=True)
        return None if share is None else cls(share, block=1 if block is None else block)

    def check(self, rows: int, columns: int) -> None:
        if columns % self.block:
            raise PatternError(
                f"Pattern {self}: {columns} columns are no multiple of {self.block}. Take a block that divides them, "
                "or leave the operator out (ignore=)."
            )
        if self.sparsity:
            blocks = f"blocks of {self.block} columns" if self.block > 1 else "columns"
            check_some(self.sparsity, columns // self.block, blocks)

    def zeros(self, rows: int, columns: int) -> int:
        return rows * self._removed(columns)

    def budget(self, shape: Sequence[int]) -> Budget:
        rows, columns = shape
        width = columns // self.block
        return Budget(width, width - self._removed(columns) // self.block, self.block, rows)

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        if scores.ndim == 3:
            return torch.stack([self.mask(weight, first) for weight in scores])
        columns = scores.shape[1]
        removed = self._removed(first + columns) - self._removed(first)
        norms = column_norms(scores, self.block)[None, :: self.block]
        kept = keep_largest(norms, (columns - removed) // self.block).repeat_interleave(self.block, 1)
        return kept.expand(scores.shape).clone()

    def threshold(self, scores: Tensor) -> Tensor:
        """Return thresholds by entry: a score is to its own as the norm of its block is to the threshold of norms."""
        if scores.ndim == 3:
            return torch.stack([self.threshold(weight) for weight in scores])
        norms = column_norms(scores, self.block)[None]
        blocks, removed = norms[:, :: self.block], self._removed(norms.shape[1]) // self.block
        between = kth_smallest(blocks, min(removed + 1, blocks.shape[1]))
        return scores.abs() * (between / norms.clamp_min(torch.finfo(scores.dtype).tiny))

    def _removed(self, columns: int) -> int:
        return self.block * round(self.sparsity * (columns // self.block))
