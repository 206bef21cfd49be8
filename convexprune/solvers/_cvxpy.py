"""The ground truth: problems handed to CVXPY row by row."""

import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convexprune.core._group_lasso import GroupLasso
from convexprune.core._penalty import L1, AbstractPenalty, Support
from convexprune.core._problem import Problem, certify
from convexprune.core._quadratic import Quadratic
from convexprune.core._reverse_huber import ReverseHuber
from convexprune.core._setting_types import NotNegative
from convexprune.solvers._base import AbstractSolver, Solution, Status, initial, require_penalty, square_root

TIGHT: dict[str, dict[str, Any]] = {
    "OSQP": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 200_000, "polishing": True, "adaptive_rho_interval": 50},
    "CLARABEL": {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-12},
    "SCS": {"eps_abs": 1e-10, "eps_rel": 1e-10, "max_iters": 200_000},
}
STATUS = {
    cp.OPTIMAL: Status.SOLVED,
    cp.OPTIMAL_INACCURATE: Status.ITERATION_LIMIT,
    cp.USER_LIMIT: Status.ITERATION_LIMIT,
}


@dataclass(frozen=True)
class CVXPY(AbstractSolver):
    """CVXPY with one of three engines, set to oracle accuracy; for small problems.

    Row i is stated as   minimise 1/2 |F d - F^-T g|^2 + sum_j strength_j |a_j + d_j|   with H = F' F from a symmetric
    eigendecomposition, so that rank-deficient Gram matrices are stated exactly; g outside the range of H would make the
    problem unbounded below and cannot come from data. Inputs and targets are stated in units near 1, because very large
    or very small numbers are beyond the engines.

    Args:
        options: options of the engine, over the options in `TIGHT`.
        tolerance: the relative gap up to which the status is SOLVED, whatever the engine says.
    """

    engine: Literal["OSQP", "CLARABEL", "SCS"] = "CLARABEL"
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: NotNegative = 1e-6

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """The penalties that are stated in CVXPY's atoms below."""
        return (L1, GroupLasso, ReverseHuber, Support)

    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        initial(problem, start)  # checks the shape; the engines are started by themselves
        quadratic, unit = problem.quadratic.unit_free  # or inputs of very different sizes are beyond the engines
        penalty, roots = problem.penalty.to(torch.float64), square_root(quadratic.gram.cpu().numpy())
        sizes = _sizes(quadratic, penalty.couples_rows)
        if isinstance(penalty, GroupLasso):
            statements = [self._whole(quadratic, penalty, unit.cpu().numpy(), *roots, sizes[0])]
        else:
            stated = Problem(quadratic, penalty.scaled(unit))
            statements = [self._row(stated, i, *roots, size) for i, size in enumerate(sizes)]
        built = time.perf_counter()
        rows, statuses = [], []
        for (variable, statement), size in zip(statements, sizes, strict=True):
            value, status = self._solve_row(variable, statement)
            rows.append(size * value)
            statuses.append(status)
        solved = time.perf_counter()
        displacement = (torch.from_numpy(np.vstack(rows)).to(unit) / unit).to(problem.quadratic.cross)
        anchor = problem.quadratic.anchor
        weight = displacement if anchor is None else displacement + anchor
        worst = max(statuses, key=list(Status).index)
        if isinstance(problem.penalty, Support | L1):
            weight = problem.penalty.prox(weight, 0.0)  # zeros that were constraints are zeros
        certificate = certify(problem, weight)
        status = Status.of(worst, certificate, self.tolerance)
        return Solution(weight, status, certificate, 0, 0, solved - built, built - began)

    def _solve_row(self, variable: cp.Variable, statement: cp.Problem) -> tuple[np.ndarray, Status]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "may be inaccurate" is the status that we return
            with suppress(cp.SolverError):  # no answer
                statement.solve(solver=self.engine, **{**TIGHT[self.engine], **self.options})
        if variable.value is None:
            return np.full(variable.shape, np.nan), Status.FAILED
        return variable.value, STATUS.get(statement.status, Status.FAILED)

    def _whole(
        self, q: Quadratic, penalty: GroupLasso, unit: np.ndarray, factor: np.ndarray, inverse: np.ndarray, size: float
    ) -> tuple[cp.Variable, cp.Problem]:
        """State all rows at once, for a penalty that couples rows; the weight has its original units."""
        (m, n), block = q.cross.shape, penalty.block
        anchor = np.zeros((m, n)) if q.anchor is None else q.anchor.cpu().numpy() / size
        d = cp.Variable((m, n))
        smooth = cp.sum_squares(d @ factor.T - q.cross.cpu().numpy() @ inverse / size) / 2
        strength = torch.as_tensor(penalty.strength, dtype=torch.float64).expand(n).cpu().numpy()[::block] / size
        largest = unit.reshape(-1, block).max(1)  # what the columns of a block have in common is the strength's
        weight = cp.multiply(d + anchor, np.broadcast_to(largest.repeat(block) / unit, (m, n)))
        blocks = cp.reshape(weight, (m * block, n // block), order="F")  # the columns of a block, one below another
        return d, cp.Problem(cp.Minimize(smooth + strength / largest @ cp.norm(blocks, axis=0)))

    def _row(
        self, problem: Problem, i: int, factor: np.ndarray, inverse: np.ndarray, size: float
    ) -> tuple[cp.Variable, cp.Problem]:
        q = problem.quadratic
        cross = q.cross[i].cpu().numpy() / size
        anchor = np.zeros_like(cross) if q.anchor is None else q.anchor[i].cpu().numpy() / size
        target = cross @ inverse
        d = cp.Variable(len(cross))
        smooth = cp.sum_squares(factor @ d - target) / 2
        if isinstance(problem.penalty, Support):
            outside = np.flatnonzero(~problem.penalty.mask.expand(problem.shape)[i].cpu().numpy())
            return d, cp.Problem(cp.Minimize(smooth), [d[outside] == -anchor[outside]] if len(outside) else [])
        if isinstance(problem.penalty, ReverseHuber):
            penalty = problem.penalty
            curvature, slope = (t.expand(problem.shape)[i].cpu().numpy() for t in (penalty.curvature, penalty.slope))
            slope, length = slope / size, cp.abs(d + anchor)
            parabola = curvature / 2 @ cp.square(cp.pos(length - slope / curvature))
            return d, cp.Problem(cp.Minimize(smooth + slope @ length + parabola))
        assert isinstance(problem.penalty, L1)
        strength = torch.as_tensor(problem.penalty.strength, dtype=torch.float64).expand(problem.shape)[i].cpu().numpy()
        zero, finite = np.flatnonzero(np.isinf(strength)), np.where(np.isinf(strength), 0, strength)
        price = finite / size @ cp.abs(d + anchor)
        return d, cp.Problem(cp.Minimize(smooth + price), [d[zero] == -anchor[zero]] if len(zero) else [])


def _sizes(quadratic: Quadratic, together: bool) -> list[float]:
    """Return the lengths of the rows' targets, or of all rows `together`: in these units an engine sees numbers
    near 1.
    """
    energy = 2 * quadratic.values(torch.zeros_like(quadratic.cross))
    energy = energy.sum()[None] if together else energy
    return torch.where((energy > 0) & energy.isfinite(), energy, 1.0).sqrt().tolist()
