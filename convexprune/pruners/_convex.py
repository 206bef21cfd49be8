"""The convex pruner: a path of convex problems finds the support, a certified refit the values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._device.kernels import fused, number_like
from convexprune._setting_types import Count, Ends, NotNegative, Whole, between
from convexprune.constraints import Constraint, column_norms
from convexprune.core import L1, GroupLasso, Problem, Quadratic
from convexprune.pruners._base import LayerProblem, Score
from convexprune.pruners._cost import Cost
from convexprune.pruners._refit import best_choice, choices
from convexprune.pruners._search import AbstractSearch, Found
from convexprune.solvers import AbstractSolver, Solution, make_solver
from convexprune.solvers._base import require_penalty


@dataclass(frozen=True)
class Convex(AbstractSearch):
    """Scores from convex problems with a reweighted L1 penalty, solved by any solver that takes the penalty.

    A path in the coordinates of `AbstractSearch`: in a round the convex problem

        min_V envelope(V) + sum_ij c t exp(-(|S_ij| / t)^2) |V_ij|

    is solved from the extrapolation of the last two rounds, P = V + (V - V_before). The scores S are P after a long
    gradient step, P + reach K / stiffness, and t is the pattern's threshold on |S|, so clearly kept entries are hardly
    penalised. The strength c and the stiffness of the envelope grow geometrically. A problem majorises a bounded
    concave penalty: a single iteration of FISTA per problem is enough. The residual is affine, so P's is known from
    earlier rounds: a round costs a single product. Where a single operator chooses whole columns the penalty is the
    group LASSO's, with |S_:j| in place of |S_ij|, or the length of a whole block. The last problem of every envelope is
    certified, earlier problems are steps on the way. A pattern with few choices of whole columns, such as the heads of
    a layer, needs no path: the best choice after the refit is taken.

    The constants were chosen on layer problems of SmolLM2-135M at 50 %, 70 % and 2:4 (lab/tried.md) and checked on
    further problems (lab/benchmarks.md).

    Args:
        solver: solver of the problems; None is FISTA as `solver_for` sets it.
        rounds: number of problems.
        strengths: the first and the last c.
        stiffnesses: of the first and the last envelope.
        envelopes: number of envelopes.
        reach: length of the gradient step of the scores.
        choices: largest number of choices to try singly; half of 8 leaves 70.
    """

    side_by_side: ClassVar[bool] = True
    cost: ClassVar[Cost] = Cost(6.9, 28.4, 94, 8, 1.8)
    scores: ClassVar[Mapping[str, Score]] = {"layers": "divergence", "experts": "output"}

    solver: AbstractSolver | None = None
    rounds: Count = 60
    strengths: Ends = (0.2, 1.3)
    stiffnesses: Ends = (0.6, 6.0)
    envelopes: Count = 4
    reach: NotNegative = 3.0
    choices: Whole = 70

    def __post_init__(self) -> None:
        AbstractSearch.__post_init__(self)
        require_penalty(self._solver, L1)

    @property
    def _solver(self) -> AbstractSolver:
        return self.solver or Convex.solver_for("fista")

    @staticmethod
    def solver_for(name: str) -> AbstractSolver:
        """Return the solver of that `name`, set for the path: ours stop early, an oracle cannot."""
        if name not in ("fista", "admm"):
            return make_solver(name)
        early = {"fista": {"max_iterations": 1, "restart": False}, "admm": {"max_iterations": 2, "rho": 1.0}}[name]
        return make_solver(name, check_every=10, scale=False, precise=False, **early)

    def search(self, quadratic: Quadratic, pattern: Constraint) -> Found:
        assert quadratic.anchor is not None
        few = choices(pattern, quadratic.shape)
        if few is not None and few <= self.choices:
            return Found(best_choice(quadratic, pattern), products=2 * few)
        before = weight = scores = quadratic.anchor
        solutions: list[Solution] = []
        products = 0
        for numbers in (chunk.tolist() for chunk in torch.arange(self.rounds).chunk(self.envelopes)):
            stiffness = between(self.stiffnesses, numbers[0] / (self.rounds - len(numbers) or 1))
            relaxed = quadratic.envelope(stiffness)
            slope = relaxed.residual(weight)
            slope_before = relaxed.residual_after(slope, weight, before)
            products += 3  # one is the envelope's
            for number in numbers:
                start, slope_start, scores = _ahead(
                    before, weight, slope_before, slope, number_like(self.reach / stiffness, weight)
                )
                strength = between(self.strengths, number / (self.rounds - 1 or 1))
                posed = Problem(relaxed, self._penalty(scores, pattern, strength))
                before, slope_before = weight, slope
                last = number == numbers[-1]
                weight, slope, made, solution = self._solver.step(posed, start, slope_start, certified=last)
                if solution is not None:
                    solutions.append(solution.record())
                else:
                    products += made
                if slope is None:
                    slope, products = relaxed.residual(weight), products + 1
            scores = torch.add(weight, slope, alpha=self.reach / stiffness)
        return Found(scores, tuple(solutions), products)

    def _is_batched(self, problem: LayerProblem) -> bool:
        return super()._is_batched(problem) and self.solver in (None, Convex.solver_for("fista"))  # one step each

    def require(self, pattern: Constraint) -> None:
        super().require(pattern)
        if pattern.by_column:
            require_penalty(self._solver, GroupLasso)

    def _penalty(self, scores: Tensor, pattern: Constraint, strength: float) -> L1 | GroupLasso:
        tiny = torch.finfo(scores.dtype).tiny
        threshold = pattern.threshold(scores).clamp_min(tiny)
        if pattern.by_column and len(pattern.parts(len(scores))) == 1:
            lengths, threshold = (column_norms(each, pattern.block) for each in (scores, threshold))
            strengths = _strengths(lengths, threshold.amax().clamp_min(tiny), number_like(strength, scores))
            return GroupLasso(strengths, checked=False, block=pattern.block)
        return L1(_strengths(scores, threshold, number_like(strength, scores)), checked=False)


@fused
def _ahead(
    before: Tensor, weight: Tensor, slope_before: Tensor, slope: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P = V + (V - V_before), its residual, which is affine in the weight, and the scores P + reach K."""
    start, slope_start = before.lerp(weight, 2.0), slope_before.lerp(slope, 2.0)
    return start, slope_start, torch.addcmul(start, slope_start, reach)


@fused
def _strengths(scores: Tensor, threshold: Tensor, strength: Tensor) -> Tensor:
    """Return c t exp(-(S / t)^2); beyond 8 t the value is exp(-64), practically zero: denormal numbers are slow."""
    return (scores / threshold).square_().clamp_max_(64).neg_().exp_().mul_(strength * threshold)
