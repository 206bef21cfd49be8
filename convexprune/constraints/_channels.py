"""Channels that are removed for good: whole columns, and so many that a multiple is left."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from convexprune.constraints._base import Constraint, Quota
from convexprune.constraints._columns import Columns
from convexprune.constraints._share import from_percent, percent
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
