"""FISTA, the production solver: a matrix product per iteration, in place, certified by the duality gap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.kernels import fused
from convexprune._device.precision import add_product
from convexprune.core import Problem
from convexprune.solvers._base import Status
from convexprune.solvers._iterative import AbstractIterative
from convexprune.solvers._shrink import Shrink


@dataclass(frozen=True)
class FISTA(AbstractIterative):
    """Accelerated proximal gradient (Beck and Teboulle 2009, FISTA with constant step), all rows at once.

        Z_k+1 = prox_{p/L}(Y_k - gradient(Y_k) / L)
        t_k+1 = (1 + sqrt(1 + 4 t_k^2)) / 2
        Y_k+1 = Z_k+1 + (t_k - 1) / t_k+1 (Z_k+1 - Z_k)

    Two additions, each a setting: `scale` (see `AbstractIterative`), and `restart`: forget the momentum of a row
    (t = 1) when it points uphill, <Y_k - Z_k+1, Z_k+1 - Z_k> > 0 (O'Donoghue and Candes 2015, gradient scheme).
    """

    restart: bool = True

    def _iterate(
        self, problem: Problem, weight: Tensor, residual: Tensor | None = None, shrink: Shrink | None = None
    ) -> tuple[Tensor, Status, int, int]:
        """The first step from `weight`, and the loop: (weight, status, iterations, products)."""
        q = problem.quadratic
        lipschitz = q.lipschitz
        if lipschitz == 0:  # q is linear at most: p(0) = 0 is its least value, and so is the prox with a long step
            return torch.zeros_like(weight), Status.SOLVED, 0, 0
        anchor = torch.zeros_like(q.cross) if q.anchor is None else q.anchor
        if residual is None and torch.equal(weight, anchor):
            residual = q.cross
        products = 1 if residual is None else 0
        residual = q.residual(weight) if residual is None else residual
        new = problem.penalty.forward_backward(weight, residual, 1 / lipschitz)
        if self.max_iterations == 1 < self.check_every:
            return new, Status.ITERATION_LIMIT, 1, products
        return self._accelerate(problem, weight - anchor, new.sub_(anchor), products, shrink)

    def _accelerate(
        self, problem: Problem, old: Tensor, new: Tensor, products: int, shrink: Shrink | None = None
    ) -> tuple[Tensor, Status, int, int]:
        """Iterate from the first step `old` -> `new`, both less the anchor: a product an iteration, in place."""
        q = problem.quadratic
        lipschitz = q.lipschitz
        anchor = torch.zeros_like(q.cross) if q.anchor is None else q.anchor
        # In D = V - anchor a gradient step is one product: D - (D H - G) / L = D (I - H / L) + G / L.
        step, shift = _gradient_step(q.gram, lipschitz), q.cross / lipschitz
        move, point = torch.empty_like(old), old.clone()
        t = old.new_ones(q.shape[0], 1)
        for iteration in range(1, self.max_iterations + 1):
            if iteration > 1:
                add_product(shift, point, step, out=new).add_(anchor)
                problem.penalty.prox_(new, 1 / lipschitz).sub_(anchor)
                products += 1
            if iteration % self.check_every == 0:
                products += 1
                status = self._status(problem, new + anchor, iteration, shrink)
                if status is not None:
                    return new + anchor, status, iteration, products
            if iteration == self.max_iterations:
                break
            if problem.penalty.is_convex:
                t = _extrapolate(new, old, point, move, t, self.restart, problem.penalty.couples_rows)
            else:  # without momentum every step goes down
                point.copy_(new)
            old, new = new, old
        return new.add_(anchor), Status.ITERATION_LIMIT, self.max_iterations, products


@fused
def _extrapolate(
    new: Tensor, old: Tensor, point: Tensor, move: Tensor, t: Tensor, restart: bool, together: bool
) -> Tensor:
    """Move Y, the `point`, to Z + (t - 1) / t_next (Z - Z_old), and return t_next [m 1].

    Rows whose momentum points uphill restart first; all rows `together`, if the penalty couples rows.
    """
    torch.sub(new, old, out=move)
    if restart:
        slope = torch.linalg.vecdot(point.sub_(new), move)[:, None]
        t = t.masked_fill((slope.sum() if together else slope) > 0, 1.0)
    t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
    torch.addcmul(new, (t - 1) / t_next, move, out=point)
    return t_next


def _gradient_step(gram: Tensor, lipschitz: float) -> Tensor:
    """I - H / L [n n]."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return identity.sub(gram, alpha=1 / lipschitz)
