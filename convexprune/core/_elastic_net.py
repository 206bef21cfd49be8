"""The elastic net on a box: an L1 price and a parabola, with bounds; non-negativity is a bound of zero."""

from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import FINITE, Elementwise, checked_strength, like, require_step
from convexprune.core._arrays import as_floats

SLACK = 8  # rounding errors by which an entry may be beyond a bound: units change by them


@dataclass(frozen=True, eq=False)
class ElasticNet(Elementwise):
    """sum_ij strength_ij |V_ij| + ridge_ij V_ij^2 / 2, of weights with lower_ij <= V_ij <= upper_ij.

    `ElasticNet(0.1, lower=0)` is the non-negative LASSO, `ElasticNet(lower=-1, upper=1)` a box. All numbers may be
    tensors of a shape that broadcasts to [m n].

    Args:
        strength: not negative.
        ridge: not negative.
        lower: at most 0; may be -inf.
        upper: at least 0; may be inf.
    """

    priced = ("strength", "ridge")

    strength: float | Tensor = 0.0
    ridge: float | Tensor = 0.0
    lower: float | Tensor = -inf
    upper: float | Tensor = inf

    def __post_init__(self) -> None:
        for name in ("strength", "ridge"):
            wrong = f"`{name}` of an elastic net is negative or not finite."
            object.__setattr__(self, name, checked_strength(getattr(self, name), wrong, FINITE, name))
        wrong = "The bounds of an elastic net are lower <= 0 <= upper, so that a weight of zero is allowed."
        object.__setattr__(self, "upper", checked_strength(self.upper, wrong, name="upper"))
        least = float(self.lower) if isinstance(self.lower, Real) else as_floats("lower", self.lower)
        checked_strength(-least, wrong, name="lower")
        object.__setattr__(self, "lower", least)

    def values(self, weight: Tensor) -> Tensor:
        strength, ridge, lower, upper = self._like(weight)
        room = 1 + SLACK * torch.finfo(weight.dtype).eps
        outside = ((weight < room * lower) | (weight > room * upper)).any(1)
        price = ((strength + ridge / 2 * weight.abs()) * weight.abs()).sum(1)  # squares of float32 overflow
        return torch.where(outside, inf, price)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Soft thresholding, shrinkage by 1 + step ridge, and the nearest point of the box."""
        require_step(step)
        strength, ridge, lower, upper = self._like(weight)
        soft = weight - weight.clamp(-step * strength, step * strength)
        return (soft / (1 + step * ridge)).clamp(lower, upper)

    def inside(self, weight: Tensor) -> Tensor:
        return self.prox(weight, 0.0)

    def settled(self, weight: Tensor, eps: float) -> Tensor:
        for bound in self._like(weight)[2:]:
            near = (weight / bound - 1).abs() <= SLACK * eps  # false where a bound is zero, or infinite
            weight = torch.where(near, bound, weight)
        return weight

    def conjugate(self, dual: Tensor) -> Tensor:
        """<S, V> - p(V) at the best weight, soft(S) / ridge in the box."""
        strength, ridge, lower, upper = self._like(dual)
        dual = self.project(dual)  # rounding may leave the domain
        soft = dual - dual.clamp(-strength, strength)
        best = torch.where(soft == 0, 0.0, (soft / ridge).clamp(lower, upper))
        return torch.where(soft == 0, 0.0, best.abs() * (soft.abs() - ridge / 2 * best.abs())).sum(1)

    def project(self, dual: Tensor) -> Tensor:
        return dual.clamp(*self._domain(dual))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """The nearest point to S of the slopes at V, which have no end on a bound."""
        strength, ridge, lower, upper = self._like(weight)
        slope = ridge * weight
        least = torch.where(weight > 0, strength, -strength) + slope
        most = torch.where(weight < 0, -strength, strength) + slope
        return dual.clamp(torch.where(weight <= lower, -inf, least), torch.where(weight >= upper, inf, most))

    def dual_scale(self, dual: Tensor) -> Tensor:
        low, high = self._domain(dual)
        ratio = torch.where(dual > 0, high, low) / dual
        return torch.where(dual == 0, inf, ratio).amin(1)

    def scaled(self, scale: Tensor) -> "ElasticNet":
        ridge = self.ridge / scale.square()
        return ElasticNet(self.strength / scale, ridge, self.lower * scale, self.upper * scale)

    def _domain(self, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest S_ij of which the conjugate is finite."""
        strength, ridge, lower, upper = self._like(dual)
        low = torch.where((ridge > 0) | (lower > -inf), -inf, -strength)
        return low, torch.where((ridge > 0) | (upper < inf), inf, strength)

    def _like(self, tensor: Tensor) -> list[Tensor]:
        prices = like(self.strength, tensor), like(self.ridge, tensor)
        return [*prices, _inside(self.lower, tensor), _inside(self.upper, tensor)]


def _inside(bound: float | Tensor, tensor: Tensor) -> Tensor:
    """Return the bound in the dtype of the tensor, rounded towards zero."""
    exact = torch.as_tensor(
        bound, dtype=torch.float64 if isinstance(bound, float | int) else None, device=tensor.device
    )
    near = exact.to(tensor.dtype)
    return near if near.dtype == exact.dtype else torch.where(near.abs() > exact.abs(), near.nextafter(0 * near), near)
