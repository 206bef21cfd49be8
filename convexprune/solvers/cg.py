"""Conjugate gradients on a fixed support: the refit, for all rows at once."""

import time
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from convexprune.penalty import AbstractPenalty, Support
from convexprune.problem import Problem, certify
from convexprune.quadratic import Quadratic
from convexprune.solvers.base import AbstractSolver, Solution, Status, initial, require_penalty


@dataclass(frozen=True)
class ConjugateGradient(AbstractSolver):
    """Least squares on each row's support by masked conjugate gradients, preconditioned by the diagonal of the Gram.

    In coordinates with a unit diagonal, with P the projection on the support, each row solves (P H P) v = P g by the
    Hestenes-Stiefel recurrence: one product per iteration whatever the number of rows, each with its own steps.

    Stops when gap <= tolerance * objective, tested every `check_every` iterations from what the recurrence carries (a
    triangular solve, no product), when the gradients have shrunk to rounding errors, or after `max_iterations`.
    """

    tolerance: float = 1e-4
    max_iterations: int = 200
    check_every: int = 5

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """Only a fixed support makes the problem linear."""
        return (Support,)

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        require_penalty(self, type(problem.penalty))
        assert isinstance(problem.penalty, Support)
        began = time.perf_counter()
        scale = problem.quadratic.scale()
        q = problem.quadratic.scaled(scale)
        mask = problem.penalty.mask.to(q.cross)  # a product with a boolean is slow on a CPU
        weight = initial(problem, start) * scale * mask
        residual = q.residual(weight)
        value = q.values(weight, residual)
        residual.mul_(mask)
        direction = residual.clone()
        energy = torch.linalg.vecdot(residual, residual)[:, None]
        least = torch.finfo(energy.dtype).eps ** 2 * energy
        iterations = 0
        while iterations < self.max_iterations and bool((energy > least).any()):
            if iterations % self.check_every == 0 and _gap(q, residual) <= self.tolerance * float(value.sum()):
                break
            image = (direction @ q.gram).mul_(mask)
            curvature = torch.linalg.vecdot(direction, image)[:, None]
            length = torch.where(curvature > 0, energy / curvature, 0.0)
            weight.addcmul_(length, direction)
            residual.addcmul_(length, image, value=-1)
            value -= (length * energy)[:, 0] / 2  # what the step gains, exactly
            previous, energy = energy, torch.linalg.vecdot(residual, residual)[:, None]
            direction.mul_(torch.where(previous > 0, energy / previous, 0.0)).add_(residual)
            iterations += 1
        weight = weight / scale
        certificate = certify(problem, weight)
        status = Status.SOLVED if certificate.relative_gap <= self.tolerance else Status.ITERATION_LIMIT
        if not isfinite(certificate.primal):
            status = Status.NON_FINITE
        return Solution(weight, status, certificate, iterations, iterations + 2, time.perf_counter() - began)


def _gap(q: Quadratic, residual: Tensor) -> float:
    """1/2 tr(K H^-1 K'), K [m n] what is left of the gradient on the support; inf if H is not positive definite."""
    if q.factor is None:
        return inf
    return float(torch.linalg.solve_triangular(q.factor, residual.T, upper=False).square().sum() / 2)
