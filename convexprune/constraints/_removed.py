"""Parts of a model that are removed for good: channels, attention heads, decoder layers, experts."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import check_share, check_some, percent, read_share
from convexprune.constraints._columns import Columns
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Channels(Columns):
    """Columns that are zero in all rows; of n there remain (1 - sparsity) n, rounded to a `multiple`."""

    kind = removes = "channels"

    multiple: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise PatternError(f"channels:{self.multiple} is no width. Accepted: channels:64, channels:256, ...")

    def describe(self) -> str:
        return f"channels:{self.multiple} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share, multiple = read_share(cls.kind, text, sparsity, quota, cls.what, numbered=True)
        return None if share is None else cls(share, cls.multiple if multiple is None else multiple)

    def width(self, columns: int) -> int:
        return self.multiple * round((1 - self.sparsity) * columns / self.multiple)

    def check(self, rows: int, columns: int) -> None:
        if not 0 < self.width(columns) < columns:
            least, most = self.multiple, (columns - 1) // self.multiple * self.multiple
            shares = f"{1 - most / columns:.3g} for a width of {most}"
            shares += f", to {1 - least / columns:.3g} for {least}" if least < most else ""
            raise PatternError(
                f"Sparsity {self.sparsity} of {columns} channels rounds to a width of {self.width(columns)}. Accepted: "
                f"{shares if most else 'none'}; with a lower multiple than {self.multiple} others, as channels:1."
            )

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        """Return only this constraint: all layers keep the same width."""
        return [self]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        if first:
            raise PatternError(f"Pattern {self} is decided at once, not in blocks of columns.")
        return super().mask(scores)

    def _removed(self, columns: int) -> int:
        return columns - min(self.width(columns), columns)


@dataclass(frozen=True)
class Heads(Columns):
    """round(sparsity * n) of n KV groups are removed: key/value heads with all query heads that attend to them.

    Only the model knows the columns of a group: its operators are pruned to `Columns` in blocks.
    """

    kind = removes = "heads"
    what = "whole attention heads"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share, _ = read_share(cls.kind, text, sparsity, quota, cls.what)
        return None if share is None else cls(share)

    def width(self, columns: int) -> int:
        return columns - self._removed(columns)

    def check(self, rows: int, columns: int) -> None:
        if columns == 1:
            raise PatternError("All query heads share one KV head, and none can go. Pattern 'channels' removes others.")
        check_some(self.sparsity, columns, "KV groups of heads")

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [self]


@dataclass(frozen=True)
class _Whole(Mask):
    """round(sparsity * n) of n parts are removed; weights of remaining parts are free."""

    what: ClassVar[str]
    compensates = True

    sparsity: float

    def __post_init__(self) -> None:
        check_share(self.sparsity)

    def describe(self) -> str:
        return f"{self.removes} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share, _ = read_share(str(cls.removes), text, sparsity, quota, cls.what)
        return None if share is None else cls(share)

    def width(self, columns: int) -> int:
        return columns - round(self.sparsity * columns)

    def check(self, rows: int, columns: int) -> None:
        """Take every weight."""

    def violation(self, weight: Tensor) -> int:
        return 0

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(*scores.shape[:-1], 1)


@dataclass(frozen=True)
class Layers(_Whole):
    """round(sparsity * n) of n decoder layers are removed; weights of remaining layers are free."""

    removes = "layers"
    what = "whole decoder layers"


@dataclass(frozen=True)
class Experts(_Whole):
    """round(sparsity * n) of the n experts of every mixture are removed; weights of remaining experts are free."""

    removes = "experts"
    what = "whole experts"
