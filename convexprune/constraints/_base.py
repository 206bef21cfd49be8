"""The interface of constraints on a weight: project, count violations, describe in words that parse back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import Tensor

from convexprune.constraints._budget import Budget, sizes
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError

Quota = Literal["matrix", "row"]
Removed = Literal["channels", "heads", "layers", "experts"]


class Constraint(ABC):
    """A set of weights [m n]: masks, grids. Ties go to the lower index.

    A kind of constraint is a file: a frozen dataclass with the abstract methods, and a line in
    `convexprune.constraints.KINDS`. The attributes tell pruners, allocations and bounds what the kind can do.
    """

    sparsity: float
    """The share of zeros that is asked for."""
    grid: Codebook | None = None
    """The grid of kept values; None: any value."""
    continuous: bool = False
    """True if `with_share` takes any share."""
    by_row: bool = True
    """True if a row has a separate budget, so that rows do not compete."""
    by_column: bool = False
    """True if whole columns are chosen."""
    removes: Removed | None = None
    """The removed parts of the model, `width` of which are left; None: nothing is removed."""
    compensates: bool = False
    """True if weights without requested zeros are solved for, because they compensate for removals elsewhere."""
    block: int = 1
    """Number of consecutive columns that are chosen together."""

    @property
    def share(self) -> float:
        """Return the quantity that an allocation distributes: the share of zeros, or of 16 bits that are saved."""
        return self.sparsity

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
        """Refuse a weight that the constraint does not fit.

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
        """Return the exact number of zeros that are asked of a weight.

        Args:
            rows: m.
            columns: n.

        Returns:
            The number.
        """
        return 0

    def width(self, columns: int) -> int:
        """Return the number of parts, of `columns`, that a model keeps of the kind that the constraint removes."""
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
            scores: [m n], or of several weights [k m n]; not negative.
            first: first column, for a weight that is decided in blocks of columns; the blocks' counts add up to the
                exact count of the whole.

        Returns:
            True for kept entries, of the same shape.

        Raises:
            PatternError: the constraint does not fit scores of this shape, or chooses no entries.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no mask.")

    def threshold(self, scores: Tensor) -> Tensor:
        """Return a threshold between kept and pruned scores.

        The threshold serves as a weight of scores, not as a choice: for a large matrix it is estimated from a part of
        the entries.

        Args:
            scores: as of `mask`.

        Returns:
            A tensor that broadcasts to the scores.

        Raises:
            PatternError: see `mask`.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no threshold.")

    def __str__(self) -> str:
        return self.describe()

    def _derive(self, **values: Any) -> None:
        """Set attributes that follow from the fields of a frozen dataclass."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Mask(Constraint):
    """A rule for the non-zero entries of a weight: the projection keeps the largest entries in the metric."""

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        return weight * self.mask(sizes(weight, metric))

    def violation(self, weight: Tensor) -> int:
        budget = self.budget(weight.shape)
        assert budget is not None, "a mask that has no lines counts for itself"
        counts = budget.sums(weight != 0).count_nonzero(1)
        return budget.block * int((counts - budget.kept).clamp_min(0).sum())
