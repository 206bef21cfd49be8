"""Whole numbers of 8 bits times a scale for each row: round to nearest, symmetric, per output channel."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.constraints._base import Constraint, Quota
from convexprune.errors import PatternError

LARGEST = 127
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a row's largest weight: what the largest number may stand for


@dataclass(frozen=True)
class Int8(Constraint):
    """Rows that are a scale of their own times whole numbers from -127 to 127, one of which is 127 or -127.

    So the scale of a row is its largest size over 127. The weight is stored in the model's dtype, and `violation`
    allows what that rounds: an eighth of a step at most in float16, a whole one in bfloat16, which has 8 bits itself.
    """

    sparsity = 0.0

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """See `Constraint.project`: rounds to nearest, with that scale of `CLIPS` for each row that is best."""
        found = rounded(weight, CLIPS[0])
        least = _distance(found, weight, metric)
        for clip in CLIPS[1:]:
            other = rounded(weight, clip)
            distance = _distance(other, weight, metric)
            better = distance < least
            found, least = torch.where(better, other, found), torch.where(better, distance, least)
        return found

    def violation(self, weight: Tensor) -> int:
        exact = weight.double()
        off = (rounded(exact, 1.0) - exact).abs() > torch.finfo(weight.dtype).eps * exact.abs()
        return int(off.sum())

    def describe(self) -> str:
        return "int8"

    @classmethod
    def parse(cls, text: str, sparsity: float | None, quota: Quota) -> Self | None:
        if text != "int8":
            return None
        if sparsity or quota != "matrix":
            raise PatternError("Pattern 'int8' rounds and asks for no zeros. Leave sparsity and quota out.")
        return cls()


def rounded(weight: Tensor, clip: float) -> Tensor:
    """Each row rounded to the nearest point of its grid.

    Args:
        weight: [m n].
        clip: the share of a row's largest size at which its grid ends.

    Returns:
        [m n], on the grid.
    """
    largest = weight.abs().amax(1, keepdim=True) * clip
    step = (largest / LARGEST).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / step).round().clamp(-LARGEST, LARGEST) * step


def _distance(one: Tensor, other: Tensor, metric: Tensor | None) -> Tensor:
    squares = (one - other).square()
    return (squares if metric is None else squares * metric).sum(1, keepdim=True)
