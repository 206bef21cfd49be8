"""Scales of a weight on a grid: steps and offsets that groups of a row, or columns, share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of a weight V [m n] that is `codes * step - offset`."""

    step: Tensor  # [m n/group], or [1 n] where columns have scales
    offset: Tensor | None = None  # of the same shape; None: zero
    units: tuple[Tensor, ...] = ()  # numbers [m blocks] whose whole multiples the steps and offsets are in a file

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.step, *([] if self.offset is None else [self.offset]), *self.units]

    def _like(self, tensors: Iterable[Tensor]) -> "Scales":
        step, *rest = tensors
        return Scales(step, None if self.offset is None else rest.pop(0), tuple(rest))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Scales":
        """Return the scales with a function applied to each tensor."""
        return self._like(map(function, self._tensors))

    def where(self, rows: Tensor, other: "Scales") -> "Scales":
        """Return these scales in `rows` (a mask [m]), and those of `other` elsewhere."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        return self._like(torch.where(rows[:, None], own, its) for own, its in pairs)

    def put(self, rows: Tensor, part: "Scales") -> "Scales":
        """Return these scales with those of a `part` in place of the rows with these numbers."""
        pairs = zip(self._tensors, part._tensors, strict=True)
        return self._like(own.index_copy(0, rows, new) for own, new in pairs)

    @staticmethod
    def cat(parts: "Sequence[Scales]") -> "Scales":
        """Return the scales of rows one after another."""
        return parts[0]._like(map(torch.cat, zip(*(part._tensors for part in parts), strict=True)))

    @property
    def flat(self) -> Tensor:
        """The steps, and the offsets behind them [m k]."""
        return self.step if self.offset is None else torch.cat([self.step, self.offset], dim=1)

    def with_flat(self, flat: Tensor) -> "Scales":
        """Return scales that have these steps and offsets, and the same units."""
        step, *offset = flat.split(self.step.shape[1], dim=1)
        return Scales(step, *(offset or [None]), units=self.units)

    def spread(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """Return the step and the offset of each entry, [m n] or [1 n]."""
        return spread(self.step, columns), None if self.offset is None else spread(self.offset, columns)


def spread(scales: Tensor, columns: int) -> Tensor:
    """Return the scale of each entry, [m n] or [1 n], of scales [m n/group] or [1 n]."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)


def divisible(step: Tensor) -> Tensor:
    """Return steps with one in place of zero."""
    return torch.where(step == 0, 1.0, step)


def rounded_scale(scale: Tensor) -> Tensor:
    """Return the nearest bfloat16 numbers, and a tiny one in place of zero, in the dtype of `scale`."""
    rounded = scale.bfloat16().to(scale.dtype)
    tiny = torch.finfo(torch.bfloat16).tiny
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)
