"""Shares of zeros as text and as budgets: how many units of a weight may be kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.select import kth_smallest
from convexprune.errors import PatternError

PERCENT = r"(\d+(?:\.\d+)?)%"


def check_share(share: object) -> None:
    """Refuse numbers that are no share of zeros."""
    if not isinstance(share, Real):
        raise PatternError(f"Sparsity {share!r} is no number: it is the share of zeros, 0.5 for half.")
    if not 0 <= float(share) < 1:
        raise PatternError(f"Sparsity {share} is outside [0, 1): it is the share of zeros, 0.5 for half.")


def check_some(share: float, count: int, parts: str) -> None:
    """Refuse a share that rounds to none of the parts that can be removed, or to all."""
    if not 0 < (gone := round(share * count)) < count:
        one = float(f"{1 / count:.3g}")
        accepted = f"{one:g} for one of them, to {1 - one:.10g} for all but one" if count > 1 else "none"
        raise PatternError(f"Sparsity {share} of {count} {parts} rounds to {gone}. Accepted: {accepted}.")


def percent(share: float) -> str:
    """A `share` as a percentage that reads back: 0.5 as "50%"."""
    return f"{(Decimal(repr(float(share))) * 100).normalize():f}%"


def from_percent(text: str) -> float:
    """The share of a `text` of percent: "50" as 0.5."""
    return float(Decimal(text) / 100)


def shares_around(share: float, reach: float, step: float) -> list[float]:
    """Return shares of zeros around a share, inside [0, 1)."""
    steps = round(reach / step)
    every = (round(share + each * step, 6) for each in range(-steps, steps + 1))
    return [each for each in every if 0 <= each < 1]


@dataclass(frozen=True)
class Budget:
    """Up to `kept` non-zero units in every line of `width` units of a weight, read row by row."""

    width: int
    kept: int
    block: int = 1  # columns of a unit
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
        """Copy the value of a unit [lines width] to all of its entries [m n]."""
        if self.by_entry:
            return units.reshape(*shape)
        parts = units.unflatten(1, (1, -1))[..., None].expand(-1, self.rows, -1, self.block)
        return parts.reshape(*shape)


def sizes(weight: Tensor, metric: Tensor | None = None) -> Tensor:
    """Return |V_ij| sqrt(h_j) [m n], the square root of the cost of zeroing an entry in a metric h [n]; None: ones."""
    return weight.abs() if metric is None else weight.abs() * metric.sqrt()


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mark the largest entries of every row; of equal scores the earlier."""
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


def column_norms(weight: Tensor, block: int = 1) -> Tensor:
    """Return the norm of a column, or of its block [n]."""
    norms = torch.linalg.vector_norm(weight, dim=0)
    if block == 1:
        return norms
    return torch.linalg.vector_norm(norms.view(-1, block), dim=1).repeat_interleave(block)
