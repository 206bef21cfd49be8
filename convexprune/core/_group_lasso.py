"""The group LASSO penalty: the price of a column, or of a block of columns, as a whole."""

from dataclasses import InitVar, dataclass, replace
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune.constraints._columns import column_norms
from convexprune.core._penalty import FINITE, AbstractPenalty, checked_strength, require_step
from convexprune.errors import ProblemError

HALVINGS = 60
"""Of the interval, in logarithms, in which the multiplier of a block in other units is: to the last bit of float64."""


@dataclass(frozen=True, eq=False)
class GroupLasso(AbstractPenalty):
    """sum_j strength_j |V_:j|_2, over the columns of V: a column is zero in all rows, or in none.

    The penalty couples rows; the part of row i in `values` is sum_j strength_j V_ij^2 / |V_:j|. The prox shrinks
    columns towards zero, and the dual norm is by column: p*(S) is zero where |S_:j| <= strength_j for all j (Yuan and
    Lin 2006).

    With a `block` the penalty is sum_b strength_b |V_:b / w_b|_F over blocks of as many columns, with units w_j; p*(S)
    is zero where |S_:b w_b| <= strength_b. If the units of a block differ, the prox takes a bisection.

    Args:
        strength: not negative, a number or [n], equal in all columns of a block. Zero leaves a column free.
        checked: check the strengths. False is for strengths made in a loop, where the check stops a GPU.
        block: number of consecutive columns with a common price.
        units: w [n], positive, of the columns in blocks; None: ones.

    Raises:
        ProblemError: a strength is negative or not finite, or strengths differ by row.
    """

    couples_rows = True

    strength: float | Tensor
    checked: InitVar[bool] = True
    block: int = 1
    units: Tensor | None = None

    def __post_init__(self, checked: bool) -> None:
        if checked:
            wrong = "The strengths of a group LASSO penalty are one for each column, [n], not negative and finite."
            object.__setattr__(self, "strength", checked_strength(self.strength, wrong, FINITE))
            if isinstance(self.strength, Tensor) and self.strength.ndim > 1:
                raise ProblemError(wrong)

    def values(self, weight: Tensor) -> Tensor:
        weight = weight if self.units is None else weight / self.units
        return (weight * self._directions(weight) * self._like(weight)).sum(1)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """Block shrinkage, V_:j (1 - step strength_j / |V_:j|)_+; in units U_j = V_j w_j^2 / (w_j^2 + mu)."""
        require_step(step)
        strength = step * self._like(weight)
        if self.units is None:
            return torch.mul(weight, 1 - _ratio(strength, column_norms(weight, self.block)), out=out)
        return torch.mul(weight, self._shrinkage(weight, strength, self.units), out=out)

    def conjugate(self, dual: Tensor) -> Tensor:
        """Return zero: on the domain no column is longer than its strength."""
        return dual.new_zeros(dual.shape[0])

    def project(self, dual: Tensor) -> Tensor:
        if self.units is not None:
            return dual - self.prox(dual, 1.0)
        return dual * _ratio(self._like(dual), column_norms(dual, self.block))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """strength_j V_:j / |V_:j| where the column is not zero, else the dual point shortened to the strength."""
        scaled = weight if self.units is None else weight / self.units
        direction = self._directions(scaled) * self._like(scaled)
        direction = direction if self.units is None else direction / self.units
        return torch.where(column_norms(scaled, self.block) > 0, direction, self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        """Return a common factor for all rows."""
        norms = column_norms(dual if self.units is None else dual * self.units, self.block)
        ratio = (self._like(dual) / norms).nan_to_num_(nan=inf, posinf=inf)  # 0 / 0: no factor is too large
        return ratio.amin().expand(len(dual))

    def scaled(self, scale: Tensor) -> "GroupLasso":
        if self.block == 1:
            return GroupLasso(self.strength / scale, checked=False)
        return replace(self, checked=False, units=scale if self.units is None else self.units * scale)

    def to(self, dtype: torch.dtype) -> Self:
        strength, units = (each.to(dtype) if isinstance(each, Tensor) else each for each in (self.strength, self.units))
        return replace(self, strength=strength, checked=False, units=units)

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.as_tensor(self.strength, dtype=tensor.dtype, device=tensor.device)

    def _directions(self, weight: Tensor) -> Tensor:
        """V_:j / |V_:j| [m n]; zero where the column is."""
        norms = column_norms(weight, self.block)
        return weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _shrinkage(self, weight: Tensor, strength: Tensor, units: Tensor) -> Tensor:
        """w_j^2 / (w_j^2 + mu) [n], with mu |U_:b / w_b| the strength; zero where |V_:b w_b| is not above that."""
        squares = units.square()
        energy, in_blocks = weight.square().sum(0) * squares, squares.view(-1, self.block)
        above = column_norms(weight * units, self.block) - strength
        room = strength / above.clamp_min(torch.finfo(above.dtype).tiny)
        low, high = (room * each.repeat_interleave(self.block) for each in (in_blocks.amin(1), in_blocks.amax(1)))
        for _ in range(HALVINGS):
            middle = low.sqrt() * high.sqrt()
            found = middle * column_norms((energy.sqrt() / (squares + middle))[None], self.block)
            low, high = torch.where(found < strength, middle, low), torch.where(found < strength, high, middle)
        return torch.where(above > 0, squares / (squares + high), 0.0)


def _ratio(strength: Tensor, norms: Tensor) -> Tensor:
    """min(1, strength / norm) [n]: 1 of a column that is zero."""
    return torch.where(norms > strength, strength / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
