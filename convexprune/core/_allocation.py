"""Allocate a global sparsity to the parts of a model: an exact convex allocation, and published rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

from convexprune.errors import PatternError

OWL_REACH = 0.08  # of OWL's layers: its lambda
OUTLIER = 5  # times the mean score; OWL's M


@dataclass(frozen=True)
class Curve:
    """The cost of pruning a unit at several sparsities."""

    size: int
    sparsities: tuple[float, ...]
    costs: tuple[float, ...]  # that add up over units of the model: errors times their effect on the loss

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.sparsities))
        if len(self.sparsities) != len(self.costs) or not self.sparsities or not ascending or self.size < 1:
            raise PatternError(
                f"A curve of {self.size} weights with sparsities {self.sparsities} and costs {self.costs}: it needs "
                "one or more weights, ascending sparsities, and as many costs."
            )

    @property
    def envelope(self) -> "Curve":
        """Return the largest convex function below the points, by corners (Andrew's monotone chain)."""
        hull: list[tuple[float, float]] = []
        for x, y in zip(self.sparsities, self.costs, strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (x, y)):
                hull.pop()
            hull.append((x, y))
        return Curve(self.size, tuple(x for x, _ in hull), tuple(y for _, y in hull))

    def refined(self, times: int) -> "Curve":
        """Add points, so that costs between two points are exponentials of the share; on a line at a cost of zero."""
        xs, ys = list(self.sparsities[:1]), list(self.costs[:1])
        points = list(zip(self.sparsities, self.costs, strict=True))
        for (x, a), (y, b) in pairwise(points):
            for part in (number / times for number in range(1, times)):
                xs.append(x + part * (y - x))
                ys.append(a ** (1 - part) * b**part if a > 0 and b > 0 else a + part * (b - a))
            xs.append(y)
            ys.append(b)
        return Curve(self.size, tuple(xs), tuple(ys))

    def cost(self, sparsity: float) -> float:
        """The cost at a `sparsity`, linear between two points."""
        return float(np.interp(sparsity, self.sparsities, self.costs))


@dataclass(frozen=True)
class SparsityAllocation:
    sparsities: tuple[float, ...]
    cost: float
    gap: float  # cost - gap is a lower bound for any allocation


def allocate(curves: Sequence[Curve], sparsity: float) -> SparsityAllocation:
    """Return the cheapest allocation of a sparsity to units: the exact solution of a convex problem.

        min sum_u c_u(s_u) subject to sum_u size_u s_u = sparsity sum_u size_u

    with c_u the curves' convex envelopes. The envelopes are piecewise linear and convex, so the cheapest pieces per
    zero are taken first until there are enough zeros; the slope of the last piece is the multiplier l, and weak duality
    gives the gap:

        min >= sum_u min_s (c_u(s) - l size_u s) + l zeros
    """
    envelopes = [curve.envelope for curve in curves]
    found = [curve.sparsities[0] for curve in envelopes]
    total = sum(curve.size for curve in envelopes)
    least = sum(c.size * c.sparsities[0] for c in envelopes) / total
    most = sum(c.size * c.sparsities[-1] for c in envelopes) / total
    if not least - 1e-12 <= sparsity <= most + 1e-12:
        raise PatternError(f"Sparsity {sparsity} cannot be allocated: the units reach from {least:.4f} to {most:.4f}.")
    pieces = sorted(
        (_slope((c.sparsities[i], c.costs[i]), (c.sparsities[i + 1], c.costs[i + 1])) / c.size, u, i)
        for u, c in enumerate(envelopes)
        for i in range(len(c.sparsities) - 1)
    )
    missing, multiplier = sparsity * total - least * total, 0.0
    for slope, u, i in pieces:
        if missing <= 1e-9 * total:
            break
        curve, multiplier = envelopes[u], slope
        room = curve.size * (curve.sparsities[i + 1] - curve.sparsities[i])
        found[u] = curve.sparsities[i + 1] if room <= missing else found[u] + missing / curve.size
        missing -= room
    zeros = sum(c.size * s for c, s in zip(envelopes, found, strict=True))
    cost = sum(c.cost(s) for c, s in zip(envelopes, found, strict=True))
    bound = multiplier * zeros + sum(
        min(cost - multiplier * c.size * s for s, cost in zip(c.sparsities, c.costs, strict=True)) for c in envelopes
    )
    return SparsityAllocation(tuple(found), cost, max(0.0, cost - bound))


Option = tuple[int, float]
"""A size, and a cost."""


def choose(units: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """Choose an option for every unit: the least total cost within a budget of size.

    The multiple-choice knapsack problem, by branch and bound (HiGHS). No other option of a single unit is cheaper and
    still fits. Beside the number of every unit's option, a lower bound on the cost of any choice is returned.
    """
    owners = np.repeat(np.arange(len(units)), [len(options) for options in units])
    sizes, costs = np.array([option for options in units for option in options]).T
    scale, limit = float(costs.max()) or 1.0, budget
    one_each = LinearConstraint((owners == np.arange(len(units))[:, None]).astype(float), 1, 1)
    while True:
        within = LinearConstraint(sizes[None], ub=limit)
        found: Any = milp(costs / scale, integrality=1, bounds=(0, 1), constraints=[one_each, within])
        if found.x is None:
            raise PatternError(f"No choice of sizes comes to {budget:,} or less.")
        chosen = [int(found.x[owners == unit].argmax()) for unit in range(len(units))]
        left = budget - sum(options[k][0] for options, k in zip(units, chosen, strict=True))
        if left >= 0:  # the solver's sums are floating point
            return _filled(units, chosen, left), found.mip_dual_bound * scale
        limit += left


def cheapest_points(curves: Sequence[Curve], sparsity: float) -> list[float]:
    """Return a point of every curve: the cheapest with a `sparsity` of the whole, or the least above (for N:M)."""
    units = [[(round(c.size * (1 - s)), cost) for s, cost in zip(c.sparsities, c.costs, strict=True)] for c in curves]
    chosen, _ = choose(units, round(sum(c.size for c in curves) * (1 - sparsity)))
    return [curve.sparsities[k] for curve, k in zip(curves, chosen, strict=True)]


def _filled(units: Sequence[Sequence[Option]], chosen: list[int], left: int) -> list[int]:
    """Take better options for single units, the best first, as long as what is `left` of the budget allows."""
    while True:
        better = [
            (options[k][1] - options[chosen[unit]][1], unit, k, options[k][0] - options[chosen[unit]][0])
            for unit, options in enumerate(units)
            for k in range(len(options))
        ]
        cost, unit, k, size = min((each for each in better if each[3] <= left), default=(0.0, 0, 0, 0))
        if cost >= 0:
            return chosen
        chosen[unit], left = k, left - size


def allocate_by_outliers(
    statistics: Sequence[float], sizes: Sequence[int], sparsity: float, reach: float = OWL_REACH
) -> list[float]:
    """Return sparsities that fall linearly with a statistic of the layer, over a range of 2 `reach`.

    The rule of OWL (Yin et al., arXiv 2310.05175; luuyin/OWL, main.py), whose statistic is the fraction of outliers.
    Here the mean is weighted by the layers' sizes, so that the global sparsity is exact.
    """
    low, high = min(statistics), max(statistics)
    shifts = [2 * reach * (s - low) / (high - low) if high > low else 0.0 for s in statistics]
    middle = sum(shift * size for shift, size in zip(shifts, sizes, strict=True)) / sum(sizes)
    found = [sparsity - (shift - middle) for shift in shifts]
    if not all(0 <= s < 1 for s in found):
        raise PatternError(f"Sparsity {sparsity} with a reach of {reach} gives layers outside [0, 1): lower the reach.")
    return found


def allocate_by_skewness(statistics: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Return sparsities whose kept fractions follow the softmax of a statistic of the layer.

        kept_l = min(1, c exp(statistic_l)),   c such that sum_l size_l kept_l = (1 - sparsity) sum_l size_l

    A reconstruction of AutoPrune's allocation (Kang et al., arXiv 2511.15390), whose statistic is the skewness of a
    layer's absolute weights: summaries say only that a softmax protects skewed layers. The proportional kept fractions,
    the temperature of 1, the weighing by size and the limit of 1 are ours.
    """
    largest = max(statistics)
    weights = [exp(statistic - largest) for statistic in statistics]
    kept, missing = [1.0] * len(weights), (1 - sparsity) * sum(sizes)
    rest = sorted(range(len(weights)), key=lambda u: -weights[u])
    unit = 0.0
    while rest and (unit := missing / sum(sizes[u] * weights[u] for u in rest)) * weights[rest[0]] > 1:
        missing -= sizes[rest.pop(0)]
    for u in rest:
        kept[u] = unit * weights[u]
    if min(kept) < 1e-6:
        raise PatternError(f"Sparsity {sparsity} leaves nothing of the least skewed layers: take another allocation.")
    return [1 - fraction for fraction in kept]


def share_of_outliers(scores: Tensor) -> float:
    """Return OWL's statistic of a layer: the share of scores |W_ij| |x_j| above `OUTLIER` times their mean."""
    return float((scores > OUTLIER * scores.mean()).float().mean())


def sums_of_powers(weight: Tensor) -> Tensor:
    """Return sum |W_ij|^k, k = 0 to 3 [4], for `skewness`, to be added up over the weights of a layer."""
    sizes = weight.abs().double()
    return torch.stack([sizes.pow(k).sum() for k in range(4)]).cpu()


def skewness(powers: Tensor) -> float:
    """Return the third central moment of absolute weights over the variance to the power of 3/2; 0 if all are alike."""
    count, first, second, third = powers.tolist()
    first, second, third = first / count, second / count, third / count
    variance = second - first**2
    if variance <= 1e-12 * second:  # nothing but rounding
        return 0.0
    return (third - 3 * first * second + 2 * first**3) / variance**1.5


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
