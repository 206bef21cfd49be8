"""What every grid promises: whole numbers, times scales that many of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from convexprune.constraints._grid import Grid


class OnSomeGrid(Protocol):
    """A weight on a grid."""

    @property
    def codes(self) -> Tensor:
        """Whole numbers [m n]."""
        ...

    @property
    def weight(self) -> Tensor:
        """What they stand for [m n]."""
        ...


Made = TypeVar("Made", bound=OnSomeGrid)


class AbstractGrid(ABC):
    """Weights that are whole numbers, their codes, times scales that many of them share."""

    lowest: int
    """The smallest code."""
    highest: int
    """The largest code."""

    @property
    def by_row(self) -> bool:
        """Whether each row is on it or not by itself, so that rows share nothing."""
        return True

    @property
    def share(self) -> float | None:
        """Of 16 bits a weight those that are saved, if any number of bits can be had."""
        return None

    def with_share(self, share: float) -> "AbstractGrid":
        """The grid of as many bits as a `share` of 16 leaves, where any number can be had."""
        return self

    def ladder(self) -> list["AbstractGrid"]:
        """Grids of its kind to choose from, the finest first."""
        return [self]

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """Refuse a weight that it does not fit."""

    @abstractmethod
    def search(
        self,
        weight: Tensor,
        shape: Callable[[], Tensor],
        fit: Callable[["Grid"], Tensor],
        attempt: Callable[[slice, Tensor], Made],
    ) -> Made:
        """Put a weight on the grid with the scales that it asks for: those that fit best, or the least that it allows.

        Args:
            weight: V [m n].
            shape: gives the scales of columns [n] relative to each other, where it is columns that have them.
            fit: gives the scales [m n/group], where groups have them.
        """

    @abstractmethod
    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """The nearest weight on the grid, as near as the kind can find it; zeros stay zero.

        Args:
            weight: V [m n].
            metric: h [n], not negative; None: ones. The distance is sum_ij h_j (P_ij - V_ij)^2.

        Returns:
            P [m n].
        """

    @abstractmethod
    def fit(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """The scales with which the nearest codes are nearest, as far as the grid has room.

        Args:
            weight: V [m n].

        Returns:
            [m n/group], or [1 n]; not zero, rounded to bfloat16.
        """

    @abstractmethod
    def violation(self, weight: Tensor) -> int:
        """How many entries of a `weight` [m n] are off the grid, or too many; 0: it is on it."""

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes.

        Args:
            weight: V [m n].
            scales: [m n/group], or [1 n].

        Returns:
            [m n], in the dtype of `weight`.
        """
        return (weight / spread(scales, weight.shape[1])).round_().clamp_(self.lowest, self.highest)

    def weight(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What codes stand for; no zero is negative.

        Args:
            codes: [m n].
            scales: [m n/group], or [1 n].

        Returns:
            V [m n].
        """
        return (codes * spread(scales, codes.shape[1])).masked_fill_(codes == 0, 0)


def spread(scales: Tensor, columns: int) -> Tensor:
    """The scale of each entry.

    Args:
        scales: [m n/group]; or [1 n], of columns.

    Returns:
        [m n], or [1 n].
    """
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)


def rounded_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored.

    Returns:
        The nearest bfloat16 numbers, and a tiny one in place of zero, in the dtype of `scale`.
    """
    rounded = scale.bfloat16().to(scale.dtype)
    tiny = torch.finfo(torch.bfloat16).tiny
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)
