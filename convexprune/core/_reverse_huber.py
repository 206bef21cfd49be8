"""The reverse Huber penalty: the convex relaxation of a price per non-zero."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import Elementwise, like, require_step
from convexprune.core._arrays import as_floats
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class ReverseHuber(Elementwise):
    """The cost of fractional non-zeros: linear near zero, a parabola beyond (the perspective penalty).

        p(V) = sum_ij min_{0 <= z <= 1} B_ij V_ij^2 / 2 z + mu_ij z
             = sum_ij  sqrt(2 mu B) |V|     if |V| <= sqrt(2 mu / B),     else  B V^2 / 2 + mu

    the largest convex function below B V^2 / 2 + mu [V != 0], with `curvature` B positive and `price` mu non-negative,
    both of a shape that broadcasts to [m n] (Dong, Chen and Linderoth 2015, arXiv 1510.06083).
    """

    priced = ("curvature", "price")

    curvature: Tensor
    price: Tensor

    def __post_init__(self) -> None:
        for name in self.priced:
            object.__setattr__(self, name, as_floats(name, getattr(self, name)))
        if not bool(((self.curvature > 0) & (self.curvature < inf)).all()):
            raise ProblemError("A curvature of the reverse Huber penalty is not in (0, inf).")
        if not bool(((self.price >= 0) & (self.price < inf)).all()):
            raise ProblemError("A price of the reverse Huber penalty is not in [0, inf).")

    @property
    def slope(self) -> Tensor:
        """sqrt(2 mu B): the price of a small weight, per unit."""
        dtype = torch.promote_types(self.price.dtype, self.curvature.dtype)
        return (2 * self.price.to(dtype)).sqrt() * self.curvature.to(dtype).sqrt()  # their product leaves float32

    def values(self, weight: Tensor) -> Tensor:
        size, slope, curvature = weight.abs(), like(self.slope, weight), like(self.curvature, weight)
        beyond = (size - slope / curvature).clamp_min(0)
        return (slope * size + curvature / 2 * beyond * beyond).sum(1)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """sign(V) times the lesser of (|V| - step slope)_+ and |V| / (1 + step B)."""
        require_step(step)
        size, slope, curvature = weight.abs(), like(self.slope, weight), like(self.curvature, weight)
        soft = (size - step * slope).clamp_min_(0)
        return torch.copysign(torch.minimum(soft, size.div_(1 + step * curvature)), weight)

    def conjugate(self, dual: Tensor) -> Tensor:
        """sum_j (S_ij^2 / 2 B_ij - mu_ij)_+, finite everywhere."""
        curvature, price = like(self.curvature, dual), like(self.price, dual)
        return (dual / (2 * curvature) * dual - price).clamp_min(0).sum(1)

    def project(self, dual: Tensor) -> Tensor:
        return dual

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """sign(V) max(slope, B |V|) where V is not zero, else the dual point clipped to that at zero."""
        slope = like(self.slope, weight)
        steep = torch.maximum(slope.expand_as(weight), like(self.curvature, weight) * weight.abs())
        return torch.where(weight != 0, torch.copysign(steep, weight), dual.clamp(-slope, slope))

    def dual_scale(self, dual: Tensor) -> Tensor:
        return torch.full_like(dual[:, 0], inf)

    def scaled(self, scale: Tensor) -> "ReverseHuber":
        return ReverseHuber(self.curvature / scale.square(), self.price)
