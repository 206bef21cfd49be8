"""The part of a problem that is left to solve: rows that are not done, and columns that may be used there."""

import torch
from torch import Tensor

from convexprune.core import L1, Problem
from convexprune.core._abstract_penalty import Elementwise

SHARE = 0.4  # of rows times columns: a smaller part is worth a new start


def can_shrink(problem: Problem) -> bool:
    """Return True if rows are separate problems with one Gram matrix that is not singular, and p is of entries."""
    is_of_entries = isinstance(problem.penalty, Elementwise) and problem.penalty.is_convex
    return problem.quadratic.gram.ndim == 2 and is_of_entries and problem.quadratic.is_well_conditioned


class Shrink:
    """The rows and columns of `whole` that are left, as a `problem`.

    A row is done when its own gap is within the tolerance of its own objective. A column is left out where gap-safe
    screening (Ndiaye et al. 2017) shows that its weights are zero in every row that is not done. With the dual point
    S = s K inside the ball, at a gap g of the row, the dual optimum is in a sphere: S* is within sqrt(2 g H_jj) of S in
    entry j. So |S_j| + sqrt(2 g H_jj) < strength_j proves that V_j is zero.
    """

    def __init__(self, whole: Problem, rho: float | None = None) -> None:
        self.problem, self.is_due, self.rho = whole, False, rho  # the last one of ADMM, which goes on with it
        m, n = whole.shape
        self.rows, self.columns = (torch.arange(size, device=whole.quadratic.cross.device) for size in (m, n))
        self.going, self.used = self.rows, self.columns

    def finds(self, weight: Tensor, residual: Tensor, values: Tensor, slack: Tensor, going: Tensor) -> bool:
        """Return True if the rows that are `going` on [m], and the columns that they may use, are few enough."""
        used = self._may_be_used(weight, residual, values, slack)
        self.going, self.used = going, (used & going[:, None]).any(0)
        m, n = self.problem.shape
        self.is_due = 0 < int(going.sum() * self.used.sum()) < SHARE * m * n
        return self.is_due

    def _may_be_used(self, weight: Tensor, residual: Tensor, values: Tensor, slack: Tensor) -> Tensor:
        q, penalty = self.problem.quadratic, self.problem.penalty
        if not isinstance(penalty, L1) or q.anchor is not None:
            return torch.ones_like(weight, dtype=torch.bool)
        s = penalty.dual_scale(residual).clamp_max(1)
        gaps = q.scaled_price(values, s) + (slack - s * torch.linalg.vecdot(residual, weight)).clamp_min(0) + q.rounding
        reach = (2 * gaps).sqrt()[:, None] * q.gram.diagonal().sqrt()
        return s[:, None] * residual.abs() + reach >= torch.as_tensor(penalty.strength).to(weight)

    def narrow(self) -> bool:
        """Pose the problem of the rows and columns that are left, and return True if columns are not."""
        q, penalty, fewer = self.problem.quadratic, self.problem.penalty, not bool(self.used.all())
        assert isinstance(penalty, Elementwise)
        apart, q = q.problems > 1, q.rows(self.going)
        if fewer:
            q, penalty = q.columns(self.used), penalty.columns(self.used)
        if apart and q.cache is not None:
            q.cache.problems = len(q.cross)  # a row meets the tolerance for itself, whatever its problem
        self.problem = Problem(q, penalty.rows(self.going))
        self.rows, self.columns, self.is_due = self.rows[self.going], self.columns[self.used], False
        return fewer

    def part(self, weight: Tensor) -> Tensor:
        """Return the part of the whole weight [m n] that is left."""
        return weight[self.rows[:, None], self.columns]

    def inserted(self, weight: Tensor, part: Tensor) -> Tensor:
        """Return the whole weight with a new part."""
        weight = weight.clone()
        weight[self.rows] = 0
        weight[self.rows[:, None], self.columns] = part
        return weight
