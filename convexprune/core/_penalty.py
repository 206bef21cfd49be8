"""Penalties. A penalty has all mathematics of its term, so that solvers and certificates call only these methods."""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import InitVar, dataclass, fields, is_dataclass
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune._device.kernels import fused, number_like
from convexprune.core._arrays import Array, as_tensor
from convexprune.errors import ProblemError


class AbstractPenalty(ABC):
    """A closed function of the weight V [m n], separable over entries or groups of entries, with p(V) >= p(0) = 0.

    The function is convex unless its class says otherwise: bounds by the conjugate hold in both cases, and can be tight
    only for a convex function.
    """

    couples_rows = False
    """Whether it is no sum over rows: its values [m] then only add up to it."""

    @abstractmethod
    def values(self, weight: Tensor) -> Tensor:
        """Return p by row [m] of the `weight` [m n]."""

    @abstractmethod
    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """Return the proximal operator, argmin_U 1/2 |U - V|^2 + step p(U).

        Args:
            weight: V [m n].
            step: not negative.
            out: tensor for the result, if given; may be `weight`.

        Returns:
            U [m n].
        """

    def forward_backward(self, weight: Tensor, residual: Tensor, step: float) -> Tensor:
        """The proximal gradient step, prox(V + step K).

        Args:
            weight: V [m n].
            residual: K [m n], the negative gradient at V.
            step: not negative.

        Returns:
            U [m n].
        """
        point = torch.add(weight, residual, alpha=step)
        return self.prox(point, step, out=point)

    @abstractmethod
    def conjugate(self, dual: Tensor) -> Tensor:
        """Return the convex conjugate p*(S) = max_V <S, V> - p(V) by row.

        Args:
            dual: S [m n], in the domain of p*.

        Returns:
            [m].
        """

    @abstractmethod
    def project(self, dual: Tensor) -> Tensor:
        """The point nearest to S where the conjugate is finite.

        Args:
            dual: S [m n].

        Returns:
            [m n].
        """

    @abstractmethod
    def dual_scale(self, dual: Tensor) -> Tensor:
        """Return the largest factor s_i for which the conjugate of the row s_i S_i is finite.

        Args:
            dual: S [m n].

        Returns:
            [m]; may be inf.
        """

    @abstractmethod
    def scaled(self, scale: Tensor) -> "AbstractPenalty":
        """Return the penalty as a function of U = V * scale.

        Args:
            scale: [n], positive.

        Returns:
            The penalty of U.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """Return the penalty for weights of a new `dtype`."""

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor | None:
        """Return the subgradient of p nearest to a dual point, so that p(V) + p*(S) = <S, V>.

        Args:
            weight: V [m n].
            dual: the point [m n].

        Returns:
            S [m n]. None if equal to `project`, or unknown: then certificates are less tight.
        """
        return None

    def rows(self, chosen: slice) -> Self:
        """Return the penalty of the rows `chosen` alone."""
        other = copy(self)
        for field in fields(self) if is_dataclass(self) else ():
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and len(tensor) > 1:
                object.__setattr__(other, field.name, tensor[chosen])
        return other

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse weights of a shape that does not fit.

        Args:
            shape: (m, n) of the weights.

        Raises:
            ProblemError: a tensor of the penalty does not broadcast to the shape.
        """
        for field in fields(self) if is_dataclass(self) else ():
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor) and not _broadcasts(tensor.shape, shape):
                raise ProblemError(
                    f"`{field.name}` of {type(self).__name__} is {list(tensor.shape)}, which does not broadcast to the "
                    f"problem's {list(shape)} [outputs inputs]."
                )


def checked_strength(strength: float | Array, wrong: str, most: float = inf) -> float | Tensor:
    """Return a strength, or a tensor of strengths, that is not negative and not above `most`."""
    if not isinstance(strength, Tensor | float | int):
        strength = as_tensor("strength", strength)
    least, largest = torch.as_tensor(strength, dtype=torch.float64).aminmax()  # NaN if there is one
    if not (least >= 0 and largest <= most):
        raise ProblemError(wrong)
    return strength


FINITE = torch.finfo(torch.float64).max


def require_step(step: float) -> None:
    """Refuse a negative step."""
    if step < 0:
        raise ProblemError(f"The step of a prox is {step}; it must be 0 or more.")


