"""The common part of our iterative solvers: coordinates, the test of the gap, the certificate."""

import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from convexprune._device.precision import solving_in
from convexprune._setting_types import Count, NotNegative
from convexprune.core import AbstractPenalty, Problem
from convexprune.core._certificate import proximal_steps, row_gaps
from convexprune.solvers._base import (
    AbstractSolver,
    Solution,
    Status,
    StepResult,
    certified,
    initial,
    require_penalty,
)
from convexprune.solvers._shrink import Shrink, can_shrink

FINER = 0.1  # of the tolerance, where columns are left out


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

    batches = "stacks"

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
        return self._solved(problem, initial(problem, start), tested=start is not None, leaving=True)

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
        self,
        problem: Problem,
        start: Tensor,
        residual: Tensor | None = None,
        tested: bool = False,
        leaving: bool = False,
    ) -> Solution:
        """Return the solution; the `residual` at the start may be inexact: it steers the way, not the certificate."""
        began = time.perf_counter()
        weight, status, iterations, products = self._from(problem, start, residual, tested, leaving)
        with solving_in("float32"):
            residual = None if self.precise else problem.quadratic.residual(weight)
            made = [(status, iterations, products + 1)] * problem.quadratic.problems
            return certified(problem, weight, made, self.tolerance, began, self.precise, residual)

    def _from(
        self,
        problem: Problem,
        weight: Tensor,
        residual: Tensor | None = None,
        tested: bool = False,
        leaving: bool = False,
    ) -> tuple[Tensor, Status, int, int]:
        """The loop from `weight`, in the coordinates that are asked for; a `tested` weight may be good enough."""
        if not self.scale:
            return (self._shrinking if leaving and can_shrink(problem) else self._iterate)(problem, weight, residual)
        scale = problem.penalty.units(problem.quadratic.scale())
        inner = Problem(problem.quadratic.scaled(scale), problem.penalty.scaled(scale))
        residual = None if residual is None else residual / scale
        if tested and self._status(inner, weight * scale, 0) is Status.SOLVED:
            return weight, Status.SOLVED, 0, 1
        iterate = self._shrinking if leaving and can_shrink(inner) else self._iterate
        weight, status, iterations, products = iterate(inner, weight * scale, residual)
        weight = problem.penalty.inside(weight / scale)  # the units have rounded the bounds
        return weight, status, iterations, products

    @abstractmethod
    def _iterate(
        self, problem: Problem, weight: Tensor, residual: Tensor | None = None, shrink: Shrink | None = None
    ) -> tuple[Tensor, Status, int, int]:
        """Run the loop: (weight, status, iterations, products); `residual` belongs to the first `weight`.

        The loop ends early where a part of the problem is left over that is worth a loop: see `shrink`.
        """

    def _shrinking(self, problem: Problem, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Status, int, int]:
        """Iterate; rows that are done, and columns that are zero in all other rows, take no part from then on.

        Without columns the gap is smaller than that of the whole problem, so a part gets a smaller tolerance; the next
        part is chosen by the whole.
        """
        left, shrink, iterations, products = self, Shrink(problem), 0, 0
        while True:
            left = replace(left, max_iterations=self.max_iterations - iterations)
            found, status, made, more = left._iterate(shrink.problem, shrink.part(weight), residual, shrink)
            iterations, products, residual = iterations + made, products + more, None
            weight = shrink.inserted(weight, found)
            if iterations >= self.max_iterations:
                return weight, status, iterations, products
            if not shrink.is_due:
                if shrink.problem is problem or status is not Status.SOLVED:
                    return weight, status, iterations, products
                shrink, products = Shrink(problem, shrink.rho), products + 1
                status = self._status(problem, weight, 0, shrink)
                if status is Status.SOLVED:
                    return weight, status, iterations, products
            if shrink.is_due and shrink.narrow():
                left = replace(left, tolerance=FINER * left.tolerance)

    def _status(self, problem: Problem, weight: Tensor, iteration: int, shrink: Shrink | None = None) -> Status | None:
        """Return the status at `weight`, or None to go on. Takes a product."""
        with solving_in("float32"):
            residual = problem.quadratic.residual(weight)
        values = problem.quadratic.values(weight, residual)
        slack = problem.penalty.values(weight)
        primal = problem.quadratic.totals(values + slack)
        if not all(isfinite(total) for total in primal):
            return Status.NON_FINITE
        if not problem.penalty.is_convex:
            step = float(proximal_steps(problem, weight, residual, torch.ones_like(weight[0])).max())
            return Status.STATIONARY if step <= self.tolerance * problem.quadratic.target_energy**0.5 else None
        at = problem, weight, residual, values, slack
        gaps = row_gaps(*at)
        done = self._are_enough(problem, gaps, primal)
        if not done and not problem.quadratic.is_well_conditioned and self._is_due(iteration, problem.shape[1]):
            gaps = row_gaps(*at, dear=True)
            done = self._are_enough(problem, gaps, primal)
        if (
            not done
            and shrink is not None
            and shrink.finds(weight, residual, values, slack, gaps > self.tolerance * (values + slack))
        ):
            return Status.ITERATION_LIMIT
        return Status.SOLVED if done else None

    def _are_enough(self, problem: Problem, gaps: Tensor, primal: list[float]) -> bool:
        """Return True if the gaps [m] of all problems side by side are small enough for their objectives."""
        each = zip(problem.quadratic.totals(gaps), primal, strict=True)
        return all(gap <= self.tolerance * total for gap, total in each)

    def _is_due(self, iteration: int, inputs: int) -> bool:
        """Return True if a gap with a factor per row is due: so seldom that the cost is at most the rest's."""
        checks = iteration // self.check_every
        return checks & (checks - 1) == 0 and 6 * iteration >= inputs
