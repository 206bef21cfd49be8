"""Values that weights may take: a table of multiples, times scales that groups of a row share, less offsets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.constraints._scales import Scales, divisible, rounded_scale

CLIPS = 16  # candidates for each scale
NARROWEST, WIDEST = 0.45, 1.05  # of them: what the outermost value stands for, over the group's largest weight
ROUNDING = 3  # roundings between a value times its scale, and the same as it is stored


class Codebook(ABC):
    """A kind of grid: the table of `values`, and how scales are shared, fitted and rounded.

    A weight is `code * step - offset`, with codes out of `values`. Quantizers, files and allocations know no grid by
    name. A new one is a subclass, and a line in `convexprune.constraints.GRIDS`.
    """

    values: tuple[float, ...]  # the codes, in rising order
    layouts: ClassVar[tuple[str, ...]] = ()  # layouts of `convexprune export` that can say it
    has_offsets: ClassVar[bool] = False
    by_row: ClassVar[bool] = True  # whether rows share nothing, so that each is on the grid or not by itself

    @property
    def has_zero(self) -> bool:
        """True if zero is a value for any scale, so that zeros stay zero."""
        return 0 in self.values and not self.has_offsets

    @property
    def share(self) -> float | None:
        """Share of 16 bits that is saved, of a grid that is made for any number of bits."""
        return None

    def with_share(self, share: float) -> "Codebook":
        """Return the grid of as many bits as a `share` of 16 leaves."""
        return self

    def ladder(self) -> "list[Codebook]":
        """Return grids to choose from, the finest first."""
        return [self]

    @abstractmethod
    def width(self, columns: int) -> int:
        """Return how many of the `columns` of a row share a scale."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """Refuse a shape that the grid does not fit."""

    def nearest(self, multiples: Tensor) -> Tensor:
        """Return the nearest values; `multiples` may be overwritten."""
        values, middles = _table(self.values, multiples.dtype, multiples.device)
        return values[torch.bucketize(multiples, middles)]

    def around(self, multiples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest values, and those on the other side of the multiples, or the same again at an end."""
        near = self.nearest(multiples.clone())
        values, middles = _table(self.values, multiples.dtype, multiples.device)
        place = torch.bucketize(near, middles) + torch.where(multiples < near, -1, 1)
        return near, values[place.clamp_(0, len(values) - 1)]

    def chooser(self, codes: Tensor, price: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that chooses a column's codes [m] by the best multiples and the curvature of the error.

        A bit has a price; the cost of codes in bits follows from `codes` [m n], where codes have any.
        """
        return lambda best, curvature: self.nearest(best)

    def price(self, scales: Scales, shape: Callable[[], Tensor]) -> float:
        """Return the price of a bit, in units of the error; 0 where all codes take the same bits.

        `shape` gives the errors of columns [n] that cost the same.
        """
        return 0.0

    def codes(self, weight: Tensor, scales: Scales) -> Tensor:
        """Return the nearest codes [m n] of a `weight` [m n]."""
        step, offset = scales.spread(weight.shape[1])
        return self.nearest((weight if offset is None else weight + offset) / divisible(step))

    def weight(self, codes: Tensor, scales: Scales) -> Tensor:
        """Return the weight [m n] of `codes` [m n]; no zero is negative."""
        step, offset = scales.spread(codes.shape[1])
        if offset is not None:
            return codes * step - offset
        return (codes * step).masked_fill_(codes == 0, 0)

    def round_step(self, step: Tensor) -> Tensor:
        """Return the nearest steps that a file can have; none is zero."""
        return rounded_scale(step)

    def scale_of(self, quotient: Tensor) -> Tensor:
        """Return the scale of a file for a stored weight over its code."""
        return divisible(quotient)

    def pack(self, codes: Tensor, scales: Scales) -> Tensor | None:
        """Return the bytes [m ...] of a weight in a file of block grids; None where other files tell the codes."""
        return None

    def rounded(self, scales: Scales) -> Scales:
        """Return the nearest scales that a file can have."""
        return Scales(self.round_step(scales.step))

    def settled(self, scales: Scales, square: Tensor, slope: Tensor) -> Scales:
        """Return rounded scales after a descent on their error, where scales are multiples of units.

        The error is a quadratic of `Scales.flat`, with Q [m k k] and the residual `slope` [m k] there.
        """
        return scales

    def search(
        self,
        weight: Tensor,
        shape: Callable[[], Tensor],
        fit: "Callable[[Codebook], Scales]",
        attempt: "Callable[[slice, Scales], OnGrid]",
    ) -> "OnGrid":
        """Put a weight [m n] on the grid with the scales that fit best, or the least that a number of bits allows.

        Columns have scales relative to each other by `shape` [n], groups those of `fit`. An `attempt` makes of some
        rows, and scales, a weight with these scales; that of all rows is returned.
        """
        return attempt(slice(None), fit(self))

    def fit(self, weight: Tensor, metric: Tensor | None = None) -> Scales:
        """Return scales of least squared error, of some candidates, when each entry is rounded to its nearest code.

        The error is sum_j h_j (V_j' - V_j)^2 in a metric h [n]. Zeros do not count where the grid has a zero. A file
        can have these scales.
        """
        width = self.width(weight.shape[1])
        groups = weight.unflatten(1, (-1, width))
        counts = (groups != 0).to(weight) if self.has_zero else torch.ones_like(groups)
        if metric is not None:
            counts *= metric.view(1, -1, width)
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        return self.best(groups, self.candidates(largest), lambda off: off.square_().mul_(counts))

    def candidates(self, largest: Tensor) -> Iterable[Tensor]:
        """Return steps to choose from for groups with these `largest` weights."""
        outermost = max(self.values, key=abs)
        return (largest * (clip / outermost) for clip in torch.linspace(WIDEST, NARROWEST, CLIPS).tolist())

    def best(self, groups: Tensor, candidates: Iterable[Tensor], cost: Callable[[Tensor], Tensor]) -> Scales:
        """Return the candidate steps [m n/group] of least cost for each group [m n/group group].

        The cost is of deviations, which may be overwritten.
        """
        best = torch.ones_like(groups[..., 0])
        least = torch.full_like(best, torch.inf)
        for candidate in candidates:
            step = self.round_step(candidate)
            scale = step[..., None]
            error = cost(self.nearest(groups / scale).mul_(scale).sub_(groups)).sum(2)
            better = error < least
            best, least = torch.where(better, step, best), torch.where(better, error, least)
        return Scales(best)

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest weight [m n] on the grid, as near as `fit` finds it."""
        scales = self.fit(weight, metric)
        return self.weight(self.codes(weight, scales), scales)

    def violation(self, weight: Tensor) -> int:
        """Return how many entries of a stored `weight` [m n] are in groups that are on the grid with no scale."""
        groups = weight.float().unflatten(1, (-1, self.width(weight.shape[1])))
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        dtype = torch.finfo(weight.dtype)
        sizes = groups.abs().clamp_min(dtype.smallest_normal)  # below it, rounding is absolute
        slack = ROUNDING * max(dtype.eps, torch.finfo(torch.float32).eps) * sizes
        on = largest == 0
        for value in filter(None, self.values):
            scale = self.scale_of(largest / value)
            on |= ((self.nearest(groups / scale) * scale - groups).abs() <= slack).all(2, keepdim=True)
        return groups.shape[2] * int((~on).sum())


class WholeNumbers(Codebook):
    """A grid whose codes are all whole numbers of a range."""

    def nearest(self, multiples: Tensor) -> Tensor:
        return multiples.round_().clamp_(self.values[0], self.values[-1])

    def around(self, multiples: Tensor) -> tuple[Tensor, Tensor]:
        near = self.nearest(multiples.clone())
        beyond = (multiples >= near).to(near).mul_(2).sub_(1)  # to the next number, or the one before
        return near, beyond.add_(near).clamp_(self.values[0], self.values[-1])


@dataclass(frozen=True)
class AnyOf(Codebook):
    """A grid that is still to be chosen, by the bytes of a whole file. The first grid fits wherever another does."""

    name: str
    grids: tuple[Codebook, ...]
    values = ()

    def ladder(self) -> list[Codebook]:
        return list(self.grids)

    def width(self, columns: int) -> int:
        return self.grids[0].width(columns)

    def check(self, rows: int, columns: int) -> None:
        self.grids[0].check(rows, columns)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class OnGrid:
    """A weight [m n] on a grid: codes [m n], multiples of scales."""

    grid: Codebook
    scales: Scales
    codes: Tensor
    facts: Mapping[str, float] = field(default_factory=dict)  # for the report

    @classmethod
    def nearest(cls, grid: Codebook, weight: Tensor, scales: Scales) -> "OnGrid":
        return cls(grid, scales, grid.codes(weight, scales))

    @property
    def weight(self) -> Tensor:
        return self.grid.weight(self.codes, self.scales)

    def rows(self, chosen: Tensor) -> "OnGrid":
        """Return the rows with the numbers `chosen`; scales that rows share stay as they are."""
        scales = self.scales.map(lambda each: each[chosen]) if self.grid.by_row else self.scales
        return OnGrid(self.grid, scales, self.codes[chosen])

    def put(self, rows: Tensor, part: "OnGrid") -> "OnGrid":
        """Return the weight with a `part` in place of these rows; scales that rows share are those of the part."""
        codes = self.codes.index_copy(0, rows, part.codes)
        return OnGrid(self.grid, self.scales.put(rows, part.scales) if self.grid.by_row else part.scales, codes)

    def where(self, rows: Tensor, other: "OnGrid") -> "OnGrid":
        """Return these `rows` (a mask [m]), and those of `other` elsewhere."""
        return OnGrid(
            self.grid, self.scales.where(rows, other.scales), torch.where(rows[:, None], self.codes, other.codes)
        )


@cache
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values, and the middles between them."""
    table = torch.tensor(values, dtype=dtype, device=device)
    return table, (table[1:] + table[:-1]) / 2


def least_squares(x: Tensor, q: Tensor, h: Tensor, has_offset: bool) -> tuple[Tensor, Tensor]:
    """Return step s and offset o >= 0 of least sum_j h_j (s q_j - o - x_j)^2, of each group [... group] -> [... 1]."""
    count, q1, q2, x1, qx = ((h * each).sum(-1, keepdim=True) for each in (torch.ones_like(x), q, q * q, x, q * x))
    scale = count * q2 - q1 * q1
    free = scale > 1e-6 * count * q2
    step, offset = (count * qx - q1 * x1) / divisible(scale), (q1 * qx - q2 * x1) / divisible(scale)
    alone = ~free | (offset < 0) if has_offset else torch.ones_like(free)
    return torch.where(alone, qx / divisible(q2), step), torch.where(alone, 0.0, offset)
