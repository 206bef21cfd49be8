"""N:M: N non-zeros in every M consecutive inputs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Self

from torch import Tensor

from convexprune._device.select import largest_of_groups, middle_of_groups
from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import Budget
from convexprune.errors import PatternError


@dataclass(frozen=True)
class SemiStructured(Mask):
    """N non-zeros in every group of M consecutive inputs of a row (NVIDIA's convention; 2:4 keeps two of four).

    Args:
        kept: N.
        group: M.

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
    def sparsity(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The share of zeros."""
        return 1 - self.kept / self.group

    @property
    def block(self) -> int:
        """A group is chosen as a whole."""
        return self.group

    def describe(self) -> str:
        return f"{self.kept}:{self.group}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        match = re.fullmatch(r"(\d+):(\d+)", text)
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
        """Every N of that M."""
        return [SemiStructured(kept, self.group) for kept in range(self.group - 1, 0, -1)]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return largest_of_groups(self._groups(scores), self.kept).view_as(scores)

    def threshold(self, scores: Tensor) -> Tensor:
        groups = self._groups(scores)
        middle = middle_of_groups(groups, self.kept)  # in so few, it matters that it is the middle
        return middle.expand_as(groups).reshape(scores.shape)

    def masks(self, scores: Tensor) -> Tensor:
        return self.mask(scores.flatten(0, 1)).view_as(scores)

    def thresholds(self, scores: Tensor) -> Tensor:
        return self.threshold(scores.flatten(0, 1)).view_as(scores)

    def _groups(self, scores: Tensor) -> Tensor:
        self.check(*scores.shape)
        return scores.reshape(scores.shape[0], -1, self.group)
