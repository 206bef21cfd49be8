"""The certificate of any answer to a problem, whoever found the answer."""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from convexprune._device.precision import certifies_in_parts
from convexprune.core._abstract_penalty import Elementwise
from convexprune.core._arrays import Array, Shown, require_type
from convexprune.core._group_lasso import GroupLasso
from convexprune.core._in_parts import InParts, Inverse
from convexprune.core._on_kept import gaps_on_kept
from convexprune.core._penalty import L1, Support
from convexprune.core._problem import Problem
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.core._sum_of_squares import UNKNOWN
from convexprune.core._symmetric import power_of_two, rounding_margin
from convexprune.core._total_variation import TotalVariation

EVEN = (L1, Support, GroupLasso, ReverseHuber)
"""Penalties whose conjugate does not fall as the entries of the dual point grow."""


@dataclass(frozen=True)
class Certificate(Shown):
    """The distance of a weight from the optimum: primal - gap <= min_V q + p <= primal, summed over rows.

    Values that are undefined or, in an imprecise certificate, not computed are inf. So is the gap of a problem whose
    tensors belong to no sum of squares: there is no least value, or none that the tensors determine.

    Args:
        primal: the objective at the weight.
        gap: the duality gap.
        kkt_residual: the largest violation of the optimality conditions, free of units (see `certify`).
        resolution: of the data: the epsilon of their dtype times the energy of the target.
        convex: the penalty is. If not, nothing bounds the least value, and the gap is inf.
    """

    primal: float
    gap: float
    kkt_residual: float
    resolution: float = 0.0
    convex: bool = True

    def facts(self) -> dict[str, str]:
        """Return the objective, how far it is from the least value at most, and the optimality conditions."""
        return {
            "objective": f"{self.primal:.6g}",
            "gap": (
                f"{self.gap:.2g}, {self.relative_gap:.2g} of the objective; no weight is below {self.dual:.6g}"
                if self.convex
                else "none: the penalty is not convex"
            ),
            "KKT residual": f"{self.kkt_residual:.2g}",
        }

    @property
    def dual(self) -> float:
        """A lower bound on the optimal value."""
        return self.primal - self.gap if isfinite(self.primal) else -inf

    @property
    def relative_gap(self) -> float:
        """gap / primal, or gap / resolution if the target is fitted to all digits of the data; zero without a gap."""
        unit = max(self.primal, self.resolution)
        if self.gap == 0:
            return 0.0
        return self.gap / unit if unit > 0 and isfinite(self.primal) else inf


def row_gaps(
    problem: Problem,
    weight: Tensor,
    residual: Tensor,
    values: Tensor,
    slack: Tensor,
    dear: bool = False,
    doubt: float = 0.0,
    near: bool = True,
) -> Tensor:
    """Return the duality gap of each row [m], at a weight V [m n] with residual K, values q [m] and slack p [m].

    By Fenchel-Young, for any dual point S where p* is finite, with c(S) the price of S not being K:

        q + p - min (q + p)  <=  p(V) + p*(S) - <S, V> + c(S)

    Three choices of S are tried, and for each row the smallest bound stands (for all rows together, if the penalty
    couples them):

        scaling      S = s K,          c = (1 - s)^2 q         (the residual scaled into the dual ball, as celer does)
        clipping     S = project(K),   c = 1/2 (K - S) H^-1 (K - S)'   (only if H is positive definite, or K is in the
                     domain anyway)
        subgradient  S in dp(V) nearest to K, with the same c: nothing else is left, so that it falls with the square of
                     the distance to the optimum, where clipping falls with the distance. Where a penalty knows none,
                     V + K - U at U = prox(V + K) is one at U, and p(V) - p(U) - <S, V - U> is left. Only for
                     `near` units: the rounding of V, which may be 1e12 times as large as K, is in it

    On a support the second and the third are one. All terms are non-negative sums, so nothing cancels near the optimum.
    What the energy's own rounding hides is added. Where H is not definite, or next to it, the scaling alone is left, or
    all are loose: `gaps_on_kept` has a choice for there, which takes a factor for each row. Of total variation, whose
    dual points add up to zero, `_gaps_level` has one.

    In doubt about H, the bounds hold for every sum of squares whose H is off by at most d in the spectral norm. Its K
    is off by at most d |V - A|, its q by d |V - A|^2 / 2. The scaling and the choice on kept entries
    allow for that where p is even, and p* grows with its entries. Elsewhere S is zero.
    """
    quadratic, penalty = problem.quadratic, problem.penalty
    if doubt:
        return _gaps_in_doubt(problem, weight, residual, values, slack, doubt)
    least = _least_sum if penalty.couples_rows else torch.minimum
    overlap = torch.linalg.vecdot(residual, weight)
    best = torch.where(values > 0, 1 + overlap / (2 * values), 1.0)  # unconstrained best s: <r, y> / <r, r>
    s = torch.minimum(penalty.dual_scale(residual), best.clamp_min(0))
    price = quadratic.scaled_price(values, s)
    gaps = price + (slack + penalty.conjugate(s[:, None] * residual) - s * overlap).clamp_min(0)
    dual = penalty.project(residual)
    rest = (slack + penalty.conjugate(dual) - torch.linalg.vecdot(dual, weight)).clamp_min(0)
    gaps = least(gaps, quadratic.inverse_form(residual - dual) + rest)
    dual = penalty.subgradient(weight, residual)
    if dual is not None:
        gaps = least(gaps, quadratic.inverse_form(residual - dual))
    elif near and not isinstance(penalty, Elementwise):  # of a sum over entries that is the clipping
        ahead = penalty.forward_backward(weight, residual, 1.0)
        dual = weight + residual - ahead
        rest = slack - penalty.values(ahead) - torch.linalg.vecdot(dual, weight - ahead)
        rest = rest.mean().expand_as(rest) if penalty.couples_rows else rest
        gaps = least(gaps, quadratic.inverse_form(residual - dual) + rest.clamp_min(0))
    if isinstance(penalty, TotalVariation) and not quadratic.is_well_conditioned:
        gaps = torch.minimum(gaps, _gaps_level(quadratic, penalty, weight, residual, values, slack))
    if dear and not quadratic.is_well_conditioned:
        gaps = least(gaps, gaps_on_kept(quadratic, penalty, weight, residual, values, slack))
    return gaps + quadratic.rounding


