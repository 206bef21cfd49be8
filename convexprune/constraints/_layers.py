"""Whole decoder layers that are removed for good: of the operators that stay nothing is asked but to make up for it."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._share import check_share, percent, share_of


@dataclass(frozen=True)
class Layers(Mask):
    """Of n decoder layers round(sparsity * n) are removed; a weight of one that stays may be anything.

    Raises:
        PatternError: `sparsity` outside [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_share(self.sparsity)

    def describe(self) -> str:
        return f"layers {percent(self.sparsity)}"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        share = share_of("layers", text, sparsity, quota, "whole decoder layers")
        return None if share is None else cls(share)

    @property
    def removes(self) -> Literal["layers"]:
        return "layers"

    @property
    def compensates(self) -> bool:
        """They do."""
        return True

    def width(self, columns: int) -> int:
        """How many decoder layers are left of so many."""
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
        """Nothing is too small to be kept."""
        return scores.new_zeros(len(scores), 1)
