"""A share of zeros anywhere in the matrix, or in every row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Self

from torch import Tensor

from convexprune._device.select import kth_smallest
from convexprune.constraints._base import Constraint, Mask, Quota, keep_largest
from convexprune.constraints._budget import Budget
from convexprune.constraints._share import check_share, check_some, from_percent, percent, shares_around
from convexprune.errors import PatternError

THRESHOLD_SAMPLE = 2**15  # scores: the standard error of a sampled median is 0.3 % of the entries


@dataclass(frozen=True)
class Unstructured(Mask):
    """A share of zeros anywhere in the matrix, or an equal share in every row: round(sparsity * size) zeros.

    Raises:
        PatternError: `sparsity` outside [0, 1), or an unknown `quota`.
    """

    sparsity: float
    quota: Quota = "matrix"

    def __post_init__(self) -> None:
        check_share(self.sparsity)
        if self.quota not in ("matrix", "row"):
            raise PatternError(f"Unknown quota {self.quota!r}. Known: matrix, row.")

    def describe(self) -> str:
        return f"unstructured {percent(self.sparsity)} per {self.quota}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        if text == "unstructured":
            return cls(0.5 if sparsity is None else sparsity, quota)
        match = re.fullmatch(r"unstructured ([\d.]+)% per (matrix|row)", text)
        return None if match is None else cls(from_percent(match[1]), "row" if match[2] == "row" else "matrix")

    def check(self, rows: int, columns: int) -> None:
        if self.sparsity:
            line = (columns, "weights of a row") if self.by_row else (rows * columns, "weights")
            check_some(self.sparsity, *line)

    def zeros(self, rows: int, columns: int) -> int:
        return rows * round(self.sparsity * columns) if self.by_row else round(self.sparsity * rows * columns)

    def budget(self, shape: Sequence[int]) -> Budget:
        rows, columns = shape
        width = columns if self.by_row else rows * columns
        return Budget(width, width - self.zeros(1 if self.by_row else rows, columns))

    @property
    def continuous(self) -> bool:
        """True, up to an entry."""
        return True

    @property
    def by_row(self) -> bool:
        """True with quota="row"."""
        return self.quota == "row"

    def with_share(self, share: float) -> "Unstructured":
        return replace(self, sparsity=share)

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [self.with_share(each) for each in shares_around(self.sparsity, reach, step)]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self._masks(scores[None], first)[0]

    def masks(self, scores: Tensor) -> Tensor:
        return self._masks(scores, 0)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.thresholds(scores[None])[0]

    def thresholds(self, scores: Tensor) -> Tensor:
        _, rows, columns = scores.shape
        lines = self._lines(scores)
        sample = lines[:, :: _sample_step(lines.shape[1], columns)]
        zeros = round(self.zeros(rows, columns) / (rows * columns) * sample.shape[1])
        return kth_smallest(sample.abs(), min(zeros + 1, sample.shape[1])).view(len(scores), -1, 1)

    def _masks(self, scores: Tensor, first: int) -> Tensor:
        count, rows, columns = scores.shape
        zeros = self.zeros(rows, first + columns) - self.zeros(rows, first)
        lines = self._lines(scores)
        return keep_largest(lines, lines.shape[1] - zeros // (len(lines) // count)).view_as(scores)

    def _lines(self, scores: Tensor) -> Tensor:
        """Return the units with a quota: rows, or whole weights."""
        return scores.flatten(0, 1) if self.by_row else scores.flatten(1)


def _sample_step(length: int, columns: int) -> int:
    """Every so manieth score of a very long line is enough for a threshold, from all of the weight's columns alike."""
    step = max(1, length // THRESHOLD_SAMPLE)
    while gcd(step, columns) > 1:
        step += 1
    return step
