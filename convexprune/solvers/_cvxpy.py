"""The ground truth: the same problem, handed to CVXPY row by row, or whole where the penalty couples the rows."""

import time
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convexprune._setting_types import NotNegative
from convexprune.core import AbstractPenalty, Problem, certify
from convexprune.core._abstract_penalty import Scaled
from convexprune.solvers._base import AbstractSolver, Solution, Status, initial, require_penalty, square_root
from convexprune.solvers._statements import Constraints, stated

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

    Rows are stated as   minimise 1/2 |F d - F^-T g|^2 + p(a + d)   with H = F' F from a symmetric eigendecomposition,
    so that rank-deficient Gram matrices are stated exactly; g outside the range of H would make the problem unbounded
    below and cannot come from data. Inputs and targets are stated in units in which they are near one, or what is very
    large or very small is beyond the engines.

    Args:
        engine: the solver inside CVXPY.
        options: of the engine, over those in `TIGHT`.
        tolerance: the relative gap up to which the status is SOLVED, whatever the engine says.
    """

    engine: Literal["OSQP", "CLARABEL", "SCS"] = "CLARABEL"
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: NotNegative = 1e-6

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """The penalties that `_statements` knows in CVXPY's atoms."""
        return tuple(kind for kind in stated.registry if kind not in (object, AbstractPenalty, Scaled))

    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        initial(problem, start)  # checks the shape; the engines are started by themselves
        penalty, free = problem.penalty.to(torch.float64), problem.quadratic.unit_free
        unit = penalty.units(free[1])  # or inputs of very different sizes are beyond the engines
        quadratic = free[0] if unit is free[1] else problem.quadratic.double.scaled(unit)
        energy = 2 * quadratic.values(torch.zeros_like(quadratic.cross))
        energy = energy.sum()[None] if penalty.couples_rows else energy
        sizes = torch.where((energy > 0) & energy.isfinite(), energy, 1.0).sqrt().tolist()
        rows = [slice(None)] if penalty.couples_rows else [slice(i, i + 1) for i in range(len(energy))]
        roots, statements = square_root(quadratic.gram.cpu().numpy()), list[tuple[cp.Variable, cp.Problem]]()
        for chosen, size in zip(rows, sizes, strict=True):  # V = size U / unit, and the objective is over size^2
            q, share = quadratic.rows(chosen), penalty.rows(chosen).scaled(unit / size)
            statements.append(self._statement(q.cross.cpu().numpy() / size, q.anchor, share, size, *roots))
        built = time.perf_counter()
        found = [self._solve(*statement) for statement in statements]
        solved = time.perf_counter()
        rows = np.vstack([size * value for size, (value, _) in zip(sizes, found, strict=True)])
        displacement = (torch.from_numpy(rows).to(unit) / unit).to(problem.quadratic.cross)
        anchor = problem.quadratic.anchor
        weight = displacement if anchor is None else displacement + anchor
        weight = problem.penalty.inside(weight)  # constraints are met to the last bit
        certificate = certify(problem, weight)
        status = Status.of(max((s for _, s in found), key=list(Status).index), certificate, self.tolerance)
        return Solution(weight, status, certificate, 0, 0, solved - built, built - began)

    def _statement(
        self, cross: np.ndarray, anchor: Tensor | None, penalty: AbstractPenalty, size: float, factor: np.ndarray,
        inverse: np.ndarray,
    ) -> tuple[cp.Variable, cp.Problem]:  # fmt: skip
        d = cp.Variable(cross.shape)
        about = 0 if anchor is None else anchor.cpu().numpy() / size
        constraints: Constraints = []
        price = stated(penalty, d + about, constraints) / size**2
        smooth = cp.sum_squares(d @ factor.T - cross @ inverse) / 2
        return d, cp.Problem(cp.Minimize(smooth + price), constraints)

    def _solve(self, variable: cp.Variable, statement: cp.Problem) -> tuple[np.ndarray, Status]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "may be inaccurate" is the status that we return
            try:
                statement.solve(solver=self.engine, **{**TIGHT[self.engine], **self.options})
            except BaseException as cause:  # no answer; a panic of Clarabel is no Exception
                if not isinstance(cause, cp.SolverError) and type(cause).__name__ != "PanicException":
                    raise
        if variable.value is None:
            return np.full(variable.shape, np.nan), Status.FAILED
        return variable.value, STATUS.get(statement.status, Status.FAILED)
