"""Sparsity patterns: scores in, an exact mask of what is kept out."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from convexprune.errors import PatternError

THRESHOLD_SAMPLE = 2**15  # scores: the standard error of a sampled median is 0.3 % of the entries


class AbstractPattern(ABC):
    """A rule for which entries of a weight [m n] may be non-zero. Ties go to the lower index."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """Refuse a weight that the pattern does not fit.

        Raises:
            PatternError: the pattern does not fit a weight [rows columns].
        """

    @abstractmethod
    def zeros(self, rows: int, columns: int) -> int:
        """The exact number of zeros in a weight [rows columns]."""

    @abstractmethod
    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        """True for what is kept [m n]: the entries with the largest scores [m n] (non-negative).

        A weight may be decided in blocks of columns: `first` is where the block begins, and the blocks' counts add up
        to the exact count of the whole.

        Raises:
            PatternError: the pattern does not fit scores of this shape.
        """

    @abstractmethod
    def threshold(self, scores: Tensor) -> Tensor:
        """What separates the sizes of kept scores from the others, in the matrix, row or group; broadcasts to [m n].

        It is for weighing scores, not for choosing: of a large matrix it is estimated from a part of the entries.

        Raises:
            PatternError: the pattern does not fit scores of this shape.
        """

    @property
    @abstractmethod
    def by_row(self) -> bool:
        """Whether every row has a quota of its own."""


@dataclass(frozen=True)
class Unstructured(AbstractPattern):
    """A share of zeros anywhere in the matrix, or the same share in every row: round(sparsity * size) zeros.

    Raises:
        PatternError: `sparsity` outside [0, 1), or an unknown `quota`.
    """

    sparsity: float
    quota: Literal["matrix", "row"] = "matrix"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real):
            raise PatternError(f"Sparsity {self.sparsity!r} is no number: it is the share of zeros, 0.5 for half.")
        if not 0 <= self.sparsity < 1:
            raise PatternError(f"Sparsity {self.sparsity} is outside [0, 1): it is the share of zeros, 0.5 for half.")
        if self.quota not in ("matrix", "row"):
            raise PatternError(f"Unknown quota {self.quota!r}. Known: matrix, row.")

    def check(self, rows: int, columns: int) -> None:
        """Any weight fits, as long as something is pruned of it and something is left."""
        zeros = self.zeros(rows, columns)
        if zeros >= rows * columns or (zeros == 0 and self.sparsity > 0):
            raise PatternError(f"Sparsity {self.sparsity} of a weight [{rows} {columns}] rounds to {zeros} zeros.")

    def zeros(self, rows: int, columns: int) -> int:
        if self.quota == "row":
            return rows * round(self.sparsity * columns)
        return round(self.sparsity * rows * columns)

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        rows, columns = scores.shape
        zeros = self.zeros(rows, first + columns) - self.zeros(rows, first)
        lines = self._lines(scores)
        return keep_largest(lines, lines.shape[1] - zeros // lines.shape[0]).view_as(scores)

    def threshold(self, scores: Tensor) -> Tensor:
        lines = self._lines(scores)
        return self.level(lines[:, :: sample_step(lines.shape[1], scores.shape[1])], *scores.shape)

    def level(self, sample: Tensor, rows: int, columns: int) -> Tensor:
        """The threshold [lines 1] of scores [rows columns], by a `sample` [lines length] of each line."""
        zeros = round(self.zeros(rows, columns) / (rows * columns) * sample.shape[1])
        return sample.abs().kthvalue(min(zeros + 1, sample.shape[1]), dim=1, keepdim=True).values

    @property
    def by_row(self) -> bool:
        return self.quota == "row"

    def _lines(self, scores: Tensor) -> Tensor:
        return scores if self.quota == "row" else scores.reshape(1, -1)

    def __str__(self) -> str:
        return f"unstructured {100 * self.sparsity:.6g}% per {self.quota}"


@dataclass(frozen=True)
class SemiStructured(AbstractPattern):
    """N non-zeros in every group of M consecutive inputs of a row (NVIDIA's convention; 2:4 keeps two of four).

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

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.group

    def check(self, rows: int, columns: int) -> None:
        if columns % self.group:
            raise PatternError(
                f"Pattern {self} does not fit a weight [{rows} {columns}]: {columns} inputs are no multiple of "
                f"{self.group}. Leave the operator out (ignore=) or take another pattern."
            )

    def zeros(self, rows: int, columns: int) -> int:
        return rows * columns // self.group * (self.group - self.kept)

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        groups = self._groups(scores)
        kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept]
        mask = torch.zeros_like(groups, dtype=torch.bool)
        return mask.scatter_(-1, kept, True).view_as(scores)

    def threshold(self, scores: Tensor) -> Tensor:
        groups = self._groups(scores)
        ordered = groups.abs().sort(dim=-1, descending=True).values
        middle = (ordered[..., self.kept - 1, None] + ordered[..., self.kept, None]) / 2  # in so few, it matters
        return middle.expand_as(groups).reshape(scores.shape)

    @property
    def by_row(self) -> bool:
        return True

    def _groups(self, scores: Tensor) -> Tensor:
        self.check(*scores.shape)
        return scores.reshape(scores.shape[0], -1, self.group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True)
