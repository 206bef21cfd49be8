"""Block grids of ggml, as GGUF files have them: 32 weights with a scale, or 256 with scales of scales.

The bytes are those of ggml-common.h, and `weight` computes what `gguf.quants.dequantize` does, in float32, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.constraints._codebook import CLIPS, NARROWEST, WIDEST, Codebook, WholeNumbers, least_squares
from convexprune.constraints._scales import Scales, divisible, spread
from convexprune.errors import PatternError

REACH = 9  # values that may be clipped
SMALLEST = 2.0**-24  # of float16, in place of a scale of zero
SHRINK = 0.7, 1.1  # candidates of a range, over that of the weights


@dataclass(frozen=True)
class Block(Codebook):
    """Weights in blocks of 32 with a float16 scale."""

    name: ClassVar[str]
    group: ClassVar[int] = 32
    block: ClassVar[int] = 32
    bits: ClassVar[float]  # of a weight, scales included
    layouts = ("gguf",)

    def width(self, columns: int) -> int:
        return self.group

    def check(self, rows: int, columns: int) -> None:
        if columns % self.block:
            small = "iq4_nl, q4_0, q5_0 or q8_0, whose blocks have 32"
            other = "int8 to int3 with a group_size of -1 (one scale for a row)" if columns % 32 else small
            raise PatternError(
                f"{columns} columns are no whole number of blocks of {self.block}, which {self.name} needs. Take "
                f"{other}, or leave such matrices as they are."
            )

    def round_step(self, step: Tensor) -> Tensor:
        half = step.clamp(-65504, 65504).half().to(step.dtype)
        seen = self.has_zero | ((step * self.values[0]).abs() > 4 * SMALLEST)  # without a zero, a step of zero is one
        return torch.where((half == 0) & seen, SMALLEST, half)

    def fit(self, weight: Tensor, metric: Tensor | None = None) -> Scales:
        """Fit candidate ranges, with the step and the offset by least squares for their codes."""
        x = weight.unflatten(1, (-1, self.group))
        h = torch.ones_like(x) if metric is None else metric.view(1, -1, self.group).expand_as(x)
        best, least = (torch.zeros_like(x[..., :1]),) * 2, torch.full_like(x[..., :1], torch.inf)
        for found in self._ranges(x):
            for _ in range(2):
                codes = self.nearest((x + found[1]) / divisible(found[0]))
                found = least_squares(x, codes, h, self.has_offsets)
            off = self.nearest((x + found[1]) / divisible(found[0])).mul_(found[0]).sub_(found[1]).sub_(x)
            error = off.square_().mul_(h).sum(2, keepdim=True)
            better = error < least
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            least = torch.where(better, error, least)
        step, offset = (each.squeeze(2) for each in best)
        return self.rounded(Scales(step, offset if self.has_offsets else None))

    def _ranges(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return candidates of steps and offsets of groups [m groups group] -> [m groups 1]."""
        outermost = max(self.values, key=abs)
        largest = x.gather(2, x.abs().argmax(2, keepdim=True))
        narrowest = max(NARROWEST, 1 - REACH / len(self.values))
        for clip in torch.linspace(WIDEST, narrowest, CLIPS).tolist():
            yield largest * (clip / outermost), torch.zeros_like(largest)

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        """Return the bytes [m n/block * size] of a weight, row by row."""
        blocks = self._places(codes.cpu()).to(torch.uint8).reshape(-1, self.block)
        parts = self._fields(blocks, scales.map(Tensor.cpu))
        return torch.cat([part.contiguous() for part in parts], dim=1).reshape(len(codes), -1)

    def _places(self, codes: Tensor) -> Tensor:
        return torch.bucketize(codes, torch.tensor(self.values, dtype=codes.dtype))

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        """Return the bytes of each field of blocks, from the places of codes among the values [blocks block]."""
        return [halves(scales.step), fields(places, 2, 16)]

    def __str__(self) -> str:
        return self.name


