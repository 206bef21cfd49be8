"""The penalty for N:M patterns: products of the entries of a group, which are zero where few enough are not."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune.errors import ProblemError
from convexprune.penalty import AbstractPenalty, require_step

SWEEPS = 100  # of the cyclic updates in the prox for n:m, as in ProxSparse's code
SWEPT = 1e-6  # an update smaller than this share of the largest entry ends them


@dataclass(frozen=True, eq=False)
class GroupProducts(AbstractPenalty):
    """The penalty for n:m of Kuebler et al. (arXiv 2501.18015; also ProxSparse, arXiv 2502.00258): NOT convex.

    In every group of `group` consecutive entries, the sum of the products of any `kept` + 1 of them,

        p(V) = strength sum_groups e_{kept+1}(c_1 |V_1|, ..., c_m |V_m|),      for 2:4  |abc| + |abd| + |acd| + |bcd|,

    with weights c = `weights` [n] (None: 1). It vanishes where at most `kept` of a group are non-zero, so that unlike
    L1 it does not shrink what is kept. It is zero along every axis, so its conjugate is finite at zero only, and the
    one bound on the optimum is the least value of the quadratic alone: a certificate bounds what the penalty costs, and
    shows no point to be optimal. FISTA takes it by its prox, as a heuristic whose limit depends on the start.

    Raises:
        ProblemError: the strength is negative, a weight is not positive, or one of them is not finite.
    """

    kept: int
    group: int
    strength: float
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        weights = torch.ones(1) if self.weights is None else self.weights
        if not 0 <= self.strength < inf or not bool(((weights > 0) & (weights < inf)).all()):
            raise ProblemError("The strength of the n:m penalty must lie in [0, inf), its weights in (0, inf).")

    def values(self, weight: Tensor) -> Tensor:
        groups = (weight.abs() * self._like(weight)).view(len(weight), -1, self.group)
        return self.strength * _elementary(groups.unbind(-1), self.kept + 1).sum(1)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """The best of several in every group: its `kept` largest entries as they are, or a stationary point.

        The latter are found by cyclic updates from zero, the smallest entry first, each the best given the others,

            u_i = (|v_i| - step strength c_i e_kept(the others' c u))_+

        With equal weights one is enough, with others one for every support of more than `kept` entries. That the best
        of these is the minimiser is an observation (tests/property/test_group_products.py), not a theorem.
        """
        require_step(step)
        magnitude, order = weight.abs().view(-1, self.group).sort(dim=1, stable=True)
        weights = self._like(weight).expand_as(weight).reshape(-1, self.group).gather(1, order)
        best = magnitude.clone()
        best[:, : self.group - self.kept] = 0
        least = (magnitude - best).square().sum(1) / 2
        sizes = range(self.group if self.weights is None else self.kept + 1, self.group + 1)
        for support in (s for size in sizes for s in combinations(range(self.group), size)):
            allowed = torch.zeros(self.group, dtype=magnitude.dtype, device=magnitude.device)
            allowed[list(support)] = 1
            point = self._stationary(magnitude * allowed, weights, step)
            products = _elementary((point * weights).unbind(1), self.kept + 1)
            value = (magnitude - point).square().sum(1) / 2 + step * self.strength * products
            better = value < least
            best, least = torch.where(better[:, None], point, best), torch.where(better, value, least)
        return torch.copysign(torch.empty_like(best).scatter_(1, order, best).view_as(weight), weight, out=out)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Zero on its domain, the slope zero."""
        return slope.new_zeros(slope.shape[0])

    def project(self, slope: Tensor) -> Tensor:
        return torch.zeros_like(slope)

    def dual_scale(self, slope: Tensor) -> Tensor:
        return torch.where((slope != 0).any(1), 0.0, inf).to(slope.dtype)

    def scaled(self, scale: Tensor) -> "GroupProducts":
        return GroupProducts(self.kept, self.group, self.strength, self._like(scale) / scale)

    def to(self, dtype: torch.dtype) -> Self:
        weights = None if self.weights is None else self.weights.to(dtype)
        return type(self)(self.kept, self.group, self.strength, weights)

    def _like(self, weight: Tensor) -> Tensor:
        return weight.new_ones(weight.shape[-1]) if self.weights is None else self.weights.to(weight)

    def _stationary(self, magnitude: Tensor, weights: Tensor, step: float) -> Tensor:
        """Where the cyclic updates from zero end, for groups [groups group]; those that have settled are left alone."""
        settled = torch.zeros_like(magnitude)
        moving = torch.arange(len(magnitude), device=magnitude.device)
        point = settled.clone()
        for _ in range(SWEEPS):
            before = point.clone()
            for i in range(self.group):
                others = [point[:, j] * weights[:, j] for j in range(self.group) if j != i]
                pull = step * self.strength * weights[:, i] * _elementary(others, self.kept)
                point[:, i] = (magnitude[:, i] - pull).clamp_min(0)
            settled[moving] = point
            active = ((point - before).abs() > SWEPT * magnitude[:, -1:]).any(1)
            moving, point, magnitude, weights = moving[active], point[active], magnitude[active], weights[active]
            if not len(moving):
                break
        return settled


def _elementary(values: Sequence[Tensor], degree: int) -> Tensor:
    """The elementary symmetric polynomial of that degree: the sum of the products of any `degree` of the values."""
    sums = [torch.ones_like(values[0]), *(torch.zeros_like(values[0]) for _ in range(degree))]
    for value in values:
        for d in range(degree, 0, -1):
            sums[d] = sums[d] + value * sums[d - 1]
    return sums[degree]
