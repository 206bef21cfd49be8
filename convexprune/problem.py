"""The abstract layer-wise problem, and the certificate of any answer to it."""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from convexprune.errors import ProblemError
from convexprune.penalty import AbstractPenalty
from convexprune.quadratic import Quadratic


@dataclass(frozen=True, eq=False)
class Problem:
    """min_V q(V) + p(V) over weights V [m n]."""

    quadratic: Quadratic
    penalty: AbstractPenalty

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the operator."""
        return self.quadratic.shape

    def value(self, weight: Tensor) -> float:
        """The objective at `weight`."""
        return float((self.quadratic.values(weight) + self.penalty.values(weight)).sum())

    def check(self, weight: Tensor) -> None:
        """Refuse a weight of another shape.

        Raises:
            ProblemError: `weight` is not [m n].
        """
        if tuple(weight.shape) != self.shape:
            raise ProblemError(f"The weight is {list(weight.shape)}; this problem needs {list(self.shape)}.")


@dataclass(frozen=True)
class Certificate:
    """How far a weight is from optimal: `primal` - `gap` <= min_V q + p <= `primal`.

    `kkt_residual` is the largest violation of the optimality conditions, free of units (see `certify`). What is not
    defined or, in a certificate that is not precise, not computed is inf.
    """

    primal: float
    gap: float
    kkt_residual: float

    @property
    def dual(self) -> float:
        """A lower bound on the optimal value."""
        return self.primal - self.gap if isfinite(self.primal) else -inf

    @property
    def relative_gap(self) -> float:
        """gap / primal; zero when both are."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.primal if self.primal > 0 and isfinite(self.primal) else inf


def row_gaps(problem: Problem, weight: Tensor, residual: Tensor, values: Tensor, slack: Tensor) -> Tensor:
    """The duality gap of each row [m] from the residual K [m n], q [m] (`values`) and p [m] (`slack`) at `weight`.

    By Fenchel-Young, for any dual slope S where p* is finite, with c(S) the price of S not being K:

        q + p - min (q + p)  <=  p(V) + p*(S) - <S, V> + c(S)

    Two choices of S are tried, and for each row the smaller bound stands:

        scaling   S = s K,        c = (1 - s)^2 q              (the residual scaled into the dual ball, as celer does)
        clipping  S = project(K), c = 1/2 (K - S) H^-1 (K - S)'  (the tighter one; only if H is positive definite or
                  K is in the domain anyway)

    All terms are non-negative sums, so nothing cancels near the optimum.
    """
    quadratic, penalty = problem.quadratic, problem.penalty
    overlap = torch.linalg.vecdot(residual, weight)
    best = torch.where(values > 0, 1 + overlap / (2 * values), 1.0)  # unconstrained best s: <r, y> / <r, r>
    s = torch.minimum(penalty.dual_scale(residual), best.clamp_min(0))
    gaps = (1 - s).square() * values + slack + penalty.conjugate(s[:, None] * residual) - s * overlap
    slope = penalty.project(residual)
    excess = residual - slope
    clipping = quadratic.inverse_form(excess) + slack + penalty.conjugate(slope) - torch.linalg.vecdot(slope, weight)
    gaps = torch.minimum(gaps, clipping)
    return gaps.clamp_min(0)


@torch.no_grad()
def certify(problem: Problem, weight: Tensor, precise: bool = True, residual: Tensor | None = None) -> Certificate:
    """Bound how far `weight` [m n] is from optimal, whoever found it.

    Only gram, cross and energy (about the anchor) are used, in float64 if `precise`: neither the calibration inputs
    nor the solver have to be trusted. If not `precise`, the `residual` at `weight` saves a product where it is known.
    See `row_gaps` for the gap. The KKT residual is the largest entry of the proximal gradient step of length 1, in
    coordinates U = V sqrt(H_jj) and in units of the whole target,

        max_ij |U - prox_p(U + K)|_ij / sqrt(sum_i 2 q_i(0))

    Raises:
        ProblemError: `weight` is not shaped like the problem.
    """
    problem.check(weight)
    given = problem.quadratic
    if precise:
        problem, weight = Problem(problem.quadratic.double, problem.penalty.to(torch.float64)), weight.double()
    if precise or residual is None:
        residual = problem.quadratic.residual(weight)
    values = problem.quadratic.values(weight, residual)
    slack = problem.penalty.values(weight)
    primal = values + slack
    if not bool(primal.isfinite().all()):
        return Certificate(inf, inf, inf)
    gap = float(row_gaps(problem, weight, residual, values, slack).sum())
    if not precise:
        return Certificate(float(primal.sum()), gap, inf)
    scale = problem.quadratic.scale()
    point = weight * scale
    step = (point - problem.penalty.scaled(scale).prox(point + residual / scale, 1.0)).abs()
    largest, energy = float(step.max()), given.target_energy  # only a unit
    kkt = 0.0 if largest == 0 else largest / energy**0.5 if energy > 0 else inf
    return Certificate(float(primal.sum()), gap, kkt)
