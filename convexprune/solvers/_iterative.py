"""The common part of our iterative solvers: coordinates, the test of the gap, the certificate."""

import time
from abc import abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from convexprune._device.precision import solving_in
from convexprune._setting_types import Count, NotNegative
from convexprune.core import AbstractPenalty, ElasticNet, Problem
from convexprune.core._problem import certify_each, proximal_steps, row_gaps
from convexprune.solvers._base import AbstractSolver, Solution, Status, StepResult, initial, require_penalty


@dataclass(frozen=True)
class AbstractIterative(AbstractSolver):
    """Iterate all rows at once, and stop when gap <= tolerance * objective.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of iterations.
        check_every: iterations between tests of the gap; the expensive gap of `row_gaps` comes after 1, 2, 4, ...
            tests.
        scale: iterate in coordinates where the Gram matrix has a unit diagonal. The penalties are separable, so the
            problem stays the same, up to four orders of magnitude better conditioned.
        precise: compute the final certificate in float64; else in the problem's dtype, three times cheaper.
    """

    tolerance: NotNegative = 1e-4
    max_iterations: Count = 2000
    check_every: Count = 20
    scale: bool = True
    precise: bool = True

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """Every penalty has a prox."""
        return (AbstractPenalty,)

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        require_penalty(self, type(problem.penalty))
        return self._solved(problem, initial(problem, start), tested=start is not None)

    @torch.no_grad()
    def step(self, problem: Problem, start: Tensor, residual: Tensor, certified: bool = True) -> StepResult:
        """Iterate as in `solve`, from a residual that need not be computed.

        Without `certified` the residual at the end is `Quadratic.residual_after`.
        """
        if certified:
            solution = self._solved(problem, start, residual)
            return StepResult(solution.weight, solution.residual, solution.products, solution)
        weight, _, _, products = self._from(problem, start, residual)
        return StepResult(weight, problem.quadratic.residual_after(residual, start, weight), products + 1)

    def _solved(
        self, problem: Problem, start: Tensor, residual: Tensor | None = None, tested: bool = False
    ) -> Solution:
        """Return the solution; the `residual` at the start may be inexact: it steers the way, not the certificate."""
        began = time.perf_counter()
        weight, status, iterations, products = self._from(problem, start, residual, tested)
        with solving_in("float32"):
            residual = None if self.precise else problem.quadratic.residual(weight)
            certificates = certify_each(problem, weight, self.precise, residual)
        seconds = (time.perf_counter() - began) / len(certificates)
        each = [
            Solution(
                part, Status.of(status, certificate, self.tolerance), certificate, iterations, products + 1, seconds
            )
            for part, certificate in zip(weight.chunk(len(certificates)), certificates, strict=True)
        ]
        return Solution.together(each, weight, residual)

    def _from(
        self, problem: Problem, weight: Tensor, residual: Tensor | None = None, tested: bool = False
    ) -> tuple[Tensor, Status, int, int]:
        """The loop from `weight`, in the coordinates that are asked for; a `tested` weight may be good enough."""
        if not self.scale:
            return self._iterate(problem, weight, residual)
        scale = problem.penalty.units(problem.quadratic.scale())
        inner = Problem(problem.quadratic.scaled(scale), problem.penalty.scaled(scale))
        residual = None if residual is None else residual / scale
        if tested and self._status(inner, weight * scale, 0) is Status.SOLVED:
            return weight, Status.SOLVED, 0, 1
        weight, status, iterations, products = self._iterate(inner, weight * scale, residual)
        weight = weight / scale
        if isinstance(problem.penalty, ElasticNet):
            weight = problem.penalty.prox(weight, 0.0)  # the units have rounded the bounds
        return weight, status, iterations, products

    @abstractmethod
    def _iterate(
        self, problem: Problem, weight: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Status, int, int]:
        """Run the loop: (weight, status, iterations, products); `residual` belongs to the first `weight`."""

    def _status(self, problem: Problem, weight: Tensor, iteration: int) -> Status | None:
        """Return the status at `weight`, or None to go on. Takes a product."""
        with solving_in("float32"):
            residual = problem.quadratic.residual(weight)
        values = problem.quadratic.values(weight, residual)
        slack = problem.penalty.values(weight)
        primal = float((values + slack).sum())
        if primal != primal or primal == inf:
            return Status.NON_FINITE
        if not problem.penalty.is_convex:
            step = float(proximal_steps(problem, weight, residual, torch.ones_like(weight[0])).max())
            return Status.STATIONARY if step <= self.tolerance * problem.quadratic.target_energy**0.5 else None
        enough, at = self.tolerance * primal, (problem, weight, residual, values, slack)
        gap = float(row_gaps(*at).sum())
        if gap > enough and not problem.quadratic.is_well_conditioned and self._is_due(iteration, problem.shape[1]):
            gap = float(row_gaps(*at, dear=True).sum())
        return Status.SOLVED if gap <= enough else None

    def _is_due(self, iteration: int, inputs: int) -> bool:
        """Return True if a gap with a factor per row is due: so seldom that the cost is at most the rest's."""
        checks = iteration // self.check_every
        return checks & (checks - 1) == 0 and 6 * iteration >= inputs
