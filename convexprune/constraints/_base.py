"""The interface of constraints on a weight: project, count violations, describe in words that parse back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from convexprune.constraints._budget import Budget, sizes
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError

Quota = Literal["matrix", "row"]
Removed = Literal["channels", "heads", "layers", "experts"]


class Constraint(ABC):
    """A set of weights [m n]: masks, grids. Ties go to the lower index.

    A kind of constraint is a file: a frozen dataclass with the abstract methods, and a line in
    `convexprune.constraints.KINDS`. The properties tell pruners, allocations and bounds what the kind can do.
    """

    sparsity: float
    """The share of zeros that is asked for."""

    @property
    def grid(self) -> Codebook | None:
        """The grid of kept values; None: any value."""
        return None

    @property
    def share(self) -> float:
        """Return the quantity that an allocation distributes: the share of zeros, or of 16 bits that are saved."""
        return self.sparsity

    @property
    def continuous(self) -> bool:
        """True if `with_share` takes any share."""
        return False

    @property
    def by_row(self) -> bool:
        """True if a row has a separate budget, so that rows do not compete."""
        return True

    @property
    def by_column(self) -> bool:
        """True if whole columns are chosen."""
        return False

    @property
    def removes(self) -> Removed | None:
        """The removed parts of the model, `width` of which are left; None: nothing is removed."""
        return None

    @property
    def compensates(self) -> bool:
        """True if weights without requested zeros are solved for, because they compensate for removals elsewhere."""
        return False

    @property
    def block(self) -> int:
        """Number of consecutive columns that are chosen together."""
        return 1

    @abstractmethod
    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest weight in the set.

        Args:
            weight: V [m n].
            metric: h [n], not negative (the diagonal of a Gram matrix, say); None: ones.

        Returns:
            The P of the set with the least sum_ij h_j (P_ij - V_ij)^2, as near as the kind can compute.

        Raises:
            PatternError: the constraint does not fit a weight of this shape.
        """

    @abstractmethod
    def violation(self, weight: Tensor) -> int:
        """Count entries or columns of the `weight` [m n] that break the constraint; 0: the weight is in the set."""

    @abstractmethod
    def describe(self) -> str:
        """Return a text from which `parse_pattern` makes an equal constraint."""

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        """Return the constraint of a name or a description.

        Args:
            text: the name or the description.
            sparsity: a share of zeros beside a name.
            quota: unit of the share.

        Returns:
            The constraint; None if the text is of a different kind.

        Raises:
            PatternError: the settings are out of range, or unknown to this kind.
        """
        return None

    def check(self, rows: int, columns: int) -> None:
        """Refuse a weight [rows columns] that the constraint does not fit.

        Args:
            rows: m.
            columns: n.

        Raises:
            PatternError: all entries would be zero, or none although zeros are requested.
        """
        zeros = self.zeros(rows, columns)
        if zeros >= rows * columns or (zeros == 0 and self.sparsity > 0):
            raise PatternError(f"Sparsity {self.sparsity} of a weight [{rows} {columns}] rounds to {zeros} zeros.")

    def budget(self, shape: Sequence[int]) -> Budget | None:
        """Return the lines of a weight of that `shape` and the budget per line; None without lines."""
        return None

    def zeros(self, rows: int, columns: int) -> int:
        """The exact number of zeros that are asked of a weight.

        Args:
            rows: m.
            columns: n.

        Returns:
            The number.
        """
        return 0

    def width(self, columns: int) -> int:
        """Return the number of parts that a model keeps of the kind that the constraint `removes`.

        Args:
            columns: n, the number of parts.

        Returns:
            The number.
        """
        return columns

    def parts(self, rows: int) -> list[tuple[slice, "Constraint"]]:
        """Return rows and constraint of every operator in a stack of `rows`."""
        return [(slice(0, rows), self)]

    def with_share(self, share: float) -> "Constraint":
        """Return a constraint of the same kind with a new share, as near as possible.

        Args:
            share: in [0, 1).

        Returns:
            The constraint.

        Raises:
            PatternError: the share is out of range, or the kind has no share.
        """
        raise PatternError(f"Pattern {self} has no share of zeros to choose.")

    def ladder(self, reach: float, step: float) -> list["Constraint"]:
        """Return constraints of the kind around this constraint, as choices for an allocation.

        Args:
            reach: largest distance of the shares of zeros.
            step: distance of neighbours, if any share is possible.

        Returns:
            The choices, the largest share last.
        """
        return [self]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        """Mark the kept entries: the largest scores.

        Args:
            scores: [m n], not negative.
            first: first column, for a weight that is decided in blocks of columns; the blocks' counts add up to the
                exact count of the whole.

        Returns:
            [m n], True for kept entries.

        Raises:
            PatternError: the constraint does not fit scores of this shape, or chooses no entries.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no mask.")

    def threshold(self, scores: Tensor) -> Tensor:
        """Return a threshold between kept and pruned scores.

        The threshold serves as a weight of scores, not as a choice: for a large matrix it is estimated from a part of
        the entries.

        Args:
            scores: [m n].

        Returns:
            A tensor that broadcasts to [m n].

        Raises:
            PatternError: see `mask`.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no threshold.")

    def masks(self, scores: Tensor) -> Tensor:
        """Apply `mask` to several scores of equal shape.

        Args:
            scores: [k m n].

        Returns:
            [k m n].
        """
        return torch.stack([self.mask(each) for each in scores])

    def thresholds(self, scores: Tensor) -> Tensor:
        """Apply `threshold` to several scores of equal shape.

        Args:
            scores: [k m n].

        Returns:
            A tensor with three axes that broadcasts to [k m n].
        """
        return torch.stack([self.threshold(each) for each in scores])

    def __str__(self) -> str:
        return self.describe()


class Mask(Constraint):
    """A rule for the non-zero entries of a weight: the projection keeps the largest entries in the metric."""

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        return weight * self.mask(sizes(weight, metric))

    def violation(self, weight: Tensor) -> int:
        budget = self.budget(weight.shape)
        assert budget is not None, "a mask that has no lines counts for itself"
        counts = budget.sums(weight != 0).count_nonzero(1)
        return budget.block * int((counts - budget.kept).clamp_min(0).sum())
