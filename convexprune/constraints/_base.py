"""The interface of constraints on a weight: project, count violations, describe in words that parse back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from torch import Tensor

from convexprune.constraints._budget import Budget, shares_around, sizes
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError

Quota = Literal["matrix", "row"]
Removed = Literal["channels", "heads", "layers", "experts"]


class Constraint(ABC):
    """A set of weights [m n]: masks, grids. Ties go to the lower index.

    A kind of constraint is a file: a frozen dataclass with the abstract methods, and a line in
    `convexprune.constraints.KINDS`. The attributes tell pruners, allocations and bounds what the kind can do.
    """

    sparsity: float  # the share of zeros that is asked for
    grid: Codebook | None = None  # the grid of kept values; None: any value
    continuous: bool = False  # true if `with_share` takes any share
    by_row: bool = True  # true if a row has a separate budget, so that rows do not compete
    by_column: bool = False  # true if whole columns are chosen
    removes: Removed | None = None  # the removed parts of the model, `width` of which are left; None: no part
    compensates: bool = False  # true if weights without requested zeros make up for removals elsewhere
    block: int = 1  # number of consecutive columns that are chosen together

    @property
    def share(self) -> float:
        """Return the quantity that an allocation distributes: the share of zeros, or of 16 bits that are saved."""
        return self.sparsity

    @abstractmethod
    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest P in the set, of least sum_ij h_j (P_ij - V_ij)^2, as near as the kind can compute.

        The metric h [n] is not negative, the diagonal of a Gram matrix, say; None means ones.
        """

    @abstractmethod
    def violation(self, weight: Tensor) -> int:
        """Count entries or columns of the `weight` [m n] that break the constraint; 0: the weight is in the set."""

    @abstractmethod
    def describe(self) -> str:
        """Return a text from which `parse_pattern` makes an equal constraint."""

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        """Return the constraint of a name, with a share beside it, or of a description; None: another kind's."""
        return None

    def check(self, rows: int, columns: int) -> None:
        """Refuse a weight that the constraint does not fit, because all entries would be zero, say."""
        zeros = self.zeros(rows, columns)
        if zeros >= rows * columns or (zeros == 0 and self.sparsity > 0):
            raise PatternError(f"Sparsity {self.sparsity} of a weight [{rows} {columns}] rounds to {zeros} zeros.")

    def budget(self, shape: Sequence[int]) -> Budget | None:
        """Return the lines of a weight of that `shape` and the budget per line; None without lines."""
        return None

    def zeros(self, rows: int, columns: int) -> int:
        """Return the exact number of zeros that are asked of a weight."""
        return 0

    def width(self, columns: int) -> int:
        """Return the number of parts, of `columns`, that a model keeps of the kind that the constraint removes."""
        return columns

    def parts(self, rows: int) -> list[tuple[slice, "Constraint"]]:
        """Return rows and constraint of every operator in a stack of `rows`."""
        return [(slice(0, rows), self)]

    def with_share(self, share: float) -> "Constraint":
        """Return a constraint of the same kind with a new `share` in [0, 1), as near as possible."""
        if not self.continuous:
            raise PatternError(f"Pattern {self} has no share of zeros to choose.")
        return replace(self, sparsity=share)  # pyright: ignore[reportArgumentType]: kinds are dataclasses

    def ladder(self, reach: float, step: float) -> list["Constraint"]:
        """Return choices around this constraint, with shares up to `reach` from its own, the largest share last."""
        spread = self.continuous and self.removes is None  # else all layers keep the same width
        shares = shares_around(self.sparsity, reach, step) if spread else ()
        return [self.with_share(share) for share in shares] or [self]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        """Mark the kept entries: the largest scores [m n], not negative, or those of several weights [k m n].

        A weight may be decided in blocks of columns, each from its `first`: their counts add up to that of the whole.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no mask.")

    def threshold(self, scores: Tensor) -> Tensor:
        """Return a threshold between kept and pruned `scores`, which broadcasts to them.

        It serves as a weight of scores, not as a choice: for a large matrix it is an estimate from some entries.
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
