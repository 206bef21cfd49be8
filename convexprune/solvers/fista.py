"""FISTA, the production solver: one matrix product per iteration, in place, certified by its duality gap."""

import time
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from convexprune.penalty import AbstractPenalty
from convexprune.problem import Problem, certify, row_gaps
from convexprune.solvers.base import AbstractSolver, Solution, Status, initial, require_penalty


@dataclass(frozen=True)
class FISTA(AbstractSolver):
    """Accelerated proximal gradient (Beck and Teboulle 2009, FISTA with constant step), all rows at once.

        Z_k+1 = prox_{p/L}(Y_k - gradient(Y_k) / L)
        t_k+1 = (1 + sqrt(1 + 4 t_k^2)) / 2
        Y_k+1 = Z_k+1 + (t_k - 1) / t_k+1 (Z_k+1 - Z_k)

    Two additions, each a setting. `scale`: iterate in coordinates where the Gram matrix has a unit diagonal; the
    penalties are separable, so this is the same problem, up to four orders of magnitude better conditioned. `restart`:
    forget the momentum of a row (t = 1) when it points uphill, <Y_k - Z_k+1, Z_k+1 - Z_k> > 0 (O'Donoghue and Candes
    2015, gradient scheme).

    `precise`: the final certificate is computed in float64; else in the problem's own dtype, three times cheaper.

    Stops when gap <= tolerance * objective, tested every `check_every` iterations, or after `max_iterations`.
    """

    tolerance: float = 1e-4
    max_iterations: int = 2000
    check_every: int = 20
    scale: bool = True
    restart: bool = True
    precise: bool = True

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """Every penalty has a prox."""
        return (AbstractPenalty,)

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        weight = initial(problem, start)
        scale = problem.quadratic.scale() if self.scale else torch.ones_like(problem.quadratic.gram[0])
        inner = Problem(problem.quadratic.scaled(scale), problem.penalty.scaled(scale))
        weight, status, iterations, products = self._iterate(inner, weight * scale)
        weight = weight / scale
        residual = None if self.precise else problem.quadratic.residual(weight)
        certificate = certify(problem, weight, self.precise, residual)
        if not isfinite(certificate.primal):
            status = Status.NON_FINITE
        elif status is Status.ITERATION_LIMIT and certificate.relative_gap <= self.tolerance:
            status = Status.SOLVED
        seconds = time.perf_counter() - began
        return Solution(weight, status, certificate, iterations, products + 1, seconds, residual=residual)

    def _iterate(self, problem: Problem, weight: Tensor) -> tuple[Tensor, Status, int, int]:
        """The loop: (weight, status, iterations, products). All but the product is element-wise and in place."""
        q = problem.quadratic
        lipschitz = q.lipschitz
        if lipschitz == 0:  # q is linear at most: p(0) = 0 is its least value, and so is the prox with a long step
            return torch.zeros_like(weight), Status.SOLVED, 0, 0
        # In D = V - anchor a gradient step is one product: D - (D H - G) / L = D (I - H / L) + G / L.
        step = torch.eye(q.shape[1], dtype=q.gram.dtype, device=q.gram.device).sub_(q.gram, alpha=1 / lipschitz)
        shift = q.cross / lipschitz
        anchor = torch.zeros_like(q.cross) if q.anchor is None else q.anchor
        old = weight - anchor
        new, move, point = torch.empty_like(old), torch.empty_like(old), old.clone()
        t = torch.ones(q.shape[0], 1, dtype=weight.dtype, device=weight.device)
        products = 0
        for iteration in range(1, self.max_iterations + 1):
            torch.addmm(shift, point, step, out=new)
            new.add_(anchor)
            problem.penalty.prox(new, 1 / lipschitz, out=new).sub_(anchor)
            products += 1
            torch.sub(new, old, out=move)
            if self.restart:
                uphill = torch.linalg.vecdot(point.sub_(new), move)[:, None] > 0
                t.masked_fill_(uphill, 1.0)
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            torch.addcmul(new, (t - 1) / t_next, move, out=point)
            t, old, new = t_next, new, old
            if iteration % self.check_every == 0:
                products += 1
                status = self._status(problem, old + anchor)
                if status is not None:
                    return old + anchor, status, iteration, products
        return old + anchor, Status.ITERATION_LIMIT, self.max_iterations, products

    def _status(self, problem: Problem, weight: Tensor) -> Status | None:
        """How the solve ends at `weight`, or None if it goes on."""
        residual = problem.quadratic.residual(weight)
        values = problem.quadratic.values(weight, residual)
        primal = float((values + problem.penalty.values(weight)).sum())
        gap = float(row_gaps(problem, weight, residual, values).sum())
        if primal != primal or primal == float("inf"):
            return Status.NON_FINITE
        return Status.SOLVED if gap <= self.tolerance * primal else None