def _broadcasts(shape: torch.Size, to: tuple[int, int]) -> bool:
    return len(shape) <= 2 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


@dataclass(frozen=True, eq=False)
class L1(AbstractPenalty):
    """sum_ij strength_ij |V_ij|.

    `strength * sqrt(H_jj)` makes a penalty that does not depend on the scale of the inputs.

    Args:
        strength: not negative, of a shape that broadcasts to [m n]. Zero leaves an entry free, inf makes it zero.
        checked: whether to check the strengths. False is for those made in a loop, where the check stops a GPU.

    Raises:
        ProblemError: a strength is negative or NaN.
    """

    strength: float | Tensor
    checked: InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if checked:
            wrong = "A strength of the L1 penalty is negative or NaN; strengths lie in [0, inf]."
            object.__setattr__(self, "strength", checked_strength(self.strength, wrong))

    def values(self, weight: Tensor) -> Tensor:
        price = weight.abs() * self.strength
        return price.masked_fill_(weight == 0, 0).sum(1)  # also at an infinite strength

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """Soft thresholding, sign(V) (|V| - step strength)_+."""
        require_step(step)
        step = step or torch.finfo(weight.dtype).tiny  # an infinite strength makes zeros at any step
        return _shrink(weight, self._like(weight), number_like(step, weight), out)

    def forward_backward(self, weight: Tensor, residual: Tensor, step: float) -> Tensor:
        require_step(step)
        return _shrink_ahead(weight, residual, self._like(weight), number_like(step, weight))

    def conjugate(self, dual: Tensor) -> Tensor:
        """Return zero: the domain is the box |S_ij| <= strength_ij."""
        return dual.new_zeros(dual.shape[0])

    def project(self, dual: Tensor) -> Tensor:
        return torch.clamp(dual, -self._like(dual), self._like(dual))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """strength sign(V) where V is not zero, else the dual point clipped to the box."""
        return torch.where(weight != 0, self._like(dual) * weight.sign(), self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        ratio = self._like(dual) / dual.abs()
        return ratio.nan_to_num_(nan=inf, posinf=inf).amin(1)  # 0 / 0: no factor is too large

    def scaled(self, scale: Tensor) -> "L1":
        return L1(self.strength / scale, checked=False)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.strength.to(dtype), False) if isinstance(self.strength, Tensor) else self

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.as_tensor(self.strength, dtype=tensor.dtype, device=tensor.device)


def _soft(weight: Tensor, strength: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    """sign(V) (|V| - step strength)_+."""
    return torch.copysign(weight.abs().addcmul_(strength, step, value=-1).clamp_min_(0), weight, out=out)


_shrink = fused(_soft)


@fused
def _shrink_ahead(weight: Tensor, residual: Tensor, strength: Tensor, step: Tensor) -> Tensor:
    """Shrink V + step K."""
    point = torch.addcmul(weight, residual, step)
    return _soft(point, strength, step, point)


@dataclass(frozen=True, eq=False)
class Support(AbstractPenalty):
    """Infinite for a non-zero outside `mask` [m n], else zero: values are free, places are fixed.

    Raises:
        ProblemError: the mask is not boolean.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            object.__setattr__(self, "mask", as_tensor("mask", self.mask))
        if self.mask.dtype != torch.bool:
            raise ProblemError(f"The mask of a support is {self.mask.dtype}; it must be boolean, true where V is free.")

    def values(self, weight: Tensor) -> Tensor:
        outside = ((weight != 0) & ~self.mask).any(1)
        return torch.where(outside, inf, 0.0).to(weight.dtype)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """V on the support, zero elsewhere."""
        return torch.mul(weight, self.mask, out=out)

    def conjugate(self, dual: Tensor) -> Tensor:
        """Return zero: the domain are dual points that vanish on the support."""
        return dual.new_zeros(dual.shape[0])

    def project(self, dual: Tensor) -> Tensor:
        return dual * ~self.mask

    def dual_scale(self, dual: Tensor) -> Tensor:
        inside = ((dual != 0) & self.mask).any(1)
        return torch.where(inside, 0.0, inf).to(dual.dtype)

    def scaled(self, scale: Tensor) -> "Support":
        return self

    def to(self, dtype: torch.dtype) -> Self:
        return self
