"""The penalties: each owns all the mathematics of its term, so that solvers and certificates know only these verbs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from itertools import combinations
from math import inf
from typing import Self

import torch
from torch import Tensor

from convexprune.errors import ProblemError
from convexprune.fused import fused, number_like

SWEEPS = 100  # of the cyclic updates in the prox for n:m, as in ProxSparse's code
SWEPT = 1e-6  # an update smaller than this share of the largest entry ends them


class AbstractPenalty(ABC):
    """A closed function of the weight V [m n], separable over its entries or groups of them, with p(V) >= p(0) = 0.

    It is convex unless its class says that it is not: the bounds that follow from the conjugate hold either way, but
    they can only be tight for a convex one.
    """

    @abstractmethod
    def values(self, weight: Tensor) -> Tensor:
        """p of each row [m]."""

    @abstractmethod
    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """argmin_U 1/2 |U - V|^2 + step p(U), written into `out` if given (which may be `weight` itself)."""

    @abstractmethod
    def conjugate(self, slope: Tensor) -> Tensor:
        """p*(S) = max_V <S, V> - p(V) of each row [m], for slopes in its domain."""

    @abstractmethod
    def project(self, slope: Tensor) -> Tensor:
        """The point nearest to S [m n] where the conjugate is finite."""

    @abstractmethod
    def dual_scale(self, slope: Tensor) -> Tensor:
        """The largest s_i for which the conjugate of each row s_i S_i is finite [m]; may be inf."""

    @abstractmethod
    def scaled(self, scale: Tensor) -> "AbstractPenalty":
        """The same function of U = V * scale, scale [n] positive."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same function for weights of another dtype."""


