"""Penalties that stop to grow, MCP and SCAD: less bias than L1, no convexity, no certificate of optimality."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, Self

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import FINITE, Elementwise, checked_strength, like, require_step
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Concave(Elementwise):
    """A sum of concave prices of |V_ij|."""

    is_convex = False
    least_reach: ClassVar[float]

    strength: float | Tensor
    reach: float = 3.0
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        wrong = f"A strength of {type(self).__name__} is negative or not finite."
        object.__setattr__(self, "strength", checked_strength(self.strength, wrong, FINITE))
        if not isinstance(self.reach, Real) or not self.least_reach < self.reach <= FINITE:
            raise ProblemError(
                f"The reach of {type(self).__name__} is {self.reach!r}; it must be a number above {self.least_reach}."
            )

    def values(self, weight: Tensor) -> Tensor:
        return self._price(weight.abs() / self.scale, like(self.strength, weight)).sum(1)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """The best of the stationary points of the pieces."""
        require_step(step)
        scale, strength = like(self.scale, weight), like(self.strength, weight)
        size, steps = weight.abs() / scale, step / scale.square()
        points = torch.stack([each.expand_as(size) for each in self._stationary(size, strength, steps)])
        costs = (points - size).square() / 2 + steps * self._price(points, strength)
        best = points.gather(0, costs.argmin(0, keepdim=True))[0]
        return torch.copysign(best * scale, weight)

    def dual_scale(self, dual: Tensor) -> Tensor:
        """0: a bounded penalty is below no slope."""
        return torch.where((dual != 0).any(1), 0.0, torch.inf).to(dual)

    def project(self, dual: Tensor) -> Tensor:
        return torch.zeros_like(dual)

    def scaled(self, scale: Tensor) -> Self:
        return replace(self, scale=self.scale * scale)

    @abstractmethod
    def _price(self, size: Tensor, strength: Tensor) -> Tensor: ...

    @abstractmethod
    def _stationary(self, size: Tensor, strength: Tensor, step: Tensor) -> list[Tensor]:
        """Return where |V - size|^2 / 2 + step price may be least, for each piece of the price."""


@dataclass(frozen=True, eq=False)
class MCP(Concave):
    """The minimax concave penalty, strength |V| - V^2 / (2 reach) up to |V| = reach strength, and constant beyond.

    Zhang (2010). It is not convex: solvers end at a stationary point, and no certificate of optimality exists.

    Args:
        strength: the price of a small weight, of a shape that broadcasts to [m n].
        reach: above 0; the larger, the nearer to L1.
        scale: of the weight [n]; for solvers.
    """

    least_reach = 0.0

    def _price(self, size: Tensor, strength: Tensor) -> Tensor:
        near = torch.minimum(size, self.reach * strength)
        return strength * near - near.square() / (2 * self.reach)

    def _stationary(self, size: Tensor, strength: Tensor, step: Tensor) -> list[Tensor]:
        knee = self.reach * strength
        inner = (size - step * strength) / (1 - step / self.reach)
        inner = torch.where(step < self.reach, inner, 0.0).clamp_min(0)
        return [torch.zeros_like(size), torch.minimum(inner, knee), torch.maximum(size, knee)]


@dataclass(frozen=True, eq=False)
class SCAD(Concave):
    """The smoothly clipped absolute deviation: slope strength up to |V| = strength, falling to 0 at reach strength.

    Fan and Li (2001). It is not convex: solvers end at a stationary point, and no certificate of optimality exists.

    Args:
        strength: the price of a small weight, of a shape that broadcasts to [m n].
        reach: above 2; the larger, the nearer to L1.
        scale: of the weight [n]; for solvers.
    """

    least_reach = 2.0

    reach: float = 3.7

    def _price(self, size: Tensor, strength: Tensor) -> Tensor:
        bent = torch.minimum(size, self.reach * strength)
        beyond = (bent - strength).clamp_min(0)
        return strength * bent - beyond.square() / (2 * (self.reach - 1))

    def _stationary(self, size: Tensor, strength: Tensor, step: Tensor) -> list[Tensor]:
        knee = self.reach * strength
        slack = self.reach - 1 - step
        middle = torch.where(slack > 0, ((self.reach - 1) * size - step * knee) / slack, 0.0)
        middle = torch.minimum(torch.maximum(middle, strength.expand_as(middle)), knee)
        return [torch.minimum((size - step * strength).clamp_min(0), strength), middle, torch.maximum(size, knee)]
