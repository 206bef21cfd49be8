"""Constraints on whole columns, and on parts of a model that are removed for good: channels, heads, layers, experts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from convexprune._device.select import kth_smallest
from convexprune.constraints._base import Mask, Quota
from convexprune.constraints._budget import (
    PERCENT,
    Budget,
    check_share,
    check_some,
    column_norms,
    from_percent,
    keep_largest,
    percent,
)
from convexprune.errors import PatternError


@dataclass(frozen=True)
class _Share(Mask):
    """A share of parts, described as "heads 25%", or with a number as "columns:64 25%"."""

    kind: ClassVar[str]
    what: ClassVar[str]
    number: ClassVar[str] = ""  # the field that the number beside the kind sets

    sparsity: float

    def __post_init__(self) -> None:
        check_share(self.sparsity)

    def describe(self) -> str:
        return f"{self.kind} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        match = re.fullmatch(rf"{cls.kind}(?::(\d{{1,9}}))?(?: {PERCENT})?", text)
        if match is None or (match[1] and not cls.number):
            return None
        if quota != "matrix":
            raise PatternError(f"Pattern {cls.kind!r} removes {cls.what}. Leave quota out.")
        share = from_percent(match[2]) if match[2] else 0.5 if sparsity is None else sparsity
        return cls(share, **({cls.number: int(match[1])} if match[1] else {}))


@dataclass(frozen=True)
class Columns(_Share):
    """round(sparsity * n / block) blocks of columns of a weight [m n] are zero in all rows: the blocks of least energy.

    The energy of a `block`, of so many consecutive columns, is the sum of S_ij^2 over all rows and its columns.
    `sparsity` is the share of the blocks.
    """

    kind = "columns"
    what = "columns from all rows"
    number = "block"
    continuous = True  # up to a column or a block
    by_column = True
    by_row = False

    block: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise PatternError(f"columns:{self.block} is no block. Accepted: columns:64, columns:128, ...")

    def describe(self) -> str:
        return f"{self.kind}{'' if self.block == 1 else f':{self.block}'} {percent(self.sparsity)}"

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


@dataclass(frozen=True)
class Channels(Columns):
    """Columns that are zero in all rows; of n there remain (1 - sparsity) n, rounded to a `multiple`."""

    kind = removes = "channels"
    number = "multiple"

    multiple: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise PatternError(f"channels:{self.multiple} is no width. Accepted: channels:64, channels:256, ...")

    def describe(self) -> str:
        return f"channels:{self.multiple} {percent(self.sparsity)}"

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
    number = ""

    def width(self, columns: int) -> int:
        return columns - self._removed(columns)

    def check(self, rows: int, columns: int) -> None:
        if columns == 1:
            raise PatternError("All query heads share one KV head, and none can go. Pattern 'channels' removes others.")
        check_some(self.sparsity, columns, "KV groups of heads")


@dataclass(frozen=True)
class _Whole(_Share):
    """round(sparsity * n) of n parts are removed; weights of remaining parts are free."""

    compensates = True

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

    kind = removes = "layers"
    what = "whole decoder layers"


@dataclass(frozen=True)
class Experts(_Whole):
    """round(sparsity * n) of the n experts of every mixture are removed; weights of remaining experts are free."""

    kind = removes = "experts"
    what = "whole experts"
