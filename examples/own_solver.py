"""Bring your own solver: two members, and it prunes models and is certified like any other.

python examples/own_solver.py
"""

import time
from dataclasses import dataclass

from torch import Tensor

import convexprune
from convexprune import AbstractPenalty, AbstractSolver, Problem, Solution, Status, certify


@dataclass(frozen=True)
class ISTA(AbstractSolver):
    """The proximal gradient method, FISTA without the momentum."""

    iterations: int = 20

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        return (AbstractPenalty,)  # all of them: it needs no more than the prox

    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        began = time.perf_counter()
        step = 1 / problem.quadratic.lipschitz
        weight = problem.quadratic.cross.new_zeros(problem.shape) if start is None else start
        for _ in range(self.iterations):
            weight = problem.penalty.prox(weight + step * problem.quadratic.residual(weight), step)
        seconds = time.perf_counter() - began
        return Solution(
            weight, Status.ITERATION_LIMIT, certify(problem, weight), self.iterations, self.iterations, seconds
        )


for solver in ("fista", ISTA()):
    result = convexprune.prune(solver=solver, targets=["re:.*layers.0.self_attn.out_proj"], num_calibration_samples=8)
    operator = result.report.operators[0]
    print(
        f"{result.report.recipe['solver']:6s} relative error {operator.relative_error:.2e}, "
        f"largest relative gap on the path {operator.largest_gap:.1e}"
    )