class Stacked(AbstractPattern):
    """A pattern for each operator of a stack: operators that share an input are solved as one problem."""

    patterns: tuple[AbstractPattern, ...]
    heights: tuple[int, ...]

    @classmethod
    def alike(cls, pattern: AbstractPattern, heights: tuple[int, ...]) -> "Stacked":
        """One pattern applied to each operator."""
        return cls((pattern,) * len(heights), heights)

    def check(self, rows: int, columns: int) -> None:
        assert rows == sum(self.heights), f"a stack of {self.heights} rows got {rows}"
        for pattern, height in self._parts():
            pattern.check(height, columns)

    def zeros(self, rows: int, columns: int) -> int:
        return sum(pattern.zeros(height, columns) for pattern, height in self._parts())

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        parts = zip(self.patterns, scores.split(self.heights), strict=True)
        return torch.cat([pattern.mask(part, first) for pattern, part in parts])

    def threshold(self, scores: Tensor) -> Tensor:
        columns = scores.shape[1]
        parts = zip(self.patterns, scores.split(self.heights), strict=True)
        return torch.cat([pattern.threshold(part).expand(len(part), columns) for pattern, part in parts])

    @property
    def by_row(self) -> bool:
        return all(pattern.by_row for pattern in self.patterns)

    def rows(self, chosen: slice) -> "Stacked":
        """The patterns of some rows of the stack, where every row has a quota of its own."""
        begins = accumulate(self.heights, initial=0)
        spans = [(max(chosen.start, begin), min(chosen.stop, end)) for begin, end in pairwise(begins)]
        held = [(pattern, j - i) for pattern, (i, j) in zip(self.patterns, spans, strict=True) if i < j]
        return Stacked(tuple(pattern for pattern, _ in held), tuple(height for _, height in held))

    def _parts(self) -> Iterator[tuple[AbstractPattern, int]]:
        return zip(self.patterns, self.heights, strict=True)


def sample_step(length: int, columns: int) -> int:
    """Every so manieth score of a very long line is enough for a threshold, from all of the weight's columns alike."""
    step = max(1, length // THRESHOLD_SAMPLE)
    while gcd(step, columns) > 1:
        step += 1
    return step


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest scores of every row [m n]; of equal scores the earlier are kept."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    kept = scores >= least
    if int(kept.sum()) == count * len(scores):
        return kept
    above = scores > least
    missing = count - above.sum(1, keepdim=True)
    ties = kept ^ above
    return above | (ties & (ties.cumsum(1) <= missing))


def parse_pattern(
    pattern: str, sparsity: float | None = None, quota: Literal["matrix", "row"] = "matrix"
) -> Unstructured | SemiStructured:
    """The pattern of a name: "unstructured" (with `sparsity` and `quota`) or "N:M" (which fixes both).

    Raises:
        PatternError: the name is unknown, or N:M contradicts `sparsity` or `quota`.
    """
    if pattern == "unstructured":
        return Unstructured(0.5 if sparsity is None else sparsity, quota)
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None:
        raise PatternError(f"Unknown pattern {pattern!r}. Known: 'unstructured', and 'N:M' for N non-zeros in M.")
    parsed = SemiStructured(int(match[1]), int(match[2]))
    if sparsity is not None and abs(parsed.sparsity - sparsity) > 1e-9:
        raise PatternError(
            f"Pattern {parsed} has sparsity {parsed.sparsity:g}, but {sparsity:g} was asked. Leave the sparsity out, "
            f"or take a pattern that has it (N:M means N non-zeros in M)."
        )
    if quota != "matrix":
        raise PatternError(
            f"Pattern {parsed} has a quota of its own in every group of {parsed.group}. Leave quota out."
        )
    return parsed
