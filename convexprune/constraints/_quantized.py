"""A choice of entries whose kept values are on a grid; zeros stay zero."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from convexprune.constraints._base import Constraint
from convexprune.constraints._budget import Budget
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError


@dataclass(frozen=True)
class Quantized(Constraint):
    """Weights in `support` whose `values` are on a grid. A kept value may round to zero: there may be more zeros.

    `sparsity` is the support's.

    Args:
        support: which entries may be kept.
        values: the grid of what is kept.

    Raises:
        PatternError: the support removes columns for good, or has zeros that the grid does not have.
    """

    support: Constraint
    values: Codebook
    sparsity: float = field(init=False)

    def __post_init__(self) -> None:
        if removed := self.support.removes:
            raise PatternError(
                f"{removed.capitalize()} are removed before a model is quantized: prune twice, the smaller model last."
            )
        if self.support.sparsity and not self.values.has_zero:
            raise PatternError(f"{self.values} has no zero, so nothing can be pruned there. Take a sparsity of 0.")
        object.__setattr__(self, "sparsity", self.support.sparsity)

    def describe(self) -> str:
        return f"{self.support}, {self.values}"

    @property
    def grid(self) -> Codebook:
        return self.values

    @property
    def continuous(self) -> bool:
        """As the support, or as any number of bits can be had."""
        return self.support.continuous if self.values.share is None else True

    @property
    def by_column(self) -> bool:
        """As the support."""
        return self.support.by_column

    @property
    def by_row(self) -> bool:
        """As the support."""
        return self.support.by_row

    @property
    def block(self) -> int:
        """As the support."""
        return self.support.block

    def check(self, rows: int, columns: int) -> None:
        self.support.check(rows, columns)
        self.values.check(rows, columns)

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """See `Constraint.project`: the support first, then what is kept."""
        return self.values.project(self.support.project(weight, metric), metric)

    def violation(self, weight: Tensor) -> int:
        return self.support.violation(weight) + self.values.violation(weight)

    def budget(self, shape: Sequence[int]) -> Budget | None:
        return self.support.budget(shape)

    def zeros(self, rows: int, columns: int) -> int:
        return self.support.zeros(rows, columns)

    @property
    def share(self) -> float:
        """The share of bits, if the grid takes any number of bits; else the support's share of zeros."""
        saved = self.values.share
        return self.support.share if saved is None else saved

    def with_share(self, share: float) -> "Quantized":
        if self.values.share is None:
            return replace(self, support=self.support.with_share(share))
        return replace(self, values=self.values.with_share(share))

    def ladder(self, reach: float, step: float) -> list[Constraint]:
        if self.values.share is None:
            return [replace(self, support=each) for each in self.support.ladder(reach, step)]
        return [replace(self, values=each) for each in self.values.ladder()]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        return self.support.mask(scores, first)

    def threshold(self, scores: Tensor) -> Tensor:
        return self.support.threshold(scores)

    def masks(self, scores: Tensor) -> Tensor:
        return self.support.masks(scores)

    def thresholds(self, scores: Tensor) -> Tensor:
        return self.support.thresholds(scores)
