"""The convex pruner: a path of certified convex problems, rounding to the pattern, a certified refit."""

from dataclasses import dataclass, field

import torch

from convexprune.moments import sampling_noise
from convexprune.penalty import L1, Support
from convexprune.problem import Problem
from convexprune.pruners.base import AbstractPruner, Pruned, PruningProblem
from convexprune.quadratic import Quadratic
from convexprune.solvers import AbstractSolver, Solution, make_solver
from convexprune.solvers.cg import ConjugateGradient
from convexprune.solvers.fista import FISTA


@dataclass(frozen=True)
class Convex(AbstractPruner):
    """placeholder until the research is in."""

    solver: AbstractSolver = field(default_factory=lambda: Convex.solver_for("fista"))
    refit: AbstractSolver | None = field(default_factory=ConjugateGradient)
    rounds: int = 12
    first_strength: float = 0.01
    last_strength: float = 0.5
    reach: float = 1.5
    damping: float | None = None
    least_damping: float = 0.03

    @torch.no_grad()
    def prune(self, problem: PruningProblem) -> Pruned:
        damping = self._damping(problem)
        scale = problem.scale
        quadratic = problem.quadratic.scaled(scale)
        quadratic = quadratic + Quadratic.damping(problem.weight * scale, damping * torch.ones_like(scale))
        weight = problem.weight * scale
        solutions: list[Solution] = []
        for r in range(self.rounds):
            threshold = problem.pattern.threshold(weight.abs())
            strength = self.first_strength * (self.last_strength / self.first_strength) ** (r / max(1, self.rounds - 1))
            strengths = strength * (threshold - weight.abs() / self.reach).clamp_min(0)
            solution = self.solver.solve(Problem(quadratic, L1(strengths)), weight)
            weight = solution.weight
            solutions.append(solution)
        mask = problem.pattern.mask(weight.abs())
        if self.refit is not None:
            solution = self.refit.solve(Problem(quadratic, Support(mask)), weight)
            weight = solution.weight
            solutions.append(solution)
        return Pruned(weight * mask / scale, mask, tuple(solutions), {"damping": damping})

    @staticmethod
    def solver_for(name: str) -> AbstractSolver:
        if name == "fista":
            return FISTA(tolerance=1e-2, max_iterations=20, check_every=10)
        return make_solver(name)

    def _damping(self, problem: PruningProblem) -> float:
        if self.damping is not None:
            return self.damping
        noise = sampling_noise(problem.folds) if problem.folds else 0.1
        return max(self.least_damping, noise / (1 - noise))
