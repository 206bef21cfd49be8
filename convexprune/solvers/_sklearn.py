"""scikit-learn's coordinate descent on the Gram matrix, in compiled code: for a few rows."""

import time
import warnings
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

from convexprune._setting_types import Count, NotNegative, Positive
from convexprune.core import L1, AbstractPenalty, ElasticNet, Problem, certify
from convexprune.errors import UnsupportedError
from convexprune.solvers._base import AbstractSolver, Solution, Status, initial, require_penalty
from convexprune.solvers._working_set import prices

REFUSED = (
    "ScikitLearn takes positive and finite strengths, a ridge in proportion to their squares in each row, and rows of "
    "weights that are free or not negative. `working-set` takes all."
)
SAMPLE = 4  # rows
FIRST, SMALLEST = 0.03, 1e-12  # shares of the tolerance, which scikit-learn has in units of the energy


@dataclass(frozen=True)
class ScikitLearn(AbstractSolver):
    """`sklearn.linear_model.enet_path` row by row in float64, in coordinates where each row has one strength.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of passes over the inputs.
        largest: end with `ITERATION_LIMIT` where rows have more non-zero weights on average, or one meets the limit.
    """

    tolerance: NotNegative = 1e-4
    max_iterations: Count = 1000
    largest: Positive | None = None

    @property
    def penalties(self) -> tuple[type[AbstractPenalty], ...]:
        """L1, and the elastic net, of positive and finite strengths; bounds are zero or none."""
        return (L1, ElasticNet)

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`; without a start the weight is zero."""
        require_penalty(self, type(problem.penalty))
        began = time.perf_counter()
        q = problem.quadratic.double.at(None)
        strengths, ridges, lower, upper = (each.cpu().numpy() for each in prices(problem.penalty, q.cross))
        closed = ((lower == 0) | (lower == -inf)) & (lower == lower[:, :1]) & (upper == inf)
        if not (closed & (strengths > 0) & (strengths < inf)).all():
            raise UnsupportedError(REFUSED)
        weight, most = np.zeros(problem.shape), 0
        if start is not None:
            weight[:] = problem.penalty.prox(initial(problem, start), 0.0).cpu().numpy()
        gram, cross, energy = (tensor.cpu().contiguous().numpy() for tensor in (q.gram, q.cross, q.energy))
        with warnings.catch_warnings(), config_context(skip_parameter_validation=True):
            warnings.simplefilter("ignore", ConvergenceWarning)
            for i in np.flatnonzero(energy > 0):
                price, unit = strengths[i].max(), strengths[i] / strengths[i].max()
                ridge = ridges[i] / unit**2
                if np.ptp(ridge) > 1e-14 * ridge[0]:
                    raise UnsupportedError(REFUSED)
                row = gram if (unit == 1).all() else gram / np.outer(unit, unit)
                row = _Row(row, cross[i] / unit, energy[i], price, ridge[0], lower[i, 0] == 0)
                answer, passes = row.solved(weight[i] * unit, self.tolerance, self.max_iterations)
                weight[i], most = answer / unit, max(most, passes)
                many = np.count_nonzero(weight[: i + 1]) > (self.largest or inf) * max(i + 1, SAMPLE)
                if many or (self.largest and most >= self.max_iterations):
                    most = self.max_iterations
                    break
        found = problem.penalty.prox(torch.from_numpy(weight).to(problem.quadratic.cross), 0.0)
        certificate = certify(problem, found)
        said = Status.SOLVED if most < self.max_iterations else Status.ITERATION_LIMIT
        status = Status.of(said, certificate, self.tolerance)
        return Solution(found, status, certificate, most, 0, time.perf_counter() - began)


class _Row(NamedTuple):
    """1/2 v H v' - g v' + e/2 + price |v|_1 + ridge |v|^2 / 2 of a row v [n]."""

    gram: np.ndarray
    cross: np.ndarray
    energy: float
    price: float
    ridge: float
    positive: bool

    def solved(self, start: np.ndarray, tolerance: float, passes: int) -> tuple[np.ndarray, int]:
        """Return the answer and the number of passes; the start is the answer where rounding makes H indefinite."""
        total = self.price + self.ridge
        inputs, target = np.zeros((1, len(start)), order="F"), np.array([self.energy**0.5])
        made, share = 0, FIRST
        while made < passes:
            _, path, gaps, numbers = enet_path(
                inputs, target, l1_ratio=self.price / total, alphas=[total], precompute=self.gram, Xy=self.cross,
                coef_init=start, positive=self.positive, tol=tolerance * share, max_iter=passes - made,
                check_input=False, return_n_iter=True,
            )  # fmt: skip
            answer, made = path[:, 0], made + numbers[0]
            residual = self.cross - self.gram @ answer
            value = (self.energy - answer @ (self.cross + residual)) / 2
            value += self.price * abs(answer).sum() + self.ridge * (answer @ answer) / 2
            if not value < inf:
                return start, passes
            start, share = answer, share * min(0.1, value / self.energy)
            if gaps[0] <= tolerance * value or share < SMALLEST:
                break
        return start, made
