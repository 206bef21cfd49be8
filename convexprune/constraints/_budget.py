"""How many units of a weight may be kept, where a unit is an entry, or columns that are chosen together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """There may be `kept` units that are not zero in each line of `width` units of a weight, read row by row.

    Args:
        width: the units of a line.
        kept: how many of them.
        block: the columns of a unit; 1, with one row: a unit is an entry.
        rows: the rows of a unit.
    """

    width: int
    kept: int
    block: int = 1
    rows: int = 1

    @property
    def by_entry(self) -> bool:
        """Whether each entry is a unit."""
        return self.block == self.rows == 1

    def sums(self, tensor: Tensor) -> Tensor:
        """The sum over each unit [lines width] of a `tensor` [m n]."""
        if self.by_entry:
            return tensor.reshape(-1, self.width)
        return tensor.reshape(-1, self.rows, self.width, self.block).sum((1, 3))

    def norms(self, tensor: Tensor) -> Tensor:
        """The norm of each unit [lines width] of a `tensor` [m n], whose entries are not negative."""
        return self.sums(tensor) if self.by_entry else self.sums(tensor.square()).sqrt()

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """A value for each unit, in all of its entries.

        Args:
            units: [lines width].
            shape: m and n.

        Returns:
            [m n].
        """
        if self.by_entry:
            return units.reshape(*shape)
        parts = units.unflatten(1, (1, -1))[..., None].expand(-1, self.rows, -1, self.block)
        return parts.reshape(*shape)
