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

from convexprune._setting_types import Count
from convexprune.core import Problem
from convexprune.errors import UnsupportedError
from convexprune.solvers._base import Solution, Status, certified, initial, require_penalty
from convexprune.solvers._working_set import AbstractByRow, prices

REFUSED = (
    "ScikitLearn takes positive and finite strengths, a ridge in proportion to their squares in each row, and rows of "
    "weights that are free or not negative. `working-set` takes all."
)
SAMPLE = 4  # rows
FIRST, LEAST = 0.01, 1e-14  # scikit-learn's tolerance is of weights; the gap falls with the square of their error


@dataclass(frozen=True)
class ScikitLearn(AbstractByRow):
    """`sklearn.linear_model.enet_path` row by row in float64, in coordinates where each row has one strength.

    Args:
        tolerance: the requested relative gap.
        max_iterations: the largest number of passes over the inputs.
        largest: end with `ITERATION_LIMIT` where rows have more non-zero weights on average, or one meets the limit.
    """

    max_iterations: Count = 1000

    @torch.no_grad()
    def solve(self, problem: Problem, start: Tensor | None = None) -> Solution:
        """See `AbstractSolver.solve`; without a start the weight is zero."""
        require_penalty(self, type(problem.penalty))
        began, weight = time.perf_counter(), np.zeros(problem.shape)
        rows = _rows(problem)
        if start is not None:
            weight[:] = problem.penalty.inside(initial(problem, start)).cpu().numpy()
        runs, most, near = _runs(rows), 0, FIRST * self.tolerance**0.5
        while True:
            made, limit = self._descend(rows, weight, runs, near)
            most += made
            found = problem.penalty.inside(torch.from_numpy(weight).to(problem.quadratic.cross))
            said = Status.ITERATION_LIMIT if limit else Status.SOLVED
            alike = [(said, most, 0)] * problem.quadratic.problems
            solution = certified(problem, found, alike, self.tolerance, began)
            open_parts = [part.status is not Status.SOLVED for part in solution.each]
            if limit or near < LEAST or not any(open_parts):
                return solution
            going, near = np.repeat(open_parts, len(weight) // len(open_parts)), near / 10
            runs = [[i] for i in np.flatnonzero(going).tolist()]

    def _descend(self, rows: "list[_Row]", weight: np.ndarray, runs: list[list[int]], near: float) -> tuple[int, bool]:
        """Write answers into the weight; return the number of passes, and True if a limit was met."""
        most, used, seen = 0, 0, 0
        with warnings.catch_warnings(), config_context(skip_parameter_validation=True):
            warnings.simplefilter("ignore", ConvergenceWarning)
            for run in runs:
                prices = [rows[i].price for i in run]
                weight[run], passes = rows[run[0]].solved(weight[run[0]], prices, near, self.max_iterations)
                most, used, seen = max(most, passes), used + np.count_nonzero(weight[run]), seen + len(run)
                many = seen < len(weight) and used > (self.largest or inf) * max(seen, SAMPLE)
                if self.largest is not None and (many or passes >= self.max_iterations):
                    return self.max_iterations, True
        return most, most >= self.max_iterations


class _Row(NamedTuple):
    """1/2 v H v' - g v' + e/2 + price (|v|_1 + ridge |v|^2 / 2) of a row v [n], in the coordinates v * unit."""

    gram: np.ndarray
    cross: np.ndarray
    energy: float
    price: float
    ridge: float
    positive: bool
    unit: np.ndarray

    def precedes(self, other: "_Row") -> bool:
        """Return True if the other row is this row at a smaller price."""
        alike = self.gram is other.gram and self.ridge == other.ridge and self.positive == other.positive
        return alike and other.price < self.price and np.array_equal(self.cross, other.cross)

    def solved(self, start: np.ndarray, prices: list[float], near: float, passes: int) -> tuple[np.ndarray, int]:
        """Return the answer at each of the falling prices [k n], and the most passes.

        The start is the answer where rounding makes H indefinite.
        """
        if not self.energy > 0:
            return np.zeros((len(prices), len(start))), 0
        inputs, target, whole = np.zeros((1, len(start)), order="F"), np.array([self.energy**0.5]), 1 + self.ridge
        _, path, _, made = enet_path(
            inputs, target, l1_ratio=1 / whole, alphas=np.array(prices) * whole, precompute=self.gram, Xy=self.cross,  # pyright: ignore[reportArgumentType]
            coef_init=start * self.unit, positive=self.positive, tol=near, max_iter=passes, check_input=False,
            return_n_iter=True,
        )  # fmt: skip
        answers = path.T / self.unit
        finite = np.isfinite(answers).all()
        return (answers, max(made)) if finite else (np.tile(start, (len(prices), 1)), passes)


def _runs(rows: list[_Row]) -> list[list[int]]:
    """Return the numbers of rows in runs, each a path of falling prices."""
    runs = [[0]]
    for i in range(1, len(rows)):
        if rows[i - 1].precedes(rows[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _rows(problem: Problem) -> list[_Row]:
    """Return the rows about zero, in float64."""
    q = problem.quadratic.double.at(None)
    strengths, ridges, lower, upper = (each.cpu().numpy() for each in prices(problem.penalty, q.cross))
    known = ((lower == 0) | (lower == -inf)) & (lower == lower[:, :1]) & (upper == inf)
    known &= (strengths > 0) & (strengths < inf)
    if not known.all():
        raise UnsupportedError(REFUSED)
    gram, cross, energy = (tensor.cpu().contiguous().numpy() for tensor in (q.gram, q.cross, q.energy))
    rows = []
    for i, price in enumerate(strengths.max(1)):
        unit = strengths[i] / price
        ridge = ridges[i] / (unit**2 * price)
        if np.ptp(ridge) > 1e-14 * ridge[0]:
            raise UnsupportedError(REFUSED)
        own = gram if (unit == 1).all() else gram / np.outer(unit, unit)
        rows.append(_Row(own, cross[i] / unit, energy[i], price, ridge[0], lower[i, 0] == 0, unit))
    return rows
