"""The convex pruner: a path of certified convex problems finds the support, a certified refit the values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from convexprune.pattern import AbstractPattern
from convexprune.penalty import L1
from convexprune.problem import Problem
from convexprune.pruners.admm import between
from convexprune.pruners.search import AbstractSearch, Found
from convexprune.quadratic import Quadratic
from convexprune.solvers import AbstractSolver, Solution, make_solver
from convexprune.solvers.base import require_penalty


@dataclass(frozen=True)
class Convex(AbstractSearch):
    """Iteratively reweighted L1 on a relaxed quadratic, rounding, and a refit on the support.

    The path, in the coordinates of `AbstractSearch`: round by round, the convex problem

        min_V envelope(V) + sum_ij c t exp(-(|S_ij| / t)^2) |V_ij|

    is solved from where the last two rounds point to, V + (V - V_before). The scores S are the weight after a long
    gradient step, V + reach K / stiffness, and t is the pattern's threshold on |S|, so what is clearly kept is hardly
    penalised. The strength c and the stiffness of the envelope grow geometrically. Each problem majorises a bounded
    concave penalty: a few iterations each are enough, and the certificates say how good they were.

    `solver` solves the path. The constants were chosen on layer problems of SmolLM2-135M at 50 % and checked on others:
    docs/benchmarks.md.

    Raises:
        UnsupportedError: `solver` does not take an L1 penalty, or `refit` a support.
    """

    solver: AbstractSolver = field(default_factory=lambda: Convex.solver_for("fista"))
    rounds: int = 20
    strengths: tuple[float, float] = (0.1, 1.0)
    stiffnesses: tuple[float, float] = (0.3, 3.0)
    envelopes: int = 5
    reach: float = 3.0

    def __post_init__(self) -> None:
        AbstractSearch.__post_init__(self)
        require_penalty(self.solver, L1)

    @staticmethod
    def solver_for(name: str) -> AbstractSolver:
        """The solver of that name, set for the path: FISTA stops early, an oracle cannot.

        Raises:
            RecipeError: unknown name.
        """
        if name == "fista":
            return make_solver("fista", max_iterations=3, check_every=4, scale=False, restart=False, precise=False)
        return make_solver(name)

    def search(self, quadratic: Quadratic, scale: Tensor, pattern: AbstractPattern) -> Found:
        """See `AbstractSearch.search`: the scores at the end of the path."""
        assert quadratic.anchor is not None
        before = weight = scores = quadratic.anchor
        solutions: list[Solution] = []
        products = 0
        for numbers in torch.arange(self.rounds).chunk(self.envelopes):
            stiffness = between(self.stiffnesses, int(numbers[0]) / (self.rounds - len(numbers) or 1))
            relaxed = quadratic.envelope(stiffness)
            for number in numbers.tolist():
                threshold = pattern.threshold(scores.abs()).clamp_min(torch.finfo(weight.dtype).tiny)
                strength = between(self.strengths, number / (self.rounds - 1 or 1))
                penalty = L1(strength * threshold * torch.exp(-(scores / threshold).square()))
                solution = self.solver.solve(Problem(relaxed, penalty), 2 * weight - before)
                before, weight = weight, solution.weight
                residual = solution.residual
                if residual is None:
                    residual, products = relaxed.residual(weight), products + 1
                scores = weight + self.reach / stiffness * residual
                solutions.append(solution)
        return Found(scores, tuple(solutions), products)
