"""The base of penalties: all mathematics of a term, so that solvers and certificates call only these methods."""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from convexprune.core._arrays import Array, as_floats
from convexprune.errors import ProblemError

FINITE = torch.finfo(torch.float64).max


class AbstractPenalty(ABC):
    """A closed function of the weight V [m n] with p(V) >= p(0) = 0.

    Three methods make a penalty: `values`, `prox` and `dual_scale`. All others follow for a norm. A penalty that is no
    norm has a `conjugate`, too. A penalty that is a sum over columns has `units` and `scaled`, and is solved faster.
    `convexprune.problems.check_penalty` tries what a class says. Numbers out of range are a `ProblemError`.
    """

    couples_rows = False
    """Whether it is no sum over rows: its values [m] then only add up to it."""
    is_convex = True
    """Without convexity no certificate exists, and solvers stop where the weight is stationary."""
    priced: tuple[str, ...] = ()
    """The names of the fields that are multiplied for a multiple of the penalty."""

    @abstractmethod
    def values(self, weight: Tensor) -> Tensor:
        """Return p by row [m] of the `weight` [m n]."""

    @abstractmethod
    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Return the proximal operator, argmin_U 1/2 |U - V|^2 + step p(U).

        Args:
            weight: V [m n].
            step: not negative.

        Returns:
            U [m n].
        """

    @abstractmethod
    def dual_scale(self, dual: Tensor) -> Tensor:
        """Return the largest s_i [m], or inf, of which p* is finite at s_i S_i, of `dual` S; alike in coupled rows."""

    def prox_(self, weight: Tensor, step: float) -> Tensor:
        """Return `prox`, written over the weight.

        Args:
            weight: V [m n].
            step: not negative.

        Returns:
            `weight`.
        """
        return weight.copy_(self.prox(weight, step))

    def forward_backward(self, weight: Tensor, residual: Tensor, step: float) -> Tensor:
        """The proximal gradient step, prox(V + step K).

        Args:
            weight: V [m n].
            residual: K [m n], the negative gradient at V.
            step: not negative.

        Returns:
            U [m n].
        """
        return self.prox_(torch.add(weight, residual, alpha=step), step)

    def conjugate(self, dual: Tensor) -> Tensor:
        """Return the convex conjugate max_V <S, V> - p(V) by row [m] of a `dual` S in its domain: zero, of a norm."""
        return dual.new_zeros(len(dual))

    def project(self, dual: Tensor) -> Tensor:
        """Return a point where the conjugate is finite; of a norm, the nearest to `dual` S (Moreau's decomposition)."""
        return dual - self.prox(dual, 1.0)

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor | None:
        """Return the subgradient of p nearest to a dual point, so that p(V) + p*(S) = <S, V>.

        Args:
            weight: V [m n].
            dual: the point [m n].

        Returns:
            S [m n]. None if unknown: certificates take the subgradient at a prox instead.
        """
        return None

    def inside(self, weight: Tensor) -> Tensor:
        """Return the nearest point where p is finite, of a `weight` [m n] that rounding or an engine left outside."""
        return weight

    def settled(self, weight: Tensor, eps: float) -> Tensor:
        """Put entries on a bound if rounding alone moved them off it.

        Args:
            weight: V [m n].
            eps: the rounding error of a number near 1.

        Returns:
            V [m n]. By default `weight` itself: a penalty without bounds has nothing to settle.
        """
        return weight

    def units(self, scale: Tensor) -> Tensor:
        """Return the scale nearest to a positive `scale` [n] of which `scaled` is known: by default, one number."""
        return scale.log().mean().exp().expand_as(scale)

    def scaled(self, scale: Tensor) -> "AbstractPenalty":
        """Return the penalty as a function of U = V * `scale` [n], positive, as `units` returns the scale."""
        return Scaled(self, float(scale.flatten()[0]))

    def times(self, factor: float) -> "AbstractPenalty":
        """Return the penalty `factor` p.

        Args:
            factor: positive.

        Returns:
            The penalty.

        Raises:
            ProblemError: the factor is not positive, or not finite.
        """
        if not 0 < factor < inf:
            raise ProblemError(f"A penalty times {factor}. Accepted: a positive, finite factor.")
        if not self.priced:
            return Scaled(self, 1.0, factor)
        other = copy(self)
        for name in self.priced:
            object.__setattr__(other, name, getattr(self, name) * factor)
        return other

    def to(self, dtype: torch.dtype) -> Self:
        """Return the penalty for weights of a new `dtype`."""
        return self._with(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def rows(self, chosen: slice | Tensor) -> Self:
        """Return the penalty of the rows `chosen` alone."""
        return self._with(lambda tensor: tensor[chosen] if tensor.ndim == 2 and len(tensor) > 1 else tensor)

    def _with(self, change: Any) -> Self:
        other = copy(self)
        for name, tensor in self._tensors():
            object.__setattr__(other, name, change(tensor))
        return other

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """The fields of a dataclass that are tensors, by name."""
        named = [(field.name, getattr(self, field.name)) for field in fields(self)] if is_dataclass(self) else []
        return [(name, value) for name, value in named if isinstance(value, Tensor)]

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse tensors of the penalty that do not broadcast to the `shape` (m, n) of weights."""
        for name, tensor in self._tensors():
            require_broadcast(f"`{name}` of {type(self).__name__}", tensor, shape)


def require_norm(penalty: AbstractPenalty, like: Tensor) -> None:
    """Refuse a penalty without a conjugate that is no norm: its certificates would be wrong."""
    if not penalty.is_convex or type(penalty).conjugate is not AbstractPenalty.conjugate:
        return
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    for size in (1e-3, 1.0, 1e3):  # Huber's function, say, is linear only far from zero
        weight = penalty.prox(size * drawn, 1e-6 * size)  # where p is finite
        once, twice = penalty.values(weight), penalty.values(2 * weight)
        if not torch.allclose(2 * once.sum(), twice.sum(), rtol=1e-3, atol=0):
            raise ProblemError(
                f"{type(penalty).__name__} is no norm: p(2 V) is not 2 p(V). Give it its `conjugate`, p*(S) by row."
            )


class Elementwise(AbstractPenalty):
    """A sum over entries: known in any units of the columns."""

    def columns(self, chosen: Tensor) -> Self:
        """Return the penalty of the columns `chosen` alone."""
        return self._with(lambda tensor: tensor[..., chosen] if tensor.ndim and tensor.shape[-1] > 1 else tensor)

    def units(self, scale: Tensor) -> Tensor:
        return scale


@dataclass(frozen=True, eq=False)
class Scaled(AbstractPenalty):
    """The penalty factor p(U / scale) of U, for two numbers."""

    penalty: AbstractPenalty
    scale: float
    factor: float = 1.0

    @property
    def couples_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.couples_rows

    @property
    def is_convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.is_convex

    def values(self, weight: Tensor) -> Tensor:
        return self.factor * self.penalty.values(weight / self.scale)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        return self.penalty.prox(weight / self.scale, self.factor * step / self.scale**2) * self.scale

    def dual_scale(self, dual: Tensor) -> Tensor:
        return self.penalty.dual_scale(dual * self._unit)

    def conjugate(self, dual: Tensor) -> Tensor:
        return self.factor * self.penalty.conjugate(dual * self._unit)

    def project(self, dual: Tensor) -> Tensor:
        return self.penalty.project(dual * self._unit) / self._unit

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor | None:
        found = self.penalty.subgradient(weight / self.scale, dual * self._unit)
        return None if found is None else found / self._unit

    def check(self, shape: tuple[int, int]) -> None:
        self.penalty.check(shape)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.penalty.to(dtype), self.scale, self.factor)

    def rows(self, chosen: slice | Tensor) -> Self:
        return type(self)(self.penalty.rows(chosen), self.scale, self.factor)

    @property
    def _unit(self) -> float:
        return self.scale / self.factor


def checked_strength(strength: float | Array, wrong: str, most: float = inf, name: str = "strength") -> float | Tensor:
    """Return a strength, or a floating-point tensor of strengths, that is not negative and not above `most`."""
    strength = float(strength) if isinstance(strength, Real) else as_floats(name, strength)
    tensor = torch.as_tensor(strength, dtype=torch.float64)
    if not tensor.numel():
        raise ProblemError(
            f"`{name}` is {list(tensor.shape)}, without a number. Give one number, or one for each entry."
        )
    least, largest = tensor.aminmax()  # NaN if there is one
    if not (least >= 0 and largest <= most):
        raise ProblemError(wrong)
    return strength


def require_step(step: float) -> None:
    """Refuse a negative step."""
    if step < 0:
        raise ProblemError(f"The step of a prox is {step}; it must be 0 or more.")


def require_broadcast(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Refuse a tensor that does not broadcast to the shape of a weight."""
    if tensor.ndim > 2 or not all(a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(shape), strict=False)):
        raise ProblemError(
            f"{name} is {list(tensor.shape)}, which does not broadcast to the problem's {list(shape)} [outputs inputs]."
        )


def like(value: float | Tensor, tensor: Tensor) -> Tensor:
    """Return a number or a tensor in the dtype and on the device of a tensor."""
    return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
