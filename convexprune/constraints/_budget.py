"""The number of units of a weight that may be kept. A unit is an entry, or columns that are chosen together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Up to `kept` non-zero units in every line of `width` units of a weight, read row by row.

    Args:
        width: units of a line.
        kept: kept units of a line.
        block: columns of a unit; 1, with a single row: a unit is an entry.
        rows: rows of a unit.
    """

    width: int
    kept: int
    block: int = 1
    rows: int = 1

    @property
    def by_entry(self) -> bool:
        """True if a unit is an entry."""
        return self.block == self.rows == 1

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the sum over every unit [lines width] of a `tensor` [m n]."""
        if self.by_entry:
            return tensor.reshape(-1, self.width)
        return tensor.reshape(-1, self.rows, self.width, self.block).sum((1, 3))

    def norms(self, tensor: Tensor) -> Tensor:
        """Return the norm of every unit [lines width] of a `tensor` [m n] without negative entries."""
        return self.sums(tensor) if self.by_entry else self.sums(tensor.square()).sqrt()

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Copy the value of a unit to all of its entries.

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
