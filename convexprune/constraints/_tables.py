"""Floating-point numbers of four bits: tables of values that are no steps of one size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.constraints._grid import Grouped

E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


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

    def round_step(self, step: Tensor) -> Tensor:
        return torch.where(step == 0, 1.0, step).abs().log2().round().clamp(-127, 127).exp2()
