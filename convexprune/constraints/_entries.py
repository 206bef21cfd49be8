"""Choices of single entries: a share of the matrix or of every row, and N:M."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from numbers import Integral
from typing import Self

from torch import Tensor

from convexprune._device.select import kth_smallest, largest_of_groups, middle_of_groups
from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import (
    PERCENT,
    Budget,
    check_share,
    check_some,
    from_percent,
    keep_largest,
    percent,
)
from convexprune.errors import PatternError

THRESHOLD_SAMPLE = 2**15  # scores: the standard error of a sampled median is 0.3 % of the entries


@dataclass(frozen=True)
class Unstructured(Mask):
    """A share of zeros anywhere in the matrix, or an equal share in every row: round(sparsity * size) zeros.

    Raises:
        PatternError: `sparsity` outside [0, 1), or an unknown `quota`.
    """

    continuous = True  # up to an entry

    sparsity: float
    quota: Quota = "matrix"

    def __post_init__(self) -> None:
        check_share(self.sparsity)
        if self.quota not in ("matrix", "row"):
            raise PatternError(f"Unknown quota {self.quota!r}. Known: matrix, row.")
        self._derive(by_row=self.quota == "row")

    def describe(self) -> str:
        return f"unstructured {percent(self.sparsity)} per {self.quota}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        if text == "unstructured":
            return cls(0.5 if sparsity is None else sparsity, quota)
        match = re.fullmatch(rf"unstructured {PERCENT} per (matrix|row)", text)
        if match is None:
            return None
        if quota not in ("matrix", match[2]):
            raise PatternError(f"Pattern {text!r} beside quota={quota!r}. Leave quota out, or take 'unstructured'.")
        return cls(from_percent(match[1]), "row" if match[2] == "row" else "matrix")

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

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        rows, columns = scores.shape[-2:]
        zeros = self.zeros(rows, first + columns) - self.zeros(rows, first)
        lines = self._lines(scores)
        return keep_largest(lines, lines.shape[1] - zeros // (rows if self.by_row else 1)).view_as(scores)

    def threshold(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        lines = self._lines(scores)
        sample = lines[:, :: _sample_step(lines.shape[1], columns)]
        zeros = round(self.zeros(rows, columns) / (rows * columns) * sample.shape[1])
        return kth_smallest(sample.abs(), min(zeros + 1, sample.shape[1])).view(*scores.shape[:-2], -1, 1)

    def _lines(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        return scores.reshape(-1, columns if self.by_row else rows * columns)


def _sample_step(length: int, columns: int) -> int:
    """Every so manieth score of a very long line is enough for a threshold, from all of the weight's columns alike."""
    step = max(1, length // THRESHOLD_SAMPLE)
    while gcd(step, columns) > 1:
        step += 1
    return step


@dataclass(frozen=True)
class SemiStructured(Mask):
    """N = `kept` non-zeros in every `group` of M inputs of a row (NVIDIA's convention; 2:4 keeps two of four).

    Raises:
        PatternError: not 1 <= kept < group.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        whole = isinstance(self.kept, Integral) and isinstance(self.group, Integral)
        if not whole or not 1 <= self.kept < self.group:
            raise PatternError(
                f"Pattern {self} is no pattern: N:M keeps N of every M inputs, whole numbers with 1 <= N < M."
            )
        self._derive(sparsity=1 - self.kept / self.group, block=self.group)

    def describe(self) -> str:
        return f"{self.kept}:{self.group}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if match is None:
            return None
        parsed = cls(int(match[1]), int(match[2]))
        if quota != "matrix":
            raise PatternError(
                f"Pattern {parsed} has a quota of its own in every group of {parsed.group}. Leave quota out."
            )
        return parsed

    def check(self, rows: int, columns: int) -> None:
        if columns % self.group:
            raise PatternError(
                f"Pattern {self} does not fit a weight [{rows} {columns}]: {columns} inputs are no multiple of "
                f"{self.group}. Leave the operator out (ignore=) or take another pattern."
            )

    def zeros(self, rows: int, columns: int) -> int:
        return rows * columns // self.group * (self.group - self.kept)

    def budget(self, shape: Sequence[int]) -> Budget:
        self.check(shape[0], shape[1])
        return Budget(self.group, self.kept)

    def with_share(self, share: float) -> "SemiStructured":
        return SemiStructured(round((1 - share) * self.group), self.group)

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        return [SemiStructured(kept, self.group) for kept in range(self.group - 1, 0, -1)]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return largest_of_groups(self._groups(scores), self.kept).view_as(scores)

    def threshold(self, scores: Tensor) -> Tensor:
        groups = self._groups(scores)
        middle = middle_of_groups(groups, self.kept)  # in so few, it matters that it is the middle
        return middle.expand_as(groups).reshape(scores.shape)

    def _groups(self, scores: Tensor) -> Tensor:
        self.check(*scores.shape[-2:])
        return scores.reshape(-1, scores.shape[-1] // self.group, self.group)
