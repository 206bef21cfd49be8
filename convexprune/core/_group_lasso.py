"""Group penalties: the price of a column, of a block of columns, or of a group of entries inside a row, as a whole."""

from dataclasses import InitVar, dataclass, replace
from math import inf
from numbers import Integral
from typing import Self

import torch
from torch import Tensor

from convexprune.constraints import column_norms
from convexprune.core._abstract_penalty import (
    FINITE,
    AbstractPenalty,
    checked_strength,
    like,
    require_broadcast,
    require_step,
)
from convexprune.core._arrays import as_tensor
from convexprune.errors import ProblemError

HALVINGS = 60  # of a factor: to the last bit of float64


@dataclass(frozen=True, eq=False)
class GroupLasso(AbstractPenalty):
    """sum_j strength_j |V_:j|_2, over the columns of V: a column is zero in all rows, or in none.

    The penalty couples rows; the part of row i in `values` is sum_j strength_j V_ij^2 / |V_:j|. The prox shrinks
    columns towards zero, and the dual norm is by column: p*(S) is zero where |S_:j| <= strength_j for all j (Yuan and
    Lin 2006). With a `block` the columns are blocks of as many consecutive columns, with the norm of Frobenius.

    Args:
        strength: not negative, a number or [n], equal in all columns of a block. Zero leaves a column free.
        checked: check the strengths. False is for strengths made in a loop, where the check stops a GPU.
        block: number of consecutive columns with a common price.
    """

    couples_rows = True
    priced = ("strength",)

    strength: float | Tensor
    checked: InitVar[bool] = True
    block: int = 1

    def __post_init__(self, checked: bool) -> None:
        if checked:
            wrong = "The strengths of a group LASSO penalty are one for each column, [n], not negative and finite."
            object.__setattr__(self, "strength", checked_strength(self.strength, wrong, FINITE))
            if isinstance(self.strength, Tensor) and self.strength.ndim > 1:
                raise ProblemError(wrong)
            if not isinstance(self.block, Integral) or self.block < 1:
                raise ProblemError(f"block={self.block!r}. Accepted: a whole number of columns, 1 or more.")
            if isinstance(self.strength, Tensor) and self.strength.ndim and not self._is_even(self.strength):
                accepted = f"one price for {self.block} columns in a row"
                raise ProblemError(f"`strength` differs inside a block. Accepted: {accepted}.")

    def values(self, weight: Tensor) -> Tensor:
        return (weight * self._directions(weight) * like(self.strength, weight)).sum(1)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Block shrinkage, V_:b (1 - step strength_b / |V_:b|)_+."""
        return weight * self._shrinkage(weight, step)

    def prox_(self, weight: Tensor, step: float) -> Tensor:
        return weight.mul_(self._shrinkage(weight, step))

    def project(self, dual: Tensor) -> Tensor:
        return dual * _ratio(like(self.strength, dual), column_norms(dual, self.block))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """strength_j V_:j / |V_:j| where the column is not zero, else the dual point shortened to the strength."""
        direction = self._directions(weight) * like(self.strength, weight)
        return torch.where(column_norms(weight, self.block) > 0, direction, self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        ratio = like(self.strength, dual) / column_norms(dual, self.block)
        return ratio.nan_to_num_(nan=inf, posinf=inf).amin().expand(len(dual))  # 0 / 0: no factor is too large

    def units(self, scale: Tensor) -> Tensor:
        """The geometric mean of each block."""
        if self.block == 1:
            return scale
        return scale.view(-1, self.block).log().mean(1).exp().repeat_interleave(self.block)

    def scaled(self, scale: Tensor) -> "GroupLasso":
        return replace(self, strength=self.strength / scale, checked=False)

    def check(self, shape: tuple[int, int]) -> None:
        super().check(shape)
        if shape[1] % self.block:
            raise ProblemError(f"A weight {list(shape)} has no blocks of {self.block} columns: give a block that fits.")

    def _is_even(self, strength: Tensor) -> bool:
        first = torch.arange(len(strength), device=strength.device) // self.block * self.block
        return torch.equal(strength, strength[first])

    def _directions(self, weight: Tensor) -> Tensor:
        """Return V_:j / |V_:j| [m n]; zero where the column is zero."""
        norms = column_norms(weight, self.block)
        return weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _shrinkage(self, weight: Tensor, step: float) -> Tensor:
        require_step(step)
        return 1 - _ratio(step * like(self.strength, weight), column_norms(weight, self.block))


def _ratio(strength: Tensor, norms: Tensor) -> Tensor:
    """Return min(1, strength / norm) [n]: 1 for a zero column."""
    return torch.where(norms > strength, strength / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


@dataclass(frozen=True, eq=False)
class RowGroups(AbstractPenalty):
    """sum_ig strength_g |V_ig|_2 + sum_ij l1_ij |V_ij|, over groups of entries inside each row.

    Of one response this is the group LASSO of Yuan and Lin (2006), with `l1` the sparse-group LASSO of Simon et al.
    (2013): soft thresholding, and then shrinkage of each group, is its prox.

    Args:
        groups: the number of the group of each column [n], or of each entry [m n]: 0, 1, 2, ...
        strength: not negative, a number, or [groups]. sqrt(size of the group) times a number treats all sizes alike.
        l1: not negative, of a shape that broadcasts to [m n]: the price of entries inside groups.
    """

    priced = ("strength", "l1")

    groups: Tensor
    strength: float | Tensor
    l1: float | Tensor = 0.0

    def __post_init__(self) -> None:
        groups = as_tensor("groups", self.groups)
        whole = not (groups.is_floating_point() or groups.is_complex())
        if not whole or groups.ndim not in (1, 2) or not groups.numel() or int(groups.long().min()) < 0:
            raise ProblemError(f"`groups` is {groups.dtype} {list(groups.shape)}; needed are whole numbers from 0.")
        groups = torch.atleast_2d(groups.long())
        for name in ("strength", "l1"):
            wrong = f"`{name}` of groups inside rows is not negative and finite; one `strength` may be given a group."
            object.__setattr__(self, name, checked_strength(getattr(self, name), wrong, FINITE, name))
        alike = not isinstance(self.strength, Tensor) or self.strength.numel() == 1
        if alike and int(groups.max()) >= groups.numel():  # all numbers up to the largest take memory
            groups = groups.unique(return_inverse=True)[1]
        object.__setattr__(self, "groups", groups)
        if isinstance(self.strength, Tensor):
            strength = torch.atleast_2d(self.strength)
            if strength.ndim > 2 or len(strength) > 1 or strength.shape[1] not in (1, int(groups.max()) + 1):
                raise ProblemError(f"`strength` is {list(self.strength.shape)} for {int(groups.max()) + 1} groups.")
            object.__setattr__(self, "strength", strength)

    def values(self, weight: Tensor) -> Tensor:
        lasso = (weight.abs() * like(self.l1, weight)).sum(1)
        return (self._norms(weight) * like(self.strength, weight)).sum(1) + lasso

    def prox(self, weight: Tensor, step: float) -> Tensor:
        require_step(step)
        soft = self._soft(weight, step)
        return soft * (1 - self._spread(_ratio(step * like(self.strength, weight), self._norms(soft)), weight))

    def subgradient(self, weight: Tensor, dual: Tensor) -> Tensor:
        """The gradient of each group's norm where the group is not zero, and the part of the dual point elsewhere."""
        norms, l1 = self._norms(weight), like(self.l1, weight)
        scale = like(self.strength, weight) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        inside = torch.where(weight != 0, l1 * weight.sign(), dual.clamp(-l1, l1))
        slope = weight * self._spread(scale.expand_as(norms), weight) + inside
        return torch.where(self._spread(norms > 0, weight), slope, self.project(dual))

    def dual_scale(self, dual: Tensor) -> Tensor:
        """1 / e for the least e with |soft(S_g, e l1)| <= e strength_g in each group, found by halving."""
        strength, norms = like(self.strength, dual), self._norms(dual)
        high = (norms / strength).nan_to_num(nan=0.0, posinf=inf)
        if bool(like(self.l1, dual).any()):
            low = torch.zeros_like(high)
            most = like(self.l1, dual).clamp_min(torch.finfo(dual.dtype).tiny)
            high = high.minimum(low.scatter_reduce(1, self._labels(dual), dual.abs() / most, "amax"))
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                inside = self._norms(self._soft(dual, self._spread(middle, dual))) <= middle * strength
                low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
        return 1 / high.amax(1)

    def units(self, scale: Tensor) -> Tensor:
        """The geometric mean of each group, if groups are of columns."""
        if len(self.groups) > 1:
            return super().units(scale)
        labels = self.groups[0].to(scale.device)
        sums = torch.zeros(int(labels.max()) + 1, dtype=scale.dtype, device=scale.device)
        means = sums.scatter_add(0, labels, scale.log()) / labels.bincount().clamp_min(1)
        return means.exp()[labels]

    def scaled(self, scale: Tensor) -> "RowGroups":
        if len(self.groups) > 1:
            return replace(self, strength=self.strength / scale[:1], l1=self.l1 / scale)
        strength = like(self.strength, scale).expand(1, int(self.groups.max()) + 1)[0]
        labels = self.groups[0].to(scale.device)
        of_group = torch.ones_like(strength).scatter(0, labels, scale)  # the scale is one number in each group
        return replace(self, strength=strength / of_group, l1=self.l1 / scale)

    def rows(self, chosen: slice | Tensor) -> Self:
        """The rows may lack the last groups: there is a strength for each of the groups that are left."""
        other = super().rows(chosen)
        if not isinstance(other.strength, Tensor):
            return other
        return replace(other, strength=other.strength[:, : int(other.groups.max()) + 1])

    def check(self, shape: tuple[int, int]) -> None:
        if self.groups.shape[1] != shape[1] or len(self.groups) not in (1, shape[0]):
            raise ProblemError(
                f"`groups` is {list(self.groups.shape)}; a weight {list(shape)} has a group for each column or entry."
            )
        if isinstance(self.l1, Tensor):
            require_broadcast("`l1`", self.l1, shape)

    def _labels(self, weight: Tensor) -> Tensor:
        return self.groups.to(weight.device).expand_as(weight)

    def _norms(self, weight: Tensor) -> Tensor:
        """Return |V_ig| [m groups]."""
        sums = weight.new_zeros(len(weight), int(self.groups.max()) + 1)
        top = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # squares leave float32
        return sums.scatter_add_(1, self._labels(weight), (weight / top).square()).sqrt() * top

    def _spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return a value of each group [m groups] for each entry [m n]."""
        return values.expand(len(weight), -1).gather(1, self._labels(weight))

    def _soft(self, weight: Tensor, step: float | Tensor) -> Tensor:
        return weight - weight.clamp(-(limit := step * like(self.l1, weight)), limit)
