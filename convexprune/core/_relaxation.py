"""The perspective relaxation of pruning: a convex problem in which a weight may be kept by a fraction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.kernels import fused
from convexprune._device.precision import bare_product
from convexprune._device.select import kth_smallest
from convexprune.constraints import Budget
from convexprune.core._quadratic import Quadratic

STEPS = 3  # of Newton's method, to the price of a non-zero
STEP = 0.25  # the longest


@dataclass(frozen=True, eq=False)
class Relaxed:
    """An iterate of `relax`.

    Args:
        point: V [m n], near the minimum.
        weight: the copy of V on which the perspective acts.
        fraction: z [m n] in [0, 1].
        dual: the sum of the differences between point and weight [m n].
        price: the logarithm of the price of a non-zero unit [lines 1]; None before the first iteration.
    """

    point: Tensor
    weight: Tensor
    fraction: Tensor
    dual: Tensor
    price: Tensor | None = None

    @classmethod
    def at(cls, weight: Tensor) -> "Relaxed":
        """The first iterate, at a `weight` [m n]."""
        return cls(weight, weight, torch.ones_like(weight), torch.zeros_like(weight))

    def moved(self, before: Tensor, split: Tensor) -> "Relaxed":
        """Return the iterate for a new split: B * dual stays.

        Args:
            before: the split B so far [m n].
        """
        return Relaxed(self.point, self.weight, self.fraction, self.dual * before / split, self.price)

    @property
    def cost(self) -> Tensor:
        """The price of a non-zero [lines 1]; known from the first iteration on."""
        assert self.price is not None
        return self.price.exp()

    @property
    def gain(self) -> Tensor:
        """V^2 (1 / z - 1) / 2 [m n]: the derivative of the relaxed value by the split."""
        return torch.where(self.fraction > 0, self.weight.square() * (1 / self.fraction.clamp_min(1e-9) - 1) / 2, 0.0)


def relax(
    q: Quadratic, inverse: Tensor, split: Tensor, start: Relaxed, budget: Budget, kept: Tensor, iterations: int
) -> Relaxed:
    """Minimise  q(V) + 1/2 sum_ij B_ij V_ij^2 (1 / z_u(ij) - 1)  over V and 0 <= z <= 1, in a line sum z_u <= kept.

    u(ij) is the unit of an entry: the entry, or the columns chosen with it (`Budget`). ADMM between q - 1/2 B V^2 and
    the perspective 1/2 B V^2 / z, in the metric B: as (H - B) + B = H, the inverse of H serves every split of every
    row. B is near the metric of Optimal Brain Surgeon, 1 / [H^-1]_jj, in which thirty iterations reach as far as three
    thousand of accelerated proximal gradient (lab/tried.md). The price of a non-zero is computed inside the prox, by
    Newton's method.

    Args:
        q: the quadratic of weights [m n].
        inverse: H^-1 [n n], or for quadratics side by side [e n n].
        split: B [m n].
        kept: the number of non-zero units allowed per line [lines 1].
    """
    weight, dual, price, point, fraction = start.weight, start.dual, start.price, start.point, start.fraction
    root = (split / 2).sqrt()
    for _ in range(iterations):
        middle = weight - dual
        point = middle + bare_product(_gradient(q.residual(middle), split, middle), inverse)
        target, scores = _target(point, dual, root)
        scores = budget.norms(scores)
        price = _price(scores, kept, price)
        fraction = budget.spread(fractions(scores, price), weight.shape)
        weight, dual = _parted(target, fraction)
    return Relaxed(point, weight, fraction, dual, price)


@fused
def _gradient(residual: Tensor, split: Tensor, weight: Tensor) -> Tensor:
    """K + B V."""
    return residual + split * weight


@fused
def _target(point: Tensor, dual: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point of the perspective's prox, and the scores that the price decides."""
    target = point + dual
    return target, target.abs() * root


@fused
def _parted(target: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight with the least perspective at a fraction, and the remainder of the target."""
    weight = target * fraction / (1 + fraction)
    return weight, target - weight


@fused
def fractions(scores: Tensor, price: Tensor) -> Tensor:
    """Return the fraction z in [0, 1] of every unit at a price.

    Args:
        scores: the norm of V sqrt(B / 2) over the unit [lines width].
        price: the logarithm of the price [lines 1].

    Returns:
        z [lines width].
    """
    return (scores * (price / -2).exp() - 1).clamp_(0, 1)


def _price(scores: Tensor, kept: Tensor, price: Tensor | None) -> Tensor:
    """Return the logarithm of the price at which the fractions of a line sum to `kept` [lines 1], by Newton's method.

    The variable is the logarithm of the unit exp(-price / 2). The slope of the sum comes from scores whose fraction is
    neither 0 nor 1. A score stays among them for log 2, so shorter steps hardly turn in circles. The next iteration of
    ADMM goes on from the last of the few steps; an inexact price makes the bound looser, never wrong.
    """
    if price is None:  # with a unit at the k-th largest score less than k are kept, with twice that k or more
        k = min(max(int(kept.max()), 1), scores.shape[1])
        unit = kth_smallest(scores, scores.shape[1] + 1 - k).clamp_min(1e-150).reciprocal()
        steps = 2 * STEPS
    else:
        unit, steps = _unit(price), STEPS
    target = kept + scores.shape[1]
    for _ in range(steps):
        unit = _nearer(scores, unit, target)
    return _log_price(unit)


@fused
def _unit(price: Tensor) -> Tensor:
    return (price / -2).exp()


@fused
def _log_price(unit: Tensor) -> Tensor:
    return unit.log() * -2


@fused
def _nearer(scores: Tensor, unit: Tensor, target: Tensor) -> Tensor:
    """The unit [lines 1] after a step of Newton's method, where the limited scores are to sum to the `target`."""
    level = scores * unit
    limited = level.clamp(1, 2)  # one more than the fraction
    slope = (level * (level == limited)).sum(1, keepdim=True)
    missing = (target - limited.sum(1, keepdim=True)) / slope
    return unit * missing.nan_to_num_(0.0).clamp_(-STEP, STEP).exp_()  # 0 / 0: it is there
