"""Conjugate gradients on a fixed support: the refit, for all rows at once."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._device.capabilities import is_host
from convexprune._device.kernels import fused
from convexprune._device.precision import product
from convexprune._setting_types import Count, NotNegative, Whole
from convexprune.core import AbstractPenalty, Problem, Quadratic, Support
from convexprune.solvers._base import AbstractSolver, Solution, Status, certified, initial, require_penalty


@dataclass(frozen=True)
class ConjugateGradient(AbstractSolver):
    """Least squares on the supports of rows by masked conjugate gradients.

    With P the projection on the support, a row solves (P H P) v = P g by the recurrence of Hestenes and Stiefel (1952):
    a single product per iteration for all rows, with step lengths by row.

    The solver stops when gap <= tolerance * objective, when all rows are done, or after `max_iterations`. A row is done
    when its gradient is four rounding errors of the first gradient, or when d H d' <= eps |H|_F |d|^2 for its direction
    d: such energy is rounding. If H is singular on the support, as on fewer tokens than inputs, the solver ends at the
    solution nearest to its start, without a walk through the null space.

    The gap is computed from the recurrence: a triangular solve, no product. While an iteration still gains more than
    the tolerance the gap is not tested, because the gap was larger than the gain just before. So a solve whose gap
    falls at once ends a test late.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of iterations.
        check_every: iterations between tests of the gap.
        scale: work in coordinates where the Gram matrix has a unit diagonal, which is preconditioning by the diagonal.
            Where the inverse has a constant diagonal (`saliency_coordinates`), fewer iterations are needed without.
    """

    batches = "stacks"

    tolerance: NotNegative = 1e-4
    max_iterations: Whole = 200
    check_every: Count = 5
    scale: bool = True

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
        q, scale = problem.quadratic, None
        if self.scale:
            scale = problem.quadratic.scale()
            q = q.scaled(scale)
        mask = problem.penalty.mask
        mask = mask.to(q.cross) if is_host(mask.device) else mask  # a product with a boolean is slow on a CPU
        weight = initial(problem, start)
        weight = (weight if scale is None else weight * scale) * mask
        residual = q.residual(weight)
        value = q.values(weight, residual)
        residual.mul_(mask)
        direction = residual.clone()
        energy = torch.linalg.vecdot(residual, residual)[:, None]
        size, eps = energy, torch.finfo(energy.dtype).eps
        least, flat = (4 * eps) ** 2 * energy, eps * q.norm
        gain = torch.zeros_like(value)
        iterations, ended = 0, dict[int, int]()
        while iterations < self.max_iterations:
            if iterations % self.check_every == 0:  # only here does a GPU wait
                done = self._done(q, residual, gain, value, (energy > least)[:, 0])
                ended = {i: iterations for i, each in enumerate(done) if each} | ended
                if all(done):
                    break
                if any(done):  # what is solved beside others stays as it is
                    direction.mul_(q.for_rows(torch.tensor(done, device=direction.device).logical_not())[:, None])
            image = product(direction, q.gram)
            gain, energy, size = _advance(image, direction, weight, residual, mask, energy, size, least, flat)
            value -= gain
            iterations += 1
        weight = weight if scale is None else weight / scale
        counts = [ended.get(i, iterations) for i in range(q.problems)]
        limit = self.max_iterations
        made = [(Status.SOLVED if n < limit else Status.ITERATION_LIMIT, n, n + 2) for n in counts]
        return certified(problem, weight, made, self.tolerance, began)

    def _done(self, q: Quadratic, residual: Tensor, gain: Tensor, value: Tensor, going: Tensor) -> list[bool]:
        """Decide by problem: no row is `going` on [m], or the gap is small; not tested after a large `gain`."""
        idle = [not count for count in q.totals(going)]
        enough = [self.tolerance * each for each in q.totals(value)]
        near = [each <= most for each, most in zip(q.totals(gain), enough, strict=True)]
        if any(now and not before for now, before in zip(near, idle, strict=True)):
            gaps = zip(q.totals(q.inverse_form(residual)), enough, near, strict=True)
            near = [now and gap <= most for gap, most, now in gaps]
        return [before or now for before, now in zip(idle, near, strict=True)]


@fused
def _advance(
    image: Tensor,
    direction: Tensor,
    weight: Tensor,
    residual: Tensor,
    mask: Tensor,
    energy: Tensor,
    size: Tensor,
    least: Tensor,
    flat: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finish an iteration in place after its product D H, the `image`; `energy` is |K|^2 and `size` |D|^2, both [m 1].

    Rows whose |K|^2 is at most `least` [m 1], or whose curvature is at most `flat` ([], or [m 1]), are done: their
    direction is zero from then on.

    Returns:
        The gain by row [m], and the new |K|^2 and |D|^2; |K|^2 is zero for finished rows.
    """
    curvature = torch.linalg.vecdot(direction, image)[:, None]  # directions are zero off the support
    ends = curvature <= flat * size
    length = torch.where(ends, 0.0, energy / curvature)
    weight.addcmul_(length, direction)
    residual.addcmul_(length, image, value=-1).mul_(mask)
    after = torch.linalg.vecdot(residual, residual)[:, None]
    goes_on = (~ends & ~(after <= least)).to(after)
    after = after * goes_on
    ratio = torch.where(energy > 0, after / energy, 0.0)
    direction.mul_(ratio).addcmul_(residual, goes_on)
    return (length * energy)[:, 0] / 2, after, after + ratio.square() * size  # residuals are orthogonal to directions
