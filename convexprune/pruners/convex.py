"""The convex pruner: a path of convex problems finds the support, a certified refit the values."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convexprune.errors import PatternError
from convexprune.fused import fused, number_like
from convexprune.group_products import GroupProducts
from convexprune.pattern import AbstractPattern, SemiStructured, Stacked
from convexprune.penalty import L1, AbstractPenalty
from convexprune.problem import Problem
from convexprune.pruners.admm import between
from convexprune.pruners.search import AbstractSearch, Found
from convexprune.quadratic import Quadratic
from convexprune.setting_types import Count, Ends, NotNegative
from convexprune.solvers import AbstractSolver, Solution, make_solver, solve
from convexprune.solvers.base import require_penalty

Penalty = Literal["reweighted-l1", "weighted-l1", "l1", "group-products"]
PLAIN = ("weighted-l1", "l1")
LAST = 1e-9  # puts the zeros of a solution after its smallest entries
NEAR = 0.005  # of the wanted zeros: a bisection that comes so near ends, and the rounding does the rest


@dataclass(frozen=True)
class Convex(AbstractSearch):
    """Scores from penalised problems, solved by any solver that takes their penalty.

    `penalty="reweighted-l1"`, the default, follows a path in the coordinates of `AbstractSearch`: round by round, the
    convex problem

        min_V envelope(V) + sum_ij c t exp(-(|S_ij| / t)^2) |V_ij|

    is solved from where the last two rounds point to, P = V + (V - V_before). The scores S are P after a long gradient
    step, P + reach K / stiffness, and t is the pattern's threshold on |S|, so what is clearly kept is hardly penalised.
    The strength c and the stiffness of the envelope grow geometrically. Each problem majorises a bounded concave
    penalty: one iteration of FISTA each is enough. As the residual is affine, that of P is known from the rounds
    before: a round costs one product. The last problem of every envelope is certified, those before are on the way.

    `"l1"`, strength |V_ij|, and `"weighted-l1"`, strength sqrt(H_jj) |V_ij|, are plain LASSO problems, on the damped
    quadratic itself: the strength is bisected, at most `rounds` times, until the solution has the pattern's number of
    zeros, or a little less. The solution is the score, and where it is zero, after all others, its residual. They are
    for comparison: shrinkage and correlated columns make them poor pruners.

    `"group-products"`, for n:m only, follows the path with the penalty of Kuebler et al. and the strength
    c stiffness / mean(t). It is not convex (see `GroupProducts`): no certificate can show a solve to be near optimal.

    `solver` solves these problems (None: FISTA as `solver_for` sets it). The constants were chosen on layer problems of
    SmolLM2-135M at 50 %, 70 % and 2:4 (docs/tried.md) and checked on others (docs/benchmarks.md).

    Raises:
        RecipeError: an unknown `penalty`.
        UnsupportedError: `solver` does not take the penalty, or `refit` a support.
        PatternError: `prune` with "group-products" and a pattern that is not one N:M.
    """

    solver: AbstractSolver | None = None
    penalty: Penalty = "reweighted-l1"
    rounds: Count = 60
    strengths: Ends = (0.2, 1.3)
    stiffnesses: Ends = (0.6, 6.0)
    envelopes: Count = 4
    reach: NotNegative = 3.0

    def __post_init__(self) -> None:
        AbstractSearch.__post_init__(self)
        require_penalty(self._solver, GroupProducts if self.penalty == "group-products" else L1)

    @property
    def by_rows(self) -> bool:
        """See `AbstractPruner.by_rows`."""
        return self.penalty == "reweighted-l1"

    @property
    def _solver(self) -> AbstractSolver:
        return self.solver or Convex.solver_for("fista", self.penalty)

    @staticmethod
    def solver_for(name: str, penalty: Penalty = "reweighted-l1") -> AbstractSolver:
        """The solver of that name, set for the penalty: on a path ours stop early, an oracle cannot.

        Raises:
            RecipeError: unknown name.
        """
        if name not in ("fista", "admm"):
            return make_solver(name)
        if penalty in PLAIN:
            return make_solver(name, tolerance=1e-2, max_iterations=300, precise=False)
        early = {"fista": {"max_iterations": 1, "restart": False}, "admm": {"max_iterations": 2, "rho": 1.0}}[name]
        return make_solver(name, check_every=10, scale=False, precise=False, **early)

    def search(self, quadratic: Quadratic, scale: Tensor, pattern: AbstractPattern) -> Found:
        """See `AbstractSearch.search`."""
        if self.penalty in PLAIN:
            unit = 1 / scale if self.penalty == "l1" else quadratic.scale()
            return self._bisection(quadratic, unit, pattern)
        return self._path(quadratic, pattern)

    def _path(self, quadratic: Quadratic, pattern: AbstractPattern) -> Found:
        """The scores at the end of the path."""
        assert quadratic.anchor is not None
        before = weight = scores = quadratic.anchor
        solutions: list[Solution] = []
        products = 0
        for numbers in (chunk.tolist() for chunk in torch.arange(self.rounds).chunk(self.envelopes)):
            stiffness = between(self.stiffnesses, numbers[0] / (self.rounds - len(numbers) or 1))
            relaxed = quadratic.envelope(stiffness)
            slope = relaxed.residual(weight)
            slope_before = relaxed.residual_after(slope, before - weight)
            products += 3  # one is the envelope's
            for number in numbers:
                start, slope_start, scores = _ahead(
                    before, weight, slope_before, slope, number_like(self.reach / stiffness, weight)
                )
                strength = between(self.strengths, number / (self.rounds - 1 or 1))
                posed = Problem(relaxed, self._penalty(scores, pattern, strength, stiffness))
                before, slope_before = weight, slope
                last = number == numbers[-1]
                weight, slope, made, solution = self._solver.advance(posed, start, slope_start, certified=last)
                if solution is not None:
                    solutions.append(solution.record())
                else:
                    products += made
                if slope is None:
                    slope, products = relaxed.residual(weight), products + 1
            scores = torch.add(weight, slope, alpha=self.reach / stiffness)
        return Found(scores, tuple(solutions), products)

    def _penalty(self, scores: Tensor, pattern: AbstractPattern, strength: float, stiffness: float) -> AbstractPenalty:
        threshold = pattern.threshold(scores).clamp_min(torch.finfo(scores.dtype).tiny)
        if self.penalty == "reweighted-l1":
            return L1(_strengths(scores, threshold, number_like(strength, scores)), checked=False)
        (groups, *others) = set(pattern.patterns) if isinstance(pattern, Stacked) else {pattern}
        if others or not isinstance(groups, SemiStructured):
            raise PatternError(f"The penalty 'group-products' is for one pattern N:M, not for {pattern}.")
        return GroupProducts(groups.kept, groups.group, strength * stiffness / float(threshold.mean()))

    def _bisection(self, quadratic: Quadratic, unit: Tensor, pattern: AbstractPattern) -> Found:
        """The scores of the LASSO whose solution has the pattern's number of zeros, or the nearest below."""
        wanted = pattern.zeros(*quadratic.shape)
        low, high = 0.0, float((quadratic.at(None).cross.abs() / unit).max())  # here the solution is zero
        weight = best = quadratic.cross if quadratic.anchor is None else quadratic.anchor
        slope = quadratic.residual(best)
        solutions: list[Solution] = []
        products = 2
        while len(solutions) < self.rounds:
            strength = (low * high) ** 0.5 if low else high / 1000
            solution = solve(self._solver, Problem(quadratic, L1(strength * unit)), weight)
            solutions.append(solution.record())
            weight, zeros = solution.weight, int((solution.weight == 0).sum())
            if zeros > wanted:
                high = strength
                continue
            low, best, slope = strength, weight, solution.residual
            if wanted - zeros <= NEAR * wanted:
                break
        if slope is None:
            slope, products = quadratic.residual(best), products + 1
        scores = torch.where(best == 0, LAST * slope, best)
        return Found(scores, tuple(solutions), products)


@fused
def _ahead(
    before: Tensor, weight: Tensor, slope_before: Tensor, slope: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P = V + (V - V_before), its residual, which is affine in the weight, and the scores P + reach K."""
    start, slope_start = before.lerp(weight, 2.0), slope_before.lerp(slope, 2.0)
    return start, slope_start, torch.addcmul(start, slope_start, reach)


@fused
def _strengths(scores: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
    """c t exp(-(S / t)^2), where S is 8 t or more with exp(-64): as good as zero, and what is denormal is slow."""
    return (scores / threshold).square_().clamp_max_(64).neg_().exp_().mul_(strength * threshold)
