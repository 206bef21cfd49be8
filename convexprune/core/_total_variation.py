"""Total variation along a row: neighbours are alike but for a few jumps (the fused LASSO)."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from convexprune.core._abstract_penalty import FINITE, AbstractPenalty, checked_strength, like, require_step
from convexprune.errors import ProblemError

ITERATIONS = 1000  # of Newton's method on the jumps: a few tens are made
ENOUGH = 1e-4  # of the slope's promise
SHORTEST = 2.0**-20  # step
AT_ONCE = 2**24  # pairs of columns


@dataclass(frozen=True, eq=False)
class TotalVariation(AbstractPenalty):
    """strength sum_ij |V_i,j+1 - V_ij| + l1 sum_ij |V_ij| (Tibshirani et al. 2005).

    Args:
        strength: not negative, a number or one for each row [m 1].
        l1: not negative, a number or one for each row [m 1].
    """

    priced = ("strength", "l1")

    strength: float | Tensor
    l1: float | Tensor = 0.0

    def __post_init__(self) -> None:
        for name in ("strength", "l1"):
            wrong = f"`{name}` of a total variation is not negative and finite: a number, or one for each row [m 1]."
            value = checked_strength(getattr(self, name), wrong, FINITE, name)
            object.__setattr__(self, name, value)
            if isinstance(value, Tensor) and (value.ndim > 2 or (value.ndim > 0 and value.shape[-1] != 1)):
                raise ProblemError(wrong)

    def values(self, weight: Tensor) -> Tensor:
        strength, l1 = self._like(weight)
        return (strength * weight.diff(dim=1).abs()).sum(1) + (l1 * weight.abs()).sum(1)

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Flat pieces, and then soft thresholding (Friedman et al. 2007)."""
        require_step(step)
        strength, l1 = self._like(weight)
        flat = _flattened(weight, (step * strength).expand(len(weight), 1))
        return flat - flat.clamp(-step * l1, step * l1)

    def dual_scale(self, dual: Tensor) -> Tensor:
        """The least of (l1 length + strength ends) / |sum| over all runs of columns with that many inner ends.

        Flows that the jumps may carry exist if and only if no run has more to carry away than that.
        """
        strength, l1 = self._like(dual)
        n = dual.shape[1]
        sums = torch.cat([dual.new_zeros(len(dual), 1), dual.cumsum(1)], 1)
        place = torch.arange(n + 1, device=dual.device)
        inner = ((place > 0) & (place < n)).to(dual)
        lengths, ends = (place[:, None] - place).abs().to(dual), inner[:, None] + inner
        known = 4 * n * torch.finfo(dual.dtype).eps * dual.abs().sum(1)[:, None, None]  # what is rounding is no sum
        least = []
        rows = torch.arange(len(dual), device=dual.device).split(max(1, AT_ONCE // (n + 1) ** 2))
        for i in rows:
            carried = (sums[i, :, None] - sums[i, None]).abs()
            room = l1.expand(len(dual), 1)[i, :, None] * lengths + strength.expand(len(dual), 1)[i, :, None] * ends
            least.append(torch.where(carried > known[i], room / carried, inf).flatten(1).amin(1))
        return torch.cat(least)

    def scaled(self, scale: Tensor) -> "TotalVariation":
        one = scale.flatten()[0]  # the scale is one number
        return replace(self, strength=self.strength / one, l1=self.l1 / one)

    def _like(self, tensor: Tensor) -> list[Tensor]:
        return [like(self.strength, tensor), like(self.l1, tensor)]


def _flattened(target: Tensor, strength: Tensor) -> Tensor:
    """Return argmin_U 1/2 |U - V|^2 + strength sum |U_j+1 - U_j| of each row, by Newton's method on the dual.

    U = V - D'Z with |Z| <= strength. Between jumps, where |Z| is the strength, U is the mean of what is left: a Newton
    step is a sum over runs. The step is cut to the box and halved until the dual falls enough (Bertsekas 1982).
    """
    flat = target.clone()
    going = torch.arange(len(target), device=target.device)[(strength > 0)[:, 0]] if target.shape[1] > 1 else ()
    z = torch.zeros_like(target[:, 1:])
    for _ in range(ITERATIONS):
        if not len(going):
            break
        v, at, most = target[going], z[going], strength[going]
        tiny = target.shape[1] * torch.finfo(v.dtype).eps * (v.abs().amax(1, keepdim=True) + most)
        point = _primal(v, at)
        jump = point.diff(dim=1)
        stays = ((at >= most) & (jump >= -tiny)) | ((at <= -most) & (jump <= tiny))
        aim, flat[going] = _runs(v, at, stays)
        value, size = point.square().sum(1, keepdim=True) / 2, torch.ones_like(most)
        while True:
            tried = torch.where(stays, at, (at + size * (aim - at)).clamp(-most, most))
            gain = (jump * (tried - at)).sum(1, keepdim=True)
            worse = value - _primal(v, tried).square().sum(1, keepdim=True) / 2 < ENOUGH * gain
            if not bool((worse := worse & (size > SHORTEST)).any()):
                break
            size = torch.where(worse, size / 2, size)
        z[going] = tried
        inside = (aim.abs() <= most + tiny).all(1)
        held = ~(stays & (aim.sign() * flat[going].diff(dim=1) < -tiny)).any(1)  # an end jumps the way of its bound
        going = going[~(inside & held)]
    return flat


def _primal(target: Tensor, z: Tensor) -> Tensor:
    """Return V - D'Z."""
    return target + torch.nn.functional.pad(z, (0, 1)) - torch.nn.functional.pad(z, (1, 0))


def _runs(target: Tensor, z: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return Z and U = V - D'Z for which U is constant between the jumps that are its `ends`, where Z stays."""
    run = torch.nn.functional.pad(ends.long().cumsum(1), (1, 0))
    left = _primal(target, torch.where(ends, z, 0.0))
    sums = torch.zeros_like(target).scatter_add_(1, run, left)
    counts = torch.zeros_like(target).scatter_add_(1, run, torch.ones_like(target))
    mean = (sums / counts.clamp_min(1)).gather(1, run)
    inner = (mean - left).cumsum(1)[:, :-1]  # the sum of a run is zero: no jump carries it on
    return torch.where(ends, z, inner), mean
