"""ADMM for convex penalties: an exact quadratic step and a prox in turn, certified by the duality gap."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from convexprune._device.precision import add_product
from convexprune._setting_types import Count, Positive
from convexprune.core import Problem
from convexprune.errors import ProblemError
from convexprune.solvers._base import Status
from convexprune.solvers._iterative import AbstractIterative
from convexprune.solvers._shrink import Shrink

REBALANCE = 4.0  # rho changes by more than this factor or not at all: a change costs a Cholesky factorisation
RHO_RANGE = (1e-4, 1e2)  # with a unit diagonal; below, H + rho I is not safely positive definite in float32


@dataclass(frozen=True)
class ADMM(AbstractIterative):
    """The alternating direction method of multipliers (Boyd et al. 2011, section 6.4 for the LASSO), all rows at once.

    With the anchor A of the quadratic and the scaled dual U,

        B = argmin q + rho/2 |B - (Z - U)|^2 = A + (G + rho (Z - U - A)) (H + rho I)^-1
        C = relaxation B + (1 - relaxation) Z
        Z = prox_{p/rho}(C + U)
        U = U + C - Z

    The dual starts as the projection of the residual at the start, U = project(K) / rho. At every check rho is balanced
    (section 3.4.1 in OSQP's form, Stellato et al. 2020, section 5.2): times the square root of the primal over the dual
    residual, both relative, where that is more than a factor of 4.

    The answer is Z, which has the penalty's zeros. One product per iteration.

    Args:
        max_iterations: where it stops in any case.
        check_every: the gap is tested, and rho balanced, every so many iterations.
        rho: the first penalty parameter, for a unit diagonal.
        relaxation: over-relaxation, in (0, 2).
    """

    max_iterations: Count = 1000
    check_every: Count = 10
    rho: Positive = 0.1
    relaxation: Annotated[float, Field(gt=0, lt=2)] = 1.6

    def _iterate(
        self, problem: Problem, weight: Tensor, residual: Tensor | None = None, shrink: Shrink | None = None
    ) -> tuple[Tensor, Status, int, int]:
        q, rho = problem.quadratic, (shrink and shrink.rho) or self.rho
        anchor = torch.zeros_like(q.cross) if q.anchor is None else q.anchor
        try:
            inverse = q.shifted_inverse(rho)
        except ProblemError:  # H is no Gram matrix; the certificate says so too
            return weight, Status.INCONSISTENT, 0, 0
        dual = problem.penalty.project(q.residual(weight) if residual is None else residual) / rho
        products = 1 if residual is None else 0
        for iteration in range(1, self.max_iterations + 1):
            point = (weight - dual).sub_(anchor).mul_(rho).add_(q.cross)
            exact = add_product(anchor, point, inverse)
            relaxed = torch.lerp(weight, exact, self.relaxation).add_(dual)
            before, weight = weight, problem.penalty.prox(relaxed, 1 / rho)
            dual = relaxed.sub_(weight)
            products += 1
            if iteration % self.check_every == 0:
                products += 1
                status = self._status(problem, weight, iteration, shrink)
                if shrink is not None:
                    shrink.rho = rho
                if status is not None:
                    return weight, status, iteration, products
                balanced = _balanced(rho, exact, weight, before, dual)
                if max(balanced / rho, rho / balanced) > REBALANCE:
                    dual, rho, inverse = dual * (rho / balanced), balanced, q.shifted_inverse(balanced)
        return weight, Status.ITERATION_LIMIT, self.max_iterations, products


def _balanced(rho: float, exact: Tensor, weight: Tensor, before: Tensor, dual: Tensor) -> float:
    """The rho that makes the relative primal and dual residuals, |B - Z| and rho |Z - Z_before|, equal."""
    tiny = torch.finfo(weight.dtype).tiny
    primal = (exact - weight).norm() / torch.maximum(exact.norm(), weight.norm()).clamp_min(tiny)
    moved = (weight - before).norm() / dual.norm().clamp_min(tiny)
    return min(max(rho * float((primal / moved.clamp_min(tiny)).clamp(1e-4, 1e4).sqrt()), RHO_RANGE[0]), RHO_RANGE[1])
