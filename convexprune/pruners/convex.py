"""The convex pruner: a path of certified convex problems finds the support, a certified refit the values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from convexprune.errors import PruningError
from convexprune.moments import sampling_noise
from convexprune.pattern import AbstractPattern
from convexprune.penalty import L1, Support
from convexprune.problem import Problem
from convexprune.pruners.base import AbstractPruner, Pruned, PruningProblem
from convexprune.quadratic import Quadratic
from convexprune.solvers import AbstractSolver, Solution, make_solver
from convexprune.solvers.base import require_penalty
from convexprune.solvers.cg import ConjugateGradient


@dataclass(frozen=True)
class Convex(AbstractPruner):
    """Iteratively reweighted L1 on a damped, relaxed quadratic, rounding, and a refit on the support.

    1.  Damping: r/2 sum_ij H_jj (V_ij - W_ij)^2 is added, r = `damping`; if None, noise / (1 - noise) of the
        calibration sample, at least `least_damping` (twice that for a single sample, which has nothing to be compared
        with). Without it an exact solver fits the noise of the tokens.
    2.  Coordinates in which the inverse of the Gram matrix has a constant diagonal: there |V_ij| is the saliency of
        Optimal Brain Surgeon, |V_ij| / sqrt([H^-1]_jj).
    3.  The path: round by round, the convex problem

            min_V envelope(V) + sum_ij c t exp(-(|S_ij| / t)^2) |V_ij|

        is solved from where the last two rounds point to, V + (V - V_before). The scores S are the weight after a long
        gradient step, V + reach K / stiffness, and t is the pattern's threshold on |S|, so what is clearly kept is
        hardly penalised. The strength c and the stiffness of the envelope grow geometrically. Each problem majorises a
        bounded concave penalty: a few iterations each are enough, and the certificates say how good they were.
    4.  The pattern keeps the largest |S|; the refit is least squares on that support, damped like the path.

    `solver` solves the path, `refit` the values (None: keep S on the support). The constants were chosen on layer
    problems of SmolLM2-135M at 50 % and checked on others: docs/benchmarks.md.

    Raises:
        UnsupportedError: `solver` does not take an L1 penalty, or `refit` a support.
    """

    solver: AbstractSolver = field(default_factory=lambda: Convex.solver_for("fista"))
    refit: AbstractSolver | None = field(default_factory=ConjugateGradient)
    rounds: int = 20
    strengths: tuple[float, float] = (0.1, 1.0)
    stiffnesses: tuple[float, float] = (0.3, 3.0)
    envelopes: int = 5
    reach: float = 3.0
    damping: float | None = None
    least_damping: float = 0.03

    def __post_init__(self) -> None:
        require_penalty(self.solver, L1)
        if self.refit is not None:
            require_penalty(self.refit, Support)

    @staticmethod
    def solver_for(name: str) -> AbstractSolver:
        """The solver of that name, set for the path: FISTA stops early, an oracle cannot.

        Raises:
            RecipeError: unknown name.
        """
        if name == "fista":
            return make_solver("fista", max_iterations=3, check_every=4, scale=False, restart=False, precise=False)
        return make_solver(name)

    @torch.no_grad()
    def prune(self, problem: PruningProblem) -> Pruned:
        """See `AbstractPruner.prune`.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        damping = self._damping(problem)
        quadratic, scale = _damped(problem, damping)
        scores, solutions = self._path(quadratic, problem.pattern)
        mask = problem.pattern.mask(scores.abs())
        weight = scores * mask
        if self.refit is not None:
            solution = self.refit.solve(Problem(quadratic, Support(mask)), weight)
            weight = solution.weight
            solutions.append(solution)
        return Pruned(weight / scale, mask, tuple(solutions), {"damping": damping})

    def _path(self, quadratic: Quadratic, pattern: AbstractPattern) -> tuple[Tensor, list[Solution]]:
        """The scores at the end of the path, and every solve on the way."""
        assert quadratic.anchor is not None
        before = weight = scores = quadratic.anchor
        solutions: list[Solution] = []
        for numbers in torch.arange(self.rounds).chunk(self.envelopes):
            stiffness = _between(self.stiffnesses, int(numbers[0]) / (self.rounds - len(numbers) or 1))
            relaxed = quadratic.envelope(stiffness)
            for number in numbers.tolist():
                threshold = pattern.threshold(scores.abs()).clamp_min(torch.finfo(weight.dtype).tiny)
                strength = _between(self.strengths, number / (self.rounds - 1 or 1))
                penalty = L1(strength * threshold * torch.exp(-(scores / threshold).square()))
                solution = self.solver.solve(Problem(relaxed, penalty), 2 * weight - before)
                before, weight = weight, solution.weight
                scores = weight + self.reach / stiffness * relaxed.residual(weight)
                solutions.append(solution)
        return scores, solutions

    def _damping(self, problem: PruningProblem) -> float:
        if self.damping is not None:
            return self.damping
        if not problem.folds:
            return 2 * self.least_damping
        noise = sampling_noise(problem.folds)
        return max(self.least_damping, noise / (1 - noise))


def _between(ends: tuple[float, float], share: float) -> float:
    """The geometric way from one end (share 0) to the other (share 1)."""
    return ends[0] * (ends[1] / ends[0]) ** share


def _damped(problem: PruningProblem, damping: float) -> tuple[Quadratic, Tensor]:
    """The damped quadratic in coordinates V * scale where [H^-1]_jj is constant, and that scale [n]."""
    diagonal = problem.scale.square()
    quadratic = (problem.quadratic + Quadratic.damping(problem.weight, damping * diagonal)).scaled(problem.scale)
    factor, info = torch.linalg.cholesky_ex(quadratic.gram)
    if int(info):
        raise PruningError(
            f"The Gram matrix is not positive definite with damping {damping}: raise the damping, or calibrate on more "
            f"tokens than the {problem.moments.tokens} seen."
        )
    metric = torch.cholesky_inverse(factor).diagonal().rsqrt()
    metric = metric / metric.square().mean().sqrt()
    return quadratic.scaled(metric), problem.scale * metric
