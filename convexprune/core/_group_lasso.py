"""The group LASSO penalty: the price of a column as a whole."""

from dataclasses import InitVar, dataclass
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune.core._penalty import AbstractPenalty, checked_strength, require_step
from convexprune.errors import ProblemError


@dataclass(frozen=True, eq=False)
class GroupLasso(AbstractPenalty):
    """sum_j strength_j |V_:j|_2, over the columns of V: a column is zero in all rows, or in none.

    It couples the rows; the share of row i in `values` is sum_j strength_j V_ij^2 / |V_:j|. Its prox shrinks each
    column towards zero, and its dual norm is that of each column: p*(S) is zero where |S_:j| <= strength_j for all j
    (Yuan and Lin 2006).

    Args:
        strength: not negative, a number or [n]. Zero leaves a column free.
        checked: whether to check the strengths. False is for those made in a loop, where the check stops a GPU.

    Raises:
        ProblemError: a strength is negative or not finite, or there is one for each row.
    """

    couples_rows = True

    strength: float | Tensor
    checked: InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if checked:
            wrong = "The strengths of a group LASSO penalty are one for each column, [n], not negative and finite."
            object.__setattr__(self, "strength", checked_strength(self.strength, wrong))
            if isinstance(self.strength, Tensor) and self.strength.ndim > 1:
                raise ProblemError(wrong)

    def values(self, weight: Tensor) -> Tensor:
        norms = _norms(weight)
        return (weight.square() * (self._like(weight) / norms.clamp_min(torch.finfo(norms.dtype).tiny))).sum(1)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """Block shrinkage, V_:j (1 - step strength_j / |V_:j|)_+."""
        require_step(step)
        return torch.mul(weight, 1 - _ratio(step * self._like(weight), _norms(weight)), out=out)

    def conjugate(self, dual: Tensor) -> Tensor:
        """Zero on its domain, columns no longer than their strength."""
        return dual.new_zeros(dual.shape[0])

    def project(self, dual: Tensor) -> Tensor:
        return dual * _ratio(self._like(dual), _norms(dual))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """strength_j V_:j / |V_:j| where the column is not zero, else the dual point shortened to the strength."""
        norms = _norms(weight)
        direction = weight * (self._like(weight) / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        return torch.where(norms > 0, direction, self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        """The same for all rows."""
        ratio = (self._like(dual) / _norms(dual)).nan_to_num_(nan=inf, posinf=inf)  # 0 / 0: no factor is too large
        return ratio.amin().expand(len(dual))

    def scaled(self, scale: Tensor) -> "GroupLasso":
        return GroupLasso(self.strength / scale, checked=False)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.strength.to(dtype), False) if isinstance(self.strength, Tensor) else self

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.as_tensor(self.strength, dtype=tensor.dtype, device=tensor.device)


def _norms(weight: Tensor) -> Tensor:
    """Of each column [n]."""
    return torch.linalg.vector_norm(weight, dim=0)


def _ratio(strength: Tensor, norms: Tensor) -> Tensor:
    """min(1, strength / norm) [n]: 1 of a column that is zero."""
    return torch.where(norms > strength, strength / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
