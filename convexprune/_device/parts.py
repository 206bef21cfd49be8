"""Products of float64 from exact products of small integers, for GPUs whose float64 has 1/32 or 1/64 of the speed.

A number is cut into parts of six bits (Ozaki et al. 2012). Products of two parts, summed over `LINES` terms, are
integers of at most 2^24. Float32 holds such integers in any order of summation: the sums are exact where bfloat16 is
multiplied and float32 summed. The remainder has a bound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.precision import wide_product

BITS = 6
LINES = 2**12


@dataclass(frozen=True, eq=False)
class Parts:
    """A matrix, scale * (sum of parts_p 2^(-6 p) + rest), with every rest at most 2^(-6 count) / 2."""

    parts: tuple[Tensor, ...]  # integers of at most 64 in bfloat16 [m n], the largest first
    scale: Tensor  # powers of two, [m 1] or [1 n]

    @classmethod
    def of(cls, matrix: Tensor, count: int, dim: int) -> "Parts":
        """Cut a float64 matrix [m n] into parts; `dim` is the axis of the sum in a product: 1 left, 0 right."""
        largest = matrix.abs().amax(dim, keepdim=True)
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)  # above the largest entry
        rest, parts = matrix / scale, list[Tensor]()
        for _ in range(count):
            rest = rest * 2**BITS
            parts.append(rest.round())
            rest = rest - parts[-1]  # nothing is rounded here
        return cls(tuple(part.bfloat16() for part in parts), scale)


def product_of_parts(a: Parts, b: Parts, count: int) -> Tensor:
    """Return a product a b [m k] in float64, without products of parts below the last of `count`."""
    n = a.parts[0].shape[1]
    total = torch.zeros(len(a.parts[0]), b.parts[0].shape[1], dtype=torch.float64, device=a.scale.device)
    for order in range(count - 1, -1, -1):  # the small ones first
        for i in range(order + 1):
            for lines in (slice(first, first + LINES) for first in range(0, n, LINES)):
                exact = wide_product(a.parts[i][:, lines], b.parts[order - i][lines])
                total.add_(exact.double(), alpha=2.0 ** (-BITS * (order + 2)))
    return total.mul_(a.scale).mul_(b.scale)


def error_of_parts(a: Parts, b: Parts, count: int) -> Tensor:
    """Bound the error of every entry in a row of `product_of_parts`.

    A term of the sum over n loses at most 2^(-6 count) (3 + count) / 4, in units of both scales. Sums of float64 have a
    rounding error per term. The bound is [m 1].
    """
    n = a.parts[0].shape[1]
    sums = count * (count + 1) // 2 * -(-n // LINES)
    relative = 2.0 ** (-BITS * count) * (3 + count) / 4 + sums * torch.finfo(torch.float64).eps
    return n * relative * a.scale * b.scale.amax()
