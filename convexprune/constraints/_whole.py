"""Decoder layers or experts that are removed for good: the operators that stay have no zeros, and may compensate."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._share import check_share, percent, share_of


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
        """True."""
        return True

    def width(self, columns: int) -> int:
        """Return the number of remaining parts."""
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