@dataclass(frozen=True, eq=False)
class L1(AbstractPenalty):
    """sum_ij strength_ij |V_ij| with non-negative strengths that broadcast to [m n].

    `strength * sqrt(H_jj)` makes a penalty that does not depend on the scale of the inputs. A strength of zero leaves
    an entry free. Not `checked` is for who makes strengths in a loop, where looking at them stops a GPU.

    Raises:
        ProblemError: a strength is negative or not finite.
    """

    strength: float | Tensor
    checked: InitVar[bool] = True

    def __post_init__(self, checked: bool) -> None:
        if not checked:
            return
        least, largest = torch.as_tensor(self.strength).aminmax()  # NaN if there is one
        if not (least >= 0 and largest < inf):
            raise ProblemError("A strength of the L1 penalty is negative or not finite; strengths lie in [0, inf).")

    def values(self, weight: Tensor) -> Tensor:
        return (weight.abs() * self.strength).sum(1)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """Soft thresholding, sign(V) (|V| - step strength)_+."""
        return _shrink(weight, self._like(weight), number_like(step, weight), out)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Zero on its domain, the box |S_ij| <= strength_ij."""
        return slope.new_zeros(slope.shape[0])

    def project(self, slope: Tensor) -> Tensor:
        return torch.clamp(slope, -self._like(slope), self._like(slope))

    def dual_scale(self, slope: Tensor) -> Tensor:
        ratio = self._like(slope) / slope.abs()
        return ratio.nan_to_num_(nan=inf, posinf=inf).amin(1)  # 0 / 0: no slope is too large

    def scaled(self, scale: Tensor) -> "L1":
        return L1(self.strength / scale, checked=False)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.strength.to(dtype), False) if isinstance(self.strength, Tensor) else self

    def _like(self, slope: Tensor) -> Tensor:
        return torch.as_tensor(self.strength, dtype=slope.dtype, device=slope.device)


@fused
def _shrink(weight: Tensor, strength: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    """sign(V) (|V| - step strength)_+."""
    return torch.copysign(weight.abs().addcmul_(strength, step, value=-1).clamp_min_(0), weight, out=out)


@dataclass(frozen=True, eq=False)
class Support(AbstractPenalty):
    """Infinite for a non-zero outside `mask` [m n], else zero: the values are free, their places are fixed."""

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ProblemError(f"The mask of a support is {self.mask.dtype}; it must be boolean, true where V is free.")

    def values(self, weight: Tensor) -> Tensor:
        outside = ((weight != 0) & ~self.mask).any(1)
        return torch.where(outside, inf, 0.0).to(weight.dtype)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """V on the support, zero elsewhere."""
        return torch.mul(weight, self.mask, out=out)

    def conjugate(self, slope: Tensor) -> Tensor:
        """Zero on its domain: slopes that vanish on the support."""
        return slope.new_zeros(slope.shape[0])

    def project(self, slope: Tensor) -> Tensor:
        return slope * ~self.mask

    def dual_scale(self, slope: Tensor) -> Tensor:
        inside = ((slope != 0) & self.mask).any(1)
        return torch.where(inside, 0.0, inf).to(slope.dtype)

    def scaled(self, scale: Tensor) -> "Support":
        return self

    def to(self, dtype: torch.dtype) -> Self:
        return self


@dataclass(frozen=True, eq=False)
class ReverseHuber(AbstractPenalty):
    """What non-zeros cost once they may be fractions: linear near zero, a parabola beyond (the perspective penalty).

        p(V) = sum_ij min_{0 <= z <= 1} B_ij V_ij^2 / 2 z + mu_ij z
             = sum_ij  sqrt(2 mu B) |V|     if |V| <= sqrt(2 mu / B),     else  B V^2 / 2 + mu

    the largest convex function below B V^2 / 2 + mu [V != 0], with `curvature` B positive and `price` mu non-negative,
    both of a shape that broadcasts to [m n] (Dong, Chen and Linderoth 2015, arXiv 1510.06083).

    Raises:
        ProblemError: a curvature is not positive, a price is negative, or one of them is not finite.
    """

    curvature: Tensor
    price: Tensor

    def __post_init__(self) -> None:
        if not bool(((self.curvature > 0) & (self.curvature < inf)).all()):
            raise ProblemError("A curvature of the reverse Huber penalty is not in (0, inf).")
        if not bool(((self.price >= 0) & (self.price < inf)).all()):
            raise ProblemError("A price of the reverse Huber penalty is not in [0, inf).")

    @property
    def slope(self) -> Tensor:
        """sqrt(2 mu B): the price of a small weight, per unit."""
        return (2 * self.price * self.curvature).sqrt()

    def values(self, weight: Tensor) -> Tensor:
        size = weight.abs()
        beyond = (size - self.slope / self.curvature).clamp_min(0)
        return (self.slope * size + self.curvature / 2 * beyond.square()).sum(1)

    def prox(self, weight: Tensor, step: float, out: Tensor | None = None) -> Tensor:
        """sign(V) times the lesser of (|V| - step slope)_+ and |V| / (1 + step B)."""
        size = weight.abs()
        soft = (size - step * self.slope).clamp_min_(0)
        return torch.copysign(torch.minimum(soft, size.div_(1 + step * self.curvature)), weight, out=out)

    def conjugate(self, slope: Tensor) -> Tensor:
        """sum_j (S_ij^2 / 2 B_ij - mu_ij)_+, finite everywhere."""
        return (slope.square() / (2 * self.curvature) - self.price).clamp_min(0).sum(1)

    def project(self, slope: Tensor) -> Tensor:
        return slope

    def dual_scale(self, slope: Tensor) -> Tensor:
        return torch.full_like(slope[:, 0], inf)

    def scaled(self, scale: Tensor) -> "ReverseHuber":
        return ReverseHuber(self.curvature / scale.square(), self.price)

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.curvature.to(dtype), self.price.to(dtype))


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
        ProblemError: the strength or a weight is negative or not finite.
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
        of these is the minimiser is an observation (tests/test_group_products.py), not a theorem.
        """
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
