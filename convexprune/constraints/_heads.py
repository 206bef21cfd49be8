"""Attention heads that are removed for good, a KV group at a time."""

from dataclasses import dataclass
from typing import Literal, Self

from convexprune.constraints._base import Constraint, Quota
from convexprune.constraints._columns import Columns
from convexprune.constraints._share import check_some, percent, share_of
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Heads(Columns):
    """round(sparsity * n) of n KV groups are removed: key/value heads with all query heads that attend to them.

    Only the model knows the columns of a group: its operators are pruned to `Columns` in blocks.

    Raises:
        PatternError: `sparsity` outside [0, 1).
    """

    def describe(self) -> str:
        return f"heads {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share = share_of("heads", text, sparsity, quota, "whole attention heads")
        return None if share is None else cls(share)

    @property
    def removes(self) -> Literal["heads"]:
        return "heads"

    def width(self, columns: int) -> int:
        return columns - self._removed(columns)

    def check(self, rows: int, columns: int) -> None:
        if columns == 1:
            raise PatternError("All query heads share one KV head, and none can go. Pattern 'channels' removes others.")
        check_some(self.sparsity, columns, "KV groups of heads")

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        """All layers keep as many."""
        return [self]
