"""The perspective relaxation of pruning: a weight may be kept by a fraction; and the diagonal split that states it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.kernels import fused
from convexprune._device.precision import bare_product
from convexprune._device.select import kth_smallest
from convexprune.constraints import Budget
from convexprune.core._quadratic import Quadratic
from convexprune.core._symmetric import cholesky

LEAST_LENGTH = 1e-6  # of a Newton step: shorter ones are not worth a factorisation
POWER_ITERATIONS = 20
POWER_STARTS = 4
FLOOR = 0.1  # of the barrier that keeps a split positive, to the one that keeps it below
STEPS = 3  # of Newton's method, to the price of a non-zero
STEP = 0.25  # the longest


def first_split(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the inverse of H [n n], and a split to begin with: 1 / [H^-1]_jj, shrunk until H - B is semidefinite.

    None if H is not positive definite by more than rounding.
    """
    factor = cholesky(_less(gram, torch.full_like(gram[0], rounding(gram))))
    if factor is None:
        return None
    inverse = torch.cholesky_inverse(factor)
    del factor
    root = inverse.diagonal().rsqrt()
    # Its largest eigenvalue is what 1 / [H^-1]_jj is too large by; a guess, for `safe_split` to prove.
    scaled = torch.outer(root, root).mul_(inverse).float()
    vectors = torch.randn(POWER_STARTS, len(gram), generator=torch.Generator().manual_seed(0)).to(scaled)
    for _ in range(POWER_ITERATIONS):
        vectors = vectors / vectors.norm(dim=1, keepdim=True) @ scaled  # rows: thin columns are slow on a CPU
    split = safe_split(gram, 0.95 * root.square()[None] / float(vectors.norm(dim=1).max()))[0]
    return (inverse, split) if bool((split > 0).all()) else None


def safe_split(gram: Tensor, split: Tensor) -> Tensor:
    """Return a split B [m n] shrunk, row by row, until a Cholesky factorisation proves H - B positive semidefinite."""
    distinct = split[:1] if split.stride(0) == 0 else split
    rows = []
    for row in distinct:
        shrink = 1.0
        while not is_below(gram, row * shrink):
            shrink = shrink * 0.999 if shrink > 0.9 else shrink * 0.5 if shrink > 1e-9 else 0.0
        rows.append(row * shrink)
    return torch.stack(rows).expand(split.shape)


def fit_split(gram: Tensor, split: Tensor, gain: Tensor, barrier: float) -> Tensor:
    """Return B after a Newton step on  <gain, B> + barrier (log det(H - B) + 1/10 sum log B).

    The gain [n] is the derivative of the relaxed value by B, and the barrier is in units of the mean of gain times B.
    The split stays if no step is feasible.
    """
    unit = gain.mean().clamp_min(torch.finfo(gain.dtype).tiny)
    gain, barrier = gain / unit, barrier * float((split * gain).mean() / unit)
    factor = cholesky(_less(gram, split))
    if factor is None:
        return split
    inverse = torch.cholesky_inverse(factor)
    gradient = gain - barrier * inverse.diagonal() + FLOOR * barrier / split
    del factor
    hessian = inverse.square_().mul_(barrier)
    hessian.diagonal().add_(barrier * FLOOR / split.square())
    factor = cholesky(hessian)
    if factor is None:
        return split
    move = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    shrinking = move < 0
    length = min(1.0, 0.9 * float((-split / move)[shrinking].min())) if bool(shrinking.any()) else 1.0
    while length > LEAST_LENGTH:
        if cholesky(_less(gram, split + length * move)) is not None:
            return split + (length if length == 1 else 0.9 * length) * move
        length *= 0.7
    return split


def rounding(gram: Tensor) -> float:
    """Bound the error of a Cholesky factorisation of H, as a multiple of the identity (Higham 2002, theorem 10.3)."""
    n = len(gram)
    return n * (n + 2) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())


def is_below(gram: Tensor, split: Tensor) -> bool:
    """Return True if a Cholesky factorisation proves H - B positive semidefinite."""
    return cholesky(_less(gram, split + rounding(gram))) is not None


def _less(gram: Tensor, diagonal: Tensor) -> Tensor:
    rest = gram.clone()
    rest.diagonal().sub_(diagonal)
    return rest


@dataclass(frozen=True, eq=False)
class Relaxed:
    """An iterate of `relax`."""

    point: Tensor  # V [m n], near the minimum
    weight: Tensor  # the copy of V on which the perspective acts
    fraction: Tensor  # z [m n] in [0, 1]
    dual: Tensor  # the sum of the differences between point and weight [m n]
    price: Tensor | None = None  # the logarithm of the price of a non-zero unit [lines 1]

    @classmethod
    def at(cls, weight: Tensor) -> "Relaxed":
        return cls(weight, weight, torch.ones_like(weight), torch.zeros_like(weight))

    def moved(self, before: Tensor, split: Tensor) -> "Relaxed":
        return Relaxed(self.point, self.weight, self.fraction, self.dual * before / split, self.price)

    @property
    def gain(self) -> Tensor:
        """Return V^2 (1 / z - 1) / 2 [m n]: the derivative of the relaxed value by the split."""
        return torch.where(self.fraction > 0, self.weight.square() * (1 / self.fraction.clamp_min(1e-9) - 1) / 2, 0.0)


def relax(
    q: Quadratic, inverse: Tensor, split: Tensor, start: Relaxed, budget: Budget, kept: Tensor, iterations: int
) -> Relaxed:
    """Minimise  q(V) + 1/2 sum_ij B_ij V_ij^2 (1 / z_u(ij) - 1)  over V and 0 <= z <= 1, in a line sum z_u <= kept.

    u(ij) is the unit of an entry: the entry, or the columns chosen with it (`Budget`). ADMM between q - 1/2 B V^2 and
    the perspective 1/2 B V^2 / z, in the metric B: as (H - B) + B = H, the inverse of H, [n n] or side by side [e n n],
    serves every split of every row. B is near the metric of Optimal Brain Surgeon, 1 / [H^-1]_jj, in which thirty
    iterations reach as far as three thousand of accelerated proximal gradient (lab/tried.md). The price of a non-zero
    is computed inside the prox, by Newton's method.
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
    """Return the fraction z in [0, 1] of every unit [lines width] at the logarithm of a price [lines 1].

    Scores are the norm of V sqrt(B / 2) over the unit [lines width].
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