class Q4_0(WholeNumbers, Block):
    name, bits = "q4_0", 4.5
    values = tuple(map(float, range(-8, 8)))


class Q8_0(Q4_0):
    name, bits = "q8_0", 8.5
    values = tuple(map(float, range(-127, 128)))

    def _places(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8).view(torch.uint8)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        return [halves(scales.step), places]


class Q5_0(Q4_0):
    name, bits = "q5_0", 5.5
    values = tuple(map(float, range(-16, 16)))

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        return [halves(scales.step), fields(places >> 4, 8, 1), fields(places & 15, 2, 16)]


class IQ4_NL(Block):
    """Sixteen numbers that are denser in the middle."""

    name, bits = "iq4_nl", 4.5
    values = (
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    )  # fmt: skip


class Super(Block):
    """Weights in blocks of 256: float16 numbers, of which the scales of groups are whole multiples of few bits."""

    block = 256
    multiples: ClassVar[tuple[int, int]]  # the smallest and the largest of these multiples
    sweeps: ClassVar[int] = 2  # over the scales of a row

    def round_step(self, step: Tensor) -> Tensor:
        """Leave a step as it is: rounding takes all scales of a block (`rounded`)."""
        return divisible(step)

    def rounded(self, scales: Scales) -> Scales:
        step, unit = self._in_units(scales.step)
        return Scales(step, units=(unit,))

    def settled(self, scales: Scales, square: Tensor, slope: Tensor) -> Scales:
        flat, slope = scales.flat.clone(), slope.clone()
        units = torch.cat([spread(unit, scales.step.shape[1]) for unit in scales.units], dim=1)
        for _ in range(self.sweeps):
            for k in range(flat.shape[1]):
                best = self.renewed(flat[:, k] + slope[:, k] / square[:, k, k], units[:, k])
                slope -= square[:, k] * (best - flat[:, k])[:, None]
                flat[:, k] = best
        return scales.with_flat(flat)

    def renewed(self, step: Tensor, unit: Tensor) -> Tensor:
        """Return the multiples of units that are nearest to steps."""
        return (step / divisible(unit)).round().clamp(*self.multiples) * unit

    def _in_units(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps [m groups] as multiples of units, and the units [m blocks]."""
        of_blocks = step.unflatten(1, (-1, self.block // self.group))
        largest = of_blocks.gather(2, of_blocks.abs().argmax(2, keepdim=True)).squeeze(2)
        outermost = max(self.multiples, key=abs)
        unit = (largest / outermost).clamp(-65504, 65504).half().to(step.dtype)
        return self.renewed(step, spread(unit, step.shape[1])), unit

    def _multiples(self, step: Tensor, unit: Tensor) -> Tensor:
        """Return the whole numbers [blocks groups] that steps are of their units, from 0."""
        whole = (step / divisible(spread(unit, step.shape[1]))).round()
        return (whole - self.multiples[0]).to(torch.uint8).reshape(-1, self.block // self.group)


class Q3_K(WholeNumbers, Super):
    name, bits, group = "q3_k", 3.4375, 16
    values = tuple(map(float, range(-4, 4)))
    multiples = (-32, 31)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        multiples = self._multiples(scales.step, scales.units[0])
        packed = torch.cat([fields(multiples & 15, 2, 8), fields(multiples >> 4, 4, 4)], dim=1)
        return [fields(places >> 2, 8, 32), fields(places & 3, 4, 32), packed, halves(scales.units[0])]


class Q6_K(WholeNumbers, Super):
    name, bits, group = "q6_k", 6.5625, 16
    values = tuple(map(float, range(-32, 32)))
    multiples = (-128, 127)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        multiples = self._multiples(scales.step, scales.units[0]) - 128  # wraps around as int8 does
        return [fields(places & 15, 2, 64), fields(places >> 4, 4, 32), multiples, halves(scales.units[0])]


class IQ4_XS(Super):
    name, bits = "iq4_xs", 4.25
    values = IQ4_NL.values
    multiples = (-32, 31)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        unit, multiples = scales.units[0], self._multiples(scales.step, scales.units[0])
        return [halves(unit), fields(multiples >> 4, 4, 1), fields(multiples & 15, 2, 1), fields(places, 2, 16)]


class WithMinima(WholeNumbers, Super):
    """Positive whole numbers times a step, less an offset; both are multiples of units."""

    has_offsets = True

    def _ranges(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        low, high = x.amin(2, keepdim=True).clamp_max(0), x.amax(2, keepdim=True).clamp_min(0)
        for shrink in torch.linspace(*SHRINK, CLIPS).tolist():
            yield (high - low) * (shrink / self.values[-1]), (-low * shrink).clamp_min(0)

    def rounded(self, scales: Scales) -> Scales:
        assert scales.offset is not None
        (step, unit), (offset, least) = self._in_units(scales.step), self._in_units(scales.offset)
        return Scales(step, offset, (unit, least))

    def _in_units(self, step: Tensor) -> tuple[Tensor, Tensor]:
        return super()._in_units(step.clamp_min(0))

    def violation(self, weight: Tensor) -> int:
        """Count the groups that have more values than there are codes."""
        ordered = weight.unflatten(1, (-1, self.group)).sort(2).values
        different = 1 + (ordered.diff(dim=2) != 0).sum(2)
        return self.group * int((different > len(self.values)).sum())

    def _pair(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the multiples of steps and of offsets [blocks groups]."""
        assert scales.offset is not None
        pairs = zip((scales.step, scales.offset), scales.units, strict=True)
        step, offset = (self._multiples(*pair) for pair in pairs)
        return step, offset


class Q2_K(WithMinima):
    name, bits, group = "q2_k", 2.625, 16
    values = tuple(map(float, range(4)))
    multiples = (0, 15)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        step, offset = self._pair(scales)
        return [step | offset << 4, fields(places, 4, 32), *map(halves, scales.units)]


class Q4_K(WithMinima):
    name, bits = "q4_k", 4.5
    values = tuple(map(float, range(16)))
    multiples = (0, 63)

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        return [*map(halves, scales.units), self._six_bits(scales), fields(places, 2, 32)]

    def _six_bits(self, scales: Scales) -> Tensor:
        """Return eight multiples of steps and eight of offsets, of six bits each [blocks 12]."""
        (first, last), (low, high) = (each.split(4, dim=1) for each in self._pair(scales))
        return torch.cat([first | last >> 4 << 6, low | high >> 4 << 6, last & 15 | (high & 15) << 4], dim=1)


class Q5_K(Q4_K):
    name, bits = "q5_k", 5.5
    values = tuple(map(float, range(32)))

    def _fields(self, places: Tensor, scales: Scales) -> list[Tensor]:
        low, high = fields(places & 15, 2, 32), fields(places >> 4, 8, 32)
        return [*map(halves, scales.units), self._six_bits(scales), high, low]


BLOCKS: tuple[type[Block], ...] = (Q8_0, Q6_K, Q5_K, Q5_0, Q4_K, Q4_0, IQ4_NL, IQ4_XS, Q3_K, Q2_K)


def halves(numbers: Tensor) -> Tensor:
    """Return the bytes [blocks 2] of float16 numbers [m blocks]."""
    return numbers.half().reshape(-1, 1).view(torch.uint8)


def fields(numbers: Tensor, count: int, length: int) -> Tensor:
    """Return bytes [blocks n/count] with `count` numbers of 8 / count bits: those of [blocks n] `length` apart."""
    parts = numbers.reshape(len(numbers), -1, count, length)
    shifts = torch.arange(count, dtype=torch.uint8)[:, None] * (8 // count)
    return (parts << shifts).sum(2, dtype=torch.uint8).flatten(1)
