"""Parts of a model that are removed for good: channels, attention heads, decoder layers, experts."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import check_share, check_some, from_percent, percent, share_of
from convexprune.constraints._columns import Columns
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Channels(Columns):
    """Columns that are zero in all rows; of n there remain (1 - sparsity) n, rounded to a `multiple`.

    Raises:
        PatternError: `sparsity` outside [0, 1), or a multiple below 1.
    """

    multiple: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1:
            raise PatternError(f"channels:{self.multiple} is no width. Accepted: channels:64, channels:256, ...")

    def describe(self) -> str:
        return f"channels:{self.multiple} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        match = re.fullmatch(r"channels(?::(\d{1,9}))?(?: ([\d.]+)%)?", text)
        if match is None:
            return None
        if quota != "matrix":
            raise PatternError("Pattern 'channels' removes columns from all rows. Leave quota out.")
        share = from_percent(match[2]) if match[2] else 0.5 if sparsity is None else sparsity
        return cls(share, int(match[1] or cls.multiple))

    @property
    def removes(self) -> Literal["channels"]:
        return "channels"

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
        return [self]


@dataclass(frozen=True)
class _Whole(Mask):
    """round(sparsity * n) of n parts are removed; weights of remaining parts are free."""

    kind: ClassVar[Literal["layers", "experts"]]
    what: ClassVar[str]

    sparsity: float

    def __post_init__(self) -> None:
        check_share(self.sparsity)

    def describe(self) -> str:
        return f"{self.kind} {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share = share_of(cls.kind, text, sparsity, quota, cls.what)
        return None if share is None else cls(share)

    @property
    def removes(self) -> Literal["layers", "experts"]:
        return self.kind

    @property
    def compensates(self) -> bool:
        return True

    def width(self, columns: int) -> int:
        return columns - round(self.sparsity * columns)

    def check(self, rows: int, columns: int) -> None:
        """Every weight fits."""

    def violation(self, weight: Tensor) -> int:
        return 0

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [self]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(len(scores), 1)


@dataclass(frozen=True)
class Layers(_Whole):
    """round(sparsity * n) of n decoder layers are removed; weights of remaining layers are free.

    Raises:
        PatternError: `sparsity` outside [0, 1).
    """

    kind = "layers"
    what = "whole decoder layers"


@dataclass(frozen=True)
class Experts(_Whole):
    """round(sparsity * n) of the n experts of every mixture are removed; weights of remaining experts are free.

    Raises:
        PatternError: `sparsity` outside [0, 1).
    """

    kind = "experts"
    what = "whole experts"