def _gaps_level(
    quadratic: Quadratic, penalty: TotalVariation, weight: Tensor, residual: Tensor, values: Tensor, slack: Tensor
) -> Tensor:
    """Price s (K - y H) as `gaps_on_kept` does, of the y that is alike in all columns and brings the sum to zero."""
    along = quadratic.gram.sum(0)
    total = along.sum()
    step = torch.where(total > 0, residual.sum(1) / total, 0.0)
    point = residual - step[:, None] * along
    s = penalty.dual_scale(point).clamp_max(1)
    price = step.square() * (total + len(along) * rounding_margin(quadratic.gram)) / 2
    cost = (1 - s) * (values + quadratic.rounding).sqrt() + s * price.sqrt()
    return (slack - s * torch.linalg.vecdot(point, weight)).clamp_min(0) + cost.square()


def _gaps_in_doubt(
    problem: Problem, weight: Tensor, residual: Tensor, values: Tensor, slack: Tensor, doubt: float
) -> Tensor:
    """Return gaps [m] that hold for every sum of squares whose H is off by at most `doubt`; see `row_gaps`."""
    quadratic, penalty = problem.quadratic, problem.penalty
    length = torch.linalg.vector_norm(quadratic.displacement(weight), dim=1)
    far = residual + torch.copysign((doubt * length)[:, None], residual)
    overlap = torch.linalg.vecdot(residual, weight) - doubt * length * torch.linalg.vector_norm(weight, dim=1)
    misfit = values + doubt * length.square() / 2
    if not isinstance(penalty, EVEN):
        return quadratic.scaled_price(misfit, torch.zeros_like(misfit)) + slack + quadratic.rounding
    gaps, largest = gaps_on_kept(quadratic, penalty, weight, residual, values, slack, doubt), penalty.dual_scale(far)
    best = torch.where(misfit > 0, 1 + overlap / (2 * misfit), 1.0)
    for s in (torch.minimum(largest, best.clamp_min(0)), largest.clamp_max(1)):
        rest = (slack + penalty.conjugate(s[:, None] * far) - s * overlap).clamp_min(0)
        scaled = quadratic.scaled_price(misfit, s) + rest
        gaps = _least_sum(gaps, scaled) if penalty.couples_rows else torch.minimum(gaps, scaled)
    return gaps + quadratic.rounding


def _least_sum(gaps: Tensor, others: Tensor) -> Tensor:
    """Return the bound [m] with the smaller sum: a single dual point serves all rows."""
    return torch.where(others.sum() < gaps.sum(), others, gaps)


@torch.no_grad()
def certify(problem: Problem, weight: Array, precise: bool = True, residual: Tensor | None = None) -> Certificate:
    """Bound how far a weight is from optimal, whoever found it.

    Only gram, cross and energy (about the anchor) are used: neither the calibration inputs nor the solver have to be
    trusted. See `row_gaps` for the gap. The KKT residual is the largest entry of the proximal gradient step of length
    one, in coordinates U = V sqrt(H_jj) and in units of the whole target,

        max_ij |U - prox_p(U + K)|_ij / sqrt(sum_i 2 q_i(0))

    Args:
        problem: min q + p.
        weight: V [m n].
        precise: compute in float64, in coordinates where the Gram matrix has a diagonal near one, so that units make no
            difference; else in the problem's own dtype, without the KKT residual, and for the tensors as they are:
            with no regard to what rounding hides in a singular Gram matrix.
        residual: of q at `weight` [m n]. It saves a product if the certificate is not precise.

    Returns:
        The certificate.
    """
    require_type(problem, Problem)
    return certify_each(problem, problem.admit(weight), precise, residual)[0]


