"""A second, independent ground truth: the dual problem by SciPy's SLSQP, the weight from its multipliers by NNLS."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from convexprune._setting_types import Count, NotNegative
from convexprune.core import L1, AbstractPenalty, Problem, Support, certify
from convexprune.solvers._base import AbstractSolver, Solution, Status, initial, require_penalty, square_root

ACTIVE = 1e-7  # a dual constraint this near to its bound may carry a weight, of a target of length one


@dataclass(frozen=True)
class SciPy(AbstractSolver):
    """Exact active-set methods in float64, row by row; for small problems.

    With H = F' F and y = F^-T g, the dual of  1/2 |F v - y|^2 + sum_j strength_j |v_j|  is the projection of y on the
    polyhedron  |F' r|_j <= strength_j. Its Hessian is the identity, where SLSQP starts. The multipliers of the active
    constraints, by non-negative least squares on F v = y - r, are the weight. On a support the problem is plain least
    squares. The solver shares only the problem's three tensors with all other solvers.

    Args:
        tolerance: the relative gap up to which the status is SOLVED.
    """

    tolerance: NotNegative = 1e-6
    max_iterations: Count = 1000

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """The penalties that the two methods below can state."""
        return (L1, Support)

    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """Solve the problem; of `start` only the shape is used."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        initial(problem, start)
        scale = problem.quadratic.double.scale()
        quadratic = problem.quadratic.double.scaled(scale).at(None)
        penalty = problem.penalty.to(torch.float64).scaled(scale)
        root, inverse = square_root(quadratic.gram.cpu().numpy())
        targets = quadratic.cross.cpu().numpy() @ inverse
        built = time.perf_counter()
        if isinstance(penalty, Support):
            masks = penalty.mask.expand(problem.shape).cpu().numpy()
            rows = [_on_support(root, y, mask) for y, mask in zip(targets, masks, strict=True)]
        else:
            assert isinstance(penalty, L1)
            strength = torch.as_tensor(penalty.strength, dtype=torch.float64).expand(problem.shape).cpu().numpy()
            rows = [self._lasso(root, y, s) for y, s in zip(targets, strength, strict=True)]
        solved = time.perf_counter()
        weight = (torch.from_numpy(np.stack(rows)).to(scale) / scale).to(problem.quadratic.cross)
        certificate = certify(problem, weight)
        status = Status.of(Status.SOLVED, certificate, self.tolerance)
        return Solution(weight, status, certificate, 0, 0, solved - built, built - began)

    def _lasso(self, root: np.ndarray, y: np.ndarray, strength: np.ndarray) -> np.ndarray:
        free = np.isfinite(strength)
        if not free.all():
            row = np.zeros(len(free))
            row[free] = self._lasso(root[:, free], y, strength[free])
            return row
        if 0 in root.shape:  # inputs that are always zero: SLSQP takes no problem without variables
            return np.zeros(root.shape[1])
        size = float(np.linalg.norm(y)) or 1.0  # the tolerances below are for targets of length one
        return size * self._unit_lasso(root, y / size, strength / size)

    def _unit_lasso(self, root: np.ndarray, y: np.ndarray, strength: np.ndarray) -> np.ndarray:
        constraint = {
            "type": "ineq",
            "fun": lambda r: np.concatenate([strength - root.T @ r, strength + root.T @ r]),
            "jac": lambda _: np.concatenate([-root.T, root.T]),
        }
        result = minimize(
            lambda r: ((r - y) @ (r - y) / 2, r - y),
            np.zeros_like(y),
            jac=True,
            method="SLSQP",
            constraints=constraint,
            options={"maxiter": self.max_iterations, "ftol": 1e-15},
        )
        correlations = root.T @ result.x
        columns = np.concatenate([root, -root], axis=1)
        slack = np.concatenate([strength - correlations, strength + correlations])
        active = np.flatnonzero(slack <= ACTIVE * (strength.max() + 1))
        halves = np.zeros(columns.shape[1])
        if len(active):
            halves[active] = nnls(columns[:, active], y - result.x)[0]
        return halves[: len(strength)] - halves[len(strength) :]


def _on_support(root: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    row = np.zeros(len(mask))
    if mask.any():
        row[mask] = np.linalg.lstsq(root[:, mask], y)[0]
    return row
