"""What every constraint on a weight promises: project on it, see what breaks it, say it in words that parse back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.select import kth_smallest
from convexprune.constraints._budget import Budget
from convexprune.constraints._codebook import Codebook
from convexprune.errors import PatternError

Quota = Literal["matrix", "row"]
Removed = Literal["channels", "heads", "layers", "experts"]


class Constraint(ABC):
    """A set of weights [m n], for a weight to be put into: masks, grids. Ties go to the lower index.

    A kind of constraint is one file: a frozen dataclass with the abstract methods, and a line in
    `convexprune.constraints.KINDS`. The properties say what pruners, allocations and bounds may ask of it.
    """

    sparsity: float
    """The share of zeros that is asked for."""

    @property
    def grid(self) -> Codebook | None:
        """What the values that are kept have to be on; None: any will do."""
        return None

    @property
    def share(self) -> float:
        """What an allocation hands out: the share of zeros, or of 16 bits a weight those that are saved."""
        return self.sparsity

    @property
    def continuous(self) -> bool:
        """Whether `with_share` can give it any share."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether each row has a budget of its own, so that rows do not compete."""
        return True

    @property
    def by_column(self) -> bool:
        """Whether whole columns are chosen."""
        return False

    @property
    def removes(self) -> Removed | None:
        """What of the model is removed for good: of so many there are `width` left; None: nothing is."""
        return None

    @property
    def compensates(self) -> bool:
        """Whether a weight of which no zeros are asked is solved for: it makes up for what is removed elsewhere."""
        return False

    @property
    def block(self) -> int:
        """How many consecutive columns have to be chosen together."""
        return 1

    @abstractmethod
    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """The nearest weight in the set.

        Args:
            weight: V [m n].
            metric: h [n], not negative (the diagonal of a Gram matrix, say); None: ones.

        Returns:
            The P of the set with the least sum_ij h_j (P_ij - V_ij)^2, as near as the kind can find it.

        Raises:
            PatternError: the constraint does not fit a weight of this shape.
        """

    @abstractmethod
    def violation(self, weight: Tensor) -> int:
        """How many entries, or columns, of the `weight` [m n] are too many, or off the grid; 0: it is in the set."""

    @abstractmethod
    def describe(self) -> str:
        """A text from which `parse_pattern` makes an equal constraint."""

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        """The constraint of a name, or of what `describe` says.

        Args:
            text: the name or the description.
            sparsity: a share of zeros that is given beside a name.
            quota: where it holds.

        Returns:
            The constraint; None if the text is of another kind.

        Raises:
            PatternError: the settings are out of range, or none of this kind.
        """
        return None

    def check(self, rows: int, columns: int) -> None:
        """Refuse a weight that the constraint does not fit: its zeros are all of it, or none where some are asked for.

        Args:
            rows: m.
            columns: n.

        Raises:
            PatternError: it does not fit a weight [rows columns].
        """
        zeros = self.zeros(rows, columns)
        if zeros >= rows * columns or (zeros == 0 and self.sparsity > 0):
            raise PatternError(f"Sparsity {self.sparsity} of a weight [{rows} {columns}] rounds to {zeros} zeros.")

    def budget(self, shape: Sequence[int]) -> Budget | None:
        """The lines of a weight of that `shape` and what each may keep; None if it has no lines."""
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
        """How many a model keeps of what the constraint `removes`.

        Args:
            columns: n, of which there are so many.

        Returns:
            The number.
        """
        return columns

    def parts(self, rows: int) -> list[tuple[slice, "Constraint"]]:
        """The constraint of each operator in a stack of `rows`, with its rows; of one operator itself."""
        return [(slice(0, rows), self)]

    def with_share(self, share: float) -> "Constraint":
        """The same kind with another share, as near as there is.

        Args:
            share: in [0, 1).

        Returns:
            The constraint.

        Raises:
            PatternError: the share is out of range, or the kind has none.
        """
        raise PatternError(f"Pattern {self} has no share of zeros to choose.")

    def ladder(self, reach: float, step: float) -> list["Constraint"]:
        """Constraints of its kind to choose from where this one is asked for on the whole.

        Args:
            reach: how far their shares of zeros may be away.
            step: how far they are apart, where any share can be had.

        Returns:
            Those there are, the largest share last.
        """
        return [self]

    def mask(self, scores: Tensor, first: int = 0) -> Tensor:
        """Which entries are kept: those with the largest scores.

        Args:
            scores: [m n], not negative.
            first: where they begin, of a weight that is decided in blocks of columns; the blocks' counts add up to the
                exact count of the whole.

        Returns:
            [m n], True for what is kept.

        Raises:
            PatternError: it does not fit scores of this shape, or is no choice of entries.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no mask.")

    def threshold(self, scores: Tensor) -> Tensor:
        """What separates the sizes of kept scores from the others.

        It is for weighing scores, not for choosing: of a large matrix it is estimated from a part of the entries.

        Args:
            scores: [m n].

        Returns:
            A tensor that broadcasts to [m n].

        Raises:
            PatternError: see `mask`.
        """
        raise PatternError(f"Pattern {self} is no choice of entries: it has no threshold.")

    def masks(self, scores: Tensor) -> Tensor:
        """`mask` of several weights of one shape.

        Args:
            scores: [k m n].

        Returns:
            [k m n].
        """
        return torch.stack([self.mask(each) for each in scores])

    def thresholds(self, scores: Tensor) -> Tensor:
        """`threshold` of several weights of one shape.

        Args:
            scores: [k m n].

        Returns:
            A tensor with three axes that broadcasts to [k m n].
        """
        return torch.stack([self.threshold(each) for each in scores])

    def __str__(self) -> str:
        return self.describe()


class Mask(Constraint):
    """A rule for which entries of a weight may be non-zero: the projection keeps what is largest in the metric."""

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        return weight * self.mask(sizes(weight, metric))

    def violation(self, weight: Tensor) -> int:
        budget = self.budget(weight.shape)
        assert budget is not None, "a mask that has no lines counts for itself"
        counts = budget.sums(weight != 0).count_nonzero(1)
        return budget.block * int((counts - budget.kept).clamp_min(0).sum())


def sizes(weight: Tensor, metric: Tensor | None = None) -> Tensor:
    """The square root of what it costs in a metric to zero an entry.

    Args:
        weight: V [m n].
        metric: h [n]; None: ones.

    Returns:
        |V_ij| sqrt(h_j) [m n].
    """
    return weight.abs() if metric is None else weight.abs() * metric.sqrt()


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Which are the largest of every row; of equal scores the earlier.

    Args:
        scores: [m n].

    Returns:
        [m n], True for the largest.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = kth_smallest(scores, scores.shape[1] - count + 1)
    kept = scores >= least
    if is_host(scores.device) and int(kept.sum()) == count * len(scores):  # elsewhere the host would wait
        return kept
    above = scores > least
    missing = count - above.sum(1, keepdim=True)
    ties = kept ^ above
    return above | (ties & (ties.cumsum(1, dtype=torch.int32) <= missing))