@torch.no_grad()
def certify_each(
    problem: Problem, weight: Tensor, precise: bool = True, residual: Tensor | None = None
) -> list[Certificate]:
    """Return the certificates, as of `certify`, of problems side by side, or of a single problem.

    Regular problems are certified together. If a problem is irregular (a value that is not finite, a singular H,
    certificates without float64), problems are certified singly.
    """
    found, given = _certified(problem, weight, precise, residual), problem.quadratic
    if found is not None:
        return found
    alone = [(Problem(q, problem.penalty.rows(rows)), rows) for q, rows in zip(given.blocks, given.parts, strict=True)]
    return [certify(each, weight[rows], precise) for each, rows in alone]


def _certified(problem: Problem, point: Tensor, precise: bool, residual: Tensor | None) -> list[Certificate] | None:
    """Certify a problem, or regular problems together; None where one of several is not regular."""
    given, many, consistent, ratio = problem.quadratic, len(problem.quadratic.parts) > 1, None, 1.0
    if precise:
        quadratic, free = given.unit_free
        unit = problem.penalty.units(free)
        if unit is not free:  # the penalty is not known in every unit
            consistent, unit = quadratic.is_sum_of_squares, power_of_two(unit)
            quadratic, ratio = given.double.scaled(unit), float((free / unit).square().max())
        settled = problem.penalty.settled(point.double(), torch.finfo(point.dtype).eps)
        point, residual = settled * unit, None
        if certifies_in_parts(given.gram) and not problem.penalty.couples_rows:
            if many:
                return None
            quadratic = _in_parts(quadratic, point)
        problem = Problem(quadratic, problem.penalty.to(torch.float64).scaled(unit))
    point, quadratic = point.to(problem.quadratic.cross), problem.quadratic
    residual = quadratic.residual(point) if residual is None else residual
    values, slack = quadratic.values(point, residual), problem.penalty.values(point)
    primal, convex = values + slack, problem.penalty.is_convex
    if consistent is None and (not many or quadratic.is_well_conditioned):
        consistent = quadratic.is_sum_of_squares if precise else given.is_credible
    finite = bool(primal.isfinite().all())
    if many and not (finite and consistent):
        return None
    if not finite:
        return [Certificate(inf, inf, inf, convex=convex)]
    if not consistent:
        return [Certificate(float(primal.sum()), inf, inf)]
    definite = not precise or isinstance(quadratic, InParts)
    doubt = 0.0 if definite else given.unit_free[0].doubt * ratio
    at = problem, point, residual, values, slack
    gaps = row_gaps(*at, dear=precise, doubt=doubt, near=precise) if convex else torch.full_like(values, inf)
    kkt = [inf] * len(given.parts)
    if precise:
        scale = problem.penalty.units(quadratic.scale())
        reach = torch.linalg.vecdot(quadratic.displacement(point).abs(), scale).square()  # at least |D| |H| |D|'
        gaps += 4 * torch.finfo(reach.dtype).eps * reach
        steps = quadratic.by_block(proximal_steps(problem, point, residual, scale)).amax((1, 2)).tolist()
        kkt = [kkt_residual(*each) for each in zip(steps, given.target_energies, strict=True)]
    resolutions = [torch.finfo(given.cross.dtype).eps * energy for energy in given.target_energies]
    each = zip(given.totals(primal), given.totals(gaps), kkt, resolutions, strict=True)
    return [Certificate(*numbers, convex) for numbers in each]


def _in_parts(quadratic: Quadratic, weight: Tensor) -> Quadratic:
    """Return the quadratic about a weight, without products in float64; unchanged if H is not definite enough."""
    cache = quadratic.cache
    assert cache is not None
    if cache.inverse is UNKNOWN:
        cache.inverse = Inverse.of(quadratic)
    return quadratic if cache.inverse is None else InParts.about(quadratic, weight, cache.inverse)


def proximal_steps(problem: Problem, point: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """Return |U - prox_p(U + K)| [m n] of proximal gradient steps of length 1, in coordinates U = V * scale.

    The scale is [n], or by row [m n]. Without convexity the length is that of a step that goes down, and the size is
    over the length.
    """
    length = 1.0 if problem.penalty.is_convex else 1 / (problem.quadratic.scaled(scale).lipschitz or 1.0)
    point = point * scale
    return (point - problem.penalty.scaled(scale).forward_backward(point, residual / scale, length)).abs() / length


def kkt_residual(step: float, energy: float) -> float:
    """Return the largest proximal step, free of units."""
    return 0.0 if step == 0 else step / energy**0.5 if energy > 0 else inf
