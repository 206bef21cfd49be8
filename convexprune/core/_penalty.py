"""The penalties of every problem: L1, and a support."""

from dataclasses import InitVar, dataclass
from math import inf

import torch
from torch import Tensor

from convexprune._device.kernels import fused, number_like
from convexprune.core._abstract_penalty import AbstractPenalty, Elementwise, checked_strength, like, require_step
from convexprune.core._arrays import as_tensor
from convexprune.errors import ProblemError

__all__ = ["L1", "AbstractPenalty", "Support"]


@dataclass(frozen=True, eq=False)
class L1(Elementwise):
    """sum_ij strength_ij |V_ij|.

    `strength * sqrt(H_jj)` makes a penalty that does not depend on the scale of the inputs.

    Args:
        strength: not negative, of a shape that broadcasts to [m n]. Zero leaves an entry free, inf makes it zero.
        checked: check the strengths. False is for strengths made in a loop, where the check stops a GPU.
    """

    priced = ("strength",)

    strength: float | Tensor
    checked: InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if checked:
            wrong = "A strength of the L1 penalty is negative or NaN; strengths lie in [0, inf]."
            object.__setattr__(self, "strength", checked_strength(self.strength, wrong))

    def values(self, weight: Tensor) -> Tensor:
        price = weight.abs() * self.strength
        return price.masked_fill_(weight == 0, 0).sum(1)  # also at an infinite strength

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Soft thresholding, sign(V) (|V| - step strength)_+."""
        return self._shrunk(weight, step)

    def prox_(self, weight: Tensor, step: float) -> Tensor:
        return self._shrunk(weight, step, out=weight)

    def _shrunk(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        require_step(step)
        step = step or torch.finfo(weight.dtype).tiny  # an infinite strength makes zeros at any step
        return _shrink(weight, like(self.strength, weight), number_like(step, weight), out)

    def inside(self, weight: Tensor) -> Tensor:
        return self.prox(weight, 0.0)

    def forward_backward(self, weight: Tensor, residual: Tensor, step: float) -> Tensor:
        require_step(step)
        return _shrink_ahead(weight, residual, like(self.strength, weight), number_like(step, weight))

    def project(self, dual: Tensor) -> Tensor:
        """The nearest point of the box |S_ij| <= strength_ij."""
        strength = like(self.strength, dual)
        return torch.clamp(dual, -strength, strength)

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """strength sign(V) where V is not zero, else the dual point clipped to the box."""
        return torch.where(weight != 0, like(self.strength, dual) * weight.sign(), self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        ratio = like(self.strength, dual) / dual.abs()
        return ratio.nan_to_num_(nan=inf, posinf=inf).amin(1)  # 0 / 0: no factor is too large

    def scaled(self, scale: Tensor) -> "L1":
        return L1(self.strength / scale, checked=False)


def _soft(weight: Tensor, strength: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    """sign(V) (|V| - step strength)_+."""
    return torch.copysign(weight.abs().addcmul_(strength, step, value=-1).clamp_min_(0), weight, out=out)


_shrink = fused(_soft)


@fused
def _shrink_ahead(weight: Tensor, residual: Tensor, strength: Tensor, step: Tensor) -> Tensor:
    point = torch.addcmul(weight, residual, step)
    return _soft(point, strength, step, point)


@dataclass(frozen=True, eq=False)
class Support(Elementwise):
    """Infinite for a non-zero outside the boolean `mask` [m n], else zero: values are free, places are fixed."""

    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            object.__setattr__(self, "mask", as_tensor("mask", self.mask))
        if self.mask.dtype != torch.bool:
            raise ProblemError(f"The mask of a support is {self.mask.dtype}; it must be boolean, true where V is free.")

    def values(self, weight: Tensor) -> Tensor:
        outside = ((weight != 0) & ~self.mask).any(1)
        return torch.where(outside, inf, 0.0).to(weight.dtype)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """V on the support, zero elsewhere."""
        return weight * self.mask

    def prox_(self, weight: Tensor, step: float) -> Tensor:
        return weight.mul_(self.mask)

    def inside(self, weight: Tensor) -> Tensor:
        return self.prox(weight, 0.0)

    def project(self, dual: Tensor) -> Tensor:
        return dual * ~self.mask

    def dual_scale(self, dual: Tensor) -> Tensor:
        inside = ((dual != 0) & self.mask).any(1)
        return torch.where(inside, 0.0, inf).to(dual.dtype)

    def scaled(self, scale: Tensor) -> "Support":
        return self

    def times(self, factor: float) -> "Support":
        return self
