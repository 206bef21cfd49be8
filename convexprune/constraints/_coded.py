"""Whole numbers times a scale for each column, of so few bits a weight by their entropy that a pack takes no more."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints._codebook import Codebook, OnGrid, WholeNumbers
from convexprune.constraints._grid import ROW, Grid
from convexprune.constraints._scales import Scales, rounded_scale
from convexprune.errors import PatternError

LEAST, MOST = 1.0, 6.0  # bits a weight
WHOLE = 16  # bits of a weight that is not quantized
SCALE = 16  # bits of a scale
REACH = 1.5  # bits by which an operator may differ
OCTAVE = 4  # scales of columns in an octave: few different ones, so that a pack stores them in few bits
HALVINGS = 24  # of the range of steps
RANGE = 2**10  # from the middle column's largest weight down to the smallest step
SAMPLE = 2**20  # entries that it is searched on
WIDEST = 4  # scales over that of the middle column: measured, see lab/tried.md
NEAR = 0.02  # bits a weight that may be left over
TRIES = 4  # of steps that leave more
ROWS = 64  # that the first step is tried on, at least
PRICE = 0.1  # of a bit, over the squared step: measured, see lab/tried.md
STORED = Grid(8, ROW)  # of the transposed weight: a row of it is a column


@dataclass(frozen=True)
class Coded(WholeNumbers):
    """Weights that are a scale, of a column, times a whole number from -127 to 127, of `bits` bits by their entropy.

    Of a weight [m n] whose codes take the value c with the frequency p_c, that is

        - sum_c p_c log2 p_c + 16 / m <= bits,

    the length of an ideal entropy code of the codes, and a bfloat16 scale for each column (Cover and Thomas, theorem
    5.4.1). The smaller the scales, the larger and the more diverse are the codes.
    """

    bits: float
    values = tuple(map(float, range(-127, 128)))
    by_row = False  # all rows share the scales of columns, and one entropy code

    def __post_init__(self) -> None:
        if not LEAST <= self.bits <= MOST:
            raise PatternError(f"{self.bits:g} bits a weight: {LEAST:g} to {MOST:g} can be had.")

    @property
    def share(self) -> float:
        return 1 - self.bits / WHOLE

    def with_share(self, share: float) -> "Coded":
        return Coded(round(WHOLE * (1 - share), 4))

    def ladder(self) -> list[Codebook]:
        around = {min(MOST, self.bits + REACH), self.bits, max(LEAST, self.bits - REACH)}
        return [Coded(bits) for bits in sorted(around, reverse=True)]

    def width(self, columns: int) -> int:
        return 1

    def check(self, rows: int, columns: int) -> None:
        """Refuse so few rows that the scales alone take half of the bits."""
        if SCALE / rows > self.bits / 2:
            raise PatternError(
                f"{self.bits:g} bits a weight of {rows} rows: the scales of the columns alone take {SCALE / rows:.2g}. "
                "Leave such operators out (ignore), or take quantize='int4'."
            )

    def rate(self, codes: Tensor) -> float:
        """Return the bits that a weight of these `codes` [m n] takes: the left side of the inequality above."""
        return entropy(codes) + SCALE / len(codes)

    def scales(self, step: float, shape: Tensor, weight: Tensor) -> Scales:
        """Return bfloat16 scales of columns [1 n]: `step` times the shape, or what the largest weight needs.

        A few inputs of a language model are a thousand times as large as others: their scales would be so small that no
        code reached their weights. Others hardly occur in the sample, and may in other texts: no scale is more than
        `WIDEST` times that of the middle column, but for what its largest weight needs. The shape [n] is rounded to
        quarters of an octave.
        """
        rounded = shape.clamp_max(WIDEST * shape.median()).log2().mul_(OCTAVE).round_().div_(OCTAVE).exp2_()
        return Scales(rounded_scale(torch.maximum(step * rounded, weight.abs().amax(0) / self.values[-1]))[None])

    def step(self, weight: Tensor, shape: Tensor) -> float:
        """Return the smallest step with which the nearest codes of a weight take no more than `bits`, by halving."""
        sizes, every = weight.abs().amax(0) / shape, -(-weight.numel() // SAMPLE)
        some, scales = weight[::every], SCALE / len(weight)
        high = 4 * float(sizes.max()) or 1.0  # all codes are zero
        low = (float(sizes.median()) or high) / RANGE
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            fits = entropy(self.codes(some, self.scales(middle, shape, weight))) + scales <= self.bits
            low, high = (low, middle) if fits else (middle, high)
        return high

    def search(
        self,
        weight: Tensor,
        shape: Callable[[], Tensor],
        fit: Callable[[Codebook], Scales],
        attempt: Callable[[slice, Scales], OnGrid],
    ) -> OnGrid:
        """Take the smallest step, or nearly, of which the codes take no more bits than there are.

        By a step that is twice as long codes take a bit less, as if weights had a density (Gish and Pierce, 1968). So
        each step follows from what the one before has come to, at first of a sample of rows.
        """
        sizes = shape()
        step, kept = self.step(weight, sizes), list[tuple[float, OnGrid]]()
        every = slice(None, None, max(1, min(8, len(weight) // ROWS)))
        sample = attempt(every, self.scales(step, sizes, weight))
        step *= 2 ** (entropy(sample.codes) + SCALE / len(weight) - self.bits + NEAR / 2)
        while True:
            made = attempt(slice(None), self.scales(step, sizes, weight))
            over = self.rate(made.codes) - self.bits
            if over <= 0:  # a stored weight is found to have the largest scales that fit, and other codes by them
                over = self.rate(self.found(made.weight)[0]) - self.bits
            if over <= 0:
                kept.append((over, made))
            if kept and (over > -NEAR or len(kept) == TRIES):
                return max(kept, key=lambda each: each[0])[1]
            step *= 2 ** (max(over, NEAR) * 1.5 if over > 0 else over + NEAR / 2)

    def price(self, scales: Scales, shape: Callable[[], Tensor]) -> float:
        """Return the price by the step of most columns, not of those whose largest weight needs a larger one."""
        return PRICE * float((scales.step / shape()).quantile(0.5)) ** 2

    def chooser(self, codes: Tensor, price: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Choose codes c that cost `price` times their length l_c besides.

        With the curvature h and the best multiple t that is h (c - t)^2 / 2 + price * l_c, so c is better than c - 1
        for |t| > c - 1/2 + price (l_c - l_{c-1}) / h.
        """
        if not price:
            return super().chooser(codes, price)
        extra = code_lengths(codes).diff() * price
        halves = torch.arange(self.values[-1], dtype=codes.dtype, device=codes.device) + 0.5

        def choose(best: Tensor, curvature: Tensor) -> Tensor:
            ends = (halves + extra / curvature).cummax(0).values
            return best.sign() * torch.bucketize(best.abs(), ends)

        return choose

    def found(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 codes [m n] of a stored `weight`, and the columns on the grid [n]; others mean nothing."""
        _, codes, on = STORED.find(weight.T.contiguous())
        return codes.T, on[:, 0]

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Take steps as 1 / sqrt(h) in a metric h, which spreads the error evenly."""
        if self.violation(weight) == 0:
            return weight
        shape = _shape(weight, metric)
        step = self.step(weight, shape)
        while True:  # a stored weight has the largest scales that fit: their codes may be more diverse
            scales = self.scales(step, shape, weight)
            near = self.weight(self.codes(weight, scales), scales)
            if self.violation(near) == 0:
                return near
            step *= 1.02

    def fit(self, weight: Tensor, metric: Tensor | None = None) -> Scales:
        shape = _shape(weight, metric)
        return self.scales(self.step(weight, shape), shape, weight)

    def violation(self, weight: Tensor) -> int:
        codes, on = self.found(weight)
        if not bool(on.all()):
            return len(weight) * int((~on).sum())
        over = self.rate(codes) - self.bits
        return 0 if over <= 1e-6 else max(1, round(over / self.bits * weight.numel()))

    def __str__(self) -> str:
        return f"{self.bits} bits a weight"


def _shape(weight: Tensor, metric: Tensor | None) -> Tensor:
    """Scales of columns that err at the same cost."""
    return torch.ones_like(weight[0]) if metric is None else metric.clamp_min(metric.mean() * 1e-6).rsqrt()


def entropy(codes: Tensor) -> float:
    """Return - sum_c p_c log2 p_c, the bits that a number takes, of whole numbers from -128 to 127."""
    share = frequencies(codes).double() / codes.numel()
    return -float(torch.special.xlogy(share, share).sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()


def frequencies(codes: Tensor) -> Tensor:
    """Return how often each whole number from -128 to 127 occurs [256]."""
    return torch.bincount(codes.flatten().int() + 128, minlength=256)


def code_lengths(codes: Tensor) -> Tensor:
    """Return the bits that codes 0 to 127 take [128]: -log2 of the frequencies of c and -c together, never falling.

    A code that never occurs counts as a sixteenth of an occurrence.
    """
    counts = frequencies(codes).to(codes)[1:]
    counts = (counts + counts.flip(0))[127:] / 2 + 1 / 16
    return -(counts / (2 * counts.sum() - counts[0])).cummin(0).values.log2_()
