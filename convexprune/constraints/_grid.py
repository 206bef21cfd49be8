"""Grids with a scale for each group of a row: whole numbers, and tables of floating-point numbers of four bits."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.constraints._codebook import Codebook, WholeNumbers
from convexprune.constraints._scales import Scales
from convexprune.errors import PatternError

GROUPS = (32, 64, 128)
ROW = -1  # in place of a group: one scale for each output channel
PARTS = [6, 12, 24, 48, 96, 192]  # of the candidates: groups of few codes are done with the first ones
AT_ONCE = 2**22  # products of a scale and a weight that are looked at together
PROBE = 8  # weights of a group that are looked at first: most scales do not fit them
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Grouped(Codebook):
    """A grid with a scale for `group` columns: 32, 64 or 128; -1 for all of a row, which is an output channel."""

    name: str
    group: int

    def __post_init__(self) -> None:
        if self.group not in (*GROUPS, ROW):
            sizes = ", ".join(map(str, GROUPS))
            raise PatternError(f"{self.name} in groups of {self.group}: groups are {sizes} columns, or -1 for a row.")

    def width(self, columns: int) -> int:
        return columns if self.group == ROW else self.group

    def check(self, rows: int, columns: int) -> None:
        if columns % self.width(columns):
            fits = [str(size) for size in GROUPS if columns % size == 0]
            ways = f"Take group_size {' or '.join([*fits, '-1'])} (-1: one scale for a row)"
            raise PatternError(f"{columns} columns are no whole number of groups of {self.group}. {ways}.")

    def __str__(self) -> str:
        return f"{self.name} per output channel" if self.group == ROW else f"{self.name} in groups of {self.group}"


@dataclass(frozen=True)
class Grid(WholeNumbers, Grouped):
    """Weights that are a scale times a whole number of `bits` bits, with one scale for `group` columns or for a row.

    The numbers, or codes, are those from -2^(bits - 1) to 2^(bits - 1) - 1, with 3 to 8 bits. A scale is a bfloat16
    number, negative where the largest weight of its group is positive and takes the code -2^(bits - 1), which has no
    opposite. That is what the layout `pack-quantized` of compressed-tensors can say with symmetric groups, of 32, 64 or
    128 columns; -1 is all of a row, which is an output channel.
    """

    bits: int
    group: int = 64
    layouts = ("compressed-tensors", "gguf")

    def __post_init__(self) -> None:
        if self.bits not in range(3, 9):
            raise PatternError(f"{self.name}: whole numbers have 3 to 8 bits.")
        super().__post_init__()

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"int{self.bits}"

    @cached_property
    def values(self) -> tuple[float, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(map(float, range(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1))))

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Leave groups that are on the grid as they are."""
        step, _, on = self.find(weight)
        scales = Scales(torch.where(on, step.to(weight), self.fit(weight, metric).step))
        return self.weight(self.codes(weight, scales), scales)

    def violation(self, weight: Tensor) -> int:
        on = self.find(weight)[2]
        return weight.numel() // on.numel() * int((~on).sum())

    def find(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find float32 scales and int8 codes of a stored `weight` [... n], and its groups [... n/group] on the grid."""
        groups = weight.reshape(-1, self.width(weight.shape[-1]))
        largest = groups.float().abs().amax(1)
        scales = self._largest(groups, largest, 1)
        tiny = (largest > 0) & (largest < torch.finfo(weight.dtype).smallest_normal)  # rounded to a fixed distance
        left = (tiny & (scales == 0)).nonzero().squeeze(1)
        scales[left] = self._largest(groups[left], largest[left], 1 + 2 ** (8 - self.bits))
        on = scales > 0
        scales = torch.where(on, scales, 1.0)
        codes = torch.where(on[:, None], (groups.float() / scales[:, None]).round_(), 0.0)
        flip = torch.where(codes.amax(1) > self.values[-1], -1.0, 1.0)
        codes = (codes * flip[:, None]).to(torch.int8)
        shape = *weight.shape[:-1], weight.shape[-1] // groups.shape[1]
        return (scales * flip).view(shape), codes.view_as(weight), (on | (largest == 0)).view(shape)

    def _largest(self, groups: Tensor, largest: Tensor, reach: int) -> Tensor:
        """Return the largest scale with which a group [groups n] is on the grid, or 0 [groups]."""
        scales, left = torch.zeros_like(largest), largest.nonzero().squeeze(1)
        for candidates in self._candidates(largest, reach).tensor_split(PARTS):
            scales[left] = self._first(groups[left], candidates[:, left])
            left = left[scales[left] == 0]
            if not len(left):
                break
        return scales

    def _first(self, groups: Tensor, candidates: Tensor) -> Tensor:
        """Return the first candidate [number groups] with which a group [groups n] is on the grid, or 0 [groups]."""
        may, scales = _probed(groups, candidates), candidates.new_zeros(len(groups))
        while len(left := may.any(0).nonzero().squeeze(1)):
            number = may[:, left].int().argmax(0)
            scale = candidates[number, left]
            may[number, left] = False
            fits = self._has((groups[left].float() / scale[:, None]).round_()) & _on_grid(groups[left], scale).all(1)
            left = left[fits]
            scales[left] = scale[fits]
            may[:, left] = False
        return scales

    def _candidates(self, largest: Tensor, reach: int) -> Tensor:
        """Return scales [number groups] with which the largest weight of a group has a code, smallest code first.

        A scale is within `reach` numbers of the quotient, as the largest weight was rounded.
        """
        codes = torch.arange(1, 1 + 2 ** (self.bits - 1), device=largest.device)[:, None]
        near = (largest / codes).bfloat16().view(torch.int16)
        ways = (0, *(sign * way for way in range(1, 1 + reach) for sign in (1, -1)))
        all_near = torch.stack([near + way for way in ways], dim=1).flatten(0, 1)
        return all_near.view(torch.bfloat16).float().clamp_min_(torch.finfo(torch.bfloat16).tiny)

    def _has(self, codes: Tensor) -> Tensor:
        """Return True where all codes of a group [groups group], or all of their opposites, have so many bits."""
        high, low, lowest, highest = codes.amax(1), codes.amin(1), self.values[0], self.values[-1]
        return (high <= -lowest) & (low >= lowest) & ((high <= highest) | (low > lowest))


def _on_grid(weights: Tensor, scales: Tensor) -> Tensor:
    """Return True where a stored weight [groups n] is a whole number times the scale of its group [... groups]."""
    scale = scales[..., None]
    return ((weights.float() / scale).round_().mul_(scale)).to(weights.dtype) == weights


def _probed(groups: Tensor, candidates: Tensor) -> Tensor:
    """Return True for candidates [number groups] with which the first few weights of a group, then more, are on it."""
    few = AT_ONCE // (PROBE * max(1, len(candidates)))
    parts = zip(groups[:, :PROBE].split(few), candidates.split(few, dim=1), strict=True)
    found = torch.cat([_on_grid(some, scales).all(2) for some, scales in parts], dim=1)
    more = groups[:, : PROBE**2]
    for number, group in zip(*(each.split(AT_ONCE // PROBE**2) for each in found.nonzero().T), strict=True):
        found[number, group] = _on_grid(more[group], candidates[number, group]).all(1)
    return found


@dataclass(frozen=True)
class NF4(Grouped):
    """Quantiles of a normal distribution, from -1 to 1 (QLoRA, arXiv 2305.14314, appendix E), times bfloat16 scales."""

    group: int = 64
    name = "nf4"
    values = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class FP4(Grouped):
    """Floats with two bits of exponent and one of mantissa, E2M1, times bfloat16 scales."""

    group: int = 64
    name = "fp4"
    values = (*(-x for x in reversed(E2M1)), 0.0, *E2M1)


@dataclass(frozen=True)
class MXFP4(FP4):
    """E2M1 in groups of 32 with a power of two as their scale (OCP Microscaling Formats 1.0, section 5)."""

    group: int = 32
    name = "mxfp4"

    def candidates(self, largest: Tensor) -> Iterable[Tensor]:
        """Return OCP's step, with which the largest weight is 4 to 8 times it, its double, and two smaller ones."""
        exponent = largest.frexp().exponent
        return ((exponent - down).to(largest).exp2() for down in range(2, 6))

    def round_step(self, step: Tensor) -> Tensor:
        return torch.where(step == 0, 1.0, step).abs().log2().round().clamp(-127, 127).exp2()

    def scale_of(self, quotient: Tensor) -> Tensor:
        return self.round_step(quotient)
