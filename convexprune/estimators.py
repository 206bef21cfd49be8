"""Estimators of scikit-learn that solve our problems: every fit has a certificate.

    from convexprune.estimators import LassoCV
    model = make_pipeline(StandardScaler(), LassoCV()).fit(x, y)

Objectives are those of scikit-learn: 1/2 mean (y - x w - b)^2 plus a penalty. `solution_` is the certified solution.
All take `fit_intercept`, `tol`, the relative duality gap to reach, and `solver`, one of `convexprune.solver_names()`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from numbers import Real
from typing import Any, Self

import numpy as np

from convexprune import core
from convexprune.core import AbstractPenalty, Problem, Quadratic
from convexprune.errors import DependencyError, ProblemError, install_hint
from convexprune.solvers import Status, path, solve

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import check_cv
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as cause:
    raise DependencyError(f"The estimators need scikit-learn, an extra: {install_hint('sklearn')}") from cause

__all__ = [
    "ElasticNet", "ElasticNetCV", "GroupLasso", "GroupLassoCV", "Lasso", "LassoCV", "MultiTaskLasso",
    "MultiTaskLassoCV",
]  # fmt: skip


@dataclass(eq=False, repr=False)
class _Linear(RegressorMixin, BaseEstimator):
    """A linear model with a penalty."""

    alpha: Any = 1.0
    fit_intercept: bool = True
    tol: float = 1e-4
    solver: str = "auto"

    def fit(self, X: Any, y: Any) -> Self:
        quadratic = self._moments(*self._admitted(X, y))
        return self._finish(solve(Problem(quadratic, self._penalty(self.alpha)), self.solver, tolerance=self.tol))

    def predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, accept_sparse="csr") @ self.coef_.T + self.intercept_

    def _admitted(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """Return inputs and targets, checked, of one dtype."""
        floats = np.float64, np.float32
        X, y = validate_data(
            self, X, y, accept_sparse="csr", multi_output=True, y_numeric=True, dtype=floats, force_writeable=True
        )
        return X, np.array(y, dtype=X.dtype)

    def _moments(self, X: Any, y: np.ndarray) -> Quadratic:
        return Quadratic.least_squares(X, y, intercept=self.fit_intercept)

    def _finish(self, solution: Any) -> Self:
        self.solution_, self.coef_, self.n_iter_ = solution, solution.weight, solution.iterations
        self.intercept_ = solution.intercept if self.fit_intercept else 0.0
        self.dual_gap_ = solution.certificate.gap
        if solution.status is not Status.SOLVED:
            warnings.warn(f"{type(self).__name__}: {solution.status.value}", ConvergenceWarning, stacklevel=3)
        return self

    def _penalty(self, alpha: Any) -> AbstractPenalty:
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse, tags.target_tags.multi_output = True, True
        return tags


@dataclass(eq=False, repr=False)
class Lasso(_Linear):
    """1/2 mean (y - x w - b)^2 + alpha |w|_1.

    Args:
        alpha: not negative; or one for each feature [n], or for each target and feature [m n] or [m 1].
        positive: weights are not negative.
    """

    positive: bool = False

    def _penalty(self, alpha: Any) -> AbstractPenalty:
        return core.ElasticNet(alpha, lower=0.0 if self.positive else -inf)


@dataclass(eq=False, repr=False)
class ElasticNet(Lasso):
    """1/2 mean (y - x w - b)^2 + alpha (l1_ratio |w|_1 + (1 - l1_ratio) |w|^2 / 2).

    Args:
        l1_ratio: in [0, 1].
    """

    l1_ratio: float = 0.5

    def _penalty(self, alpha: Any) -> AbstractPenalty:
        if not (isinstance(self.l1_ratio, Real) and 0 <= self.l1_ratio <= 1):
            raise ProblemError(
                f"l1_ratio={self.l1_ratio!r}. Accepted: a number in [0, 1]. GridSearchCV chooses among several."
            )
        alpha = np.asarray(alpha)
        lower = 0.0 if self.positive else -inf
        return core.ElasticNet(alpha * self.l1_ratio, alpha * (1 - self.l1_ratio), lower)  # pyright: ignore[reportArgumentType]


@dataclass(eq=False, repr=False)
class GroupLasso(_Linear):
    """1/2 mean (y - x w - b)^2 + alpha sum_g sqrt(size of g) |w_g|, by target.

    Args:
        groups: the number of each feature's group [n]: 0, 1, 2, ... None: a group for each feature.
    """

    groups: Any = None

    def _penalty(self, alpha: Any) -> AbstractPenalty:
        alone = np.arange(self.n_features_in_)  # pyright: ignore[reportAttributeAccessIssue]
        groups = alone if self.groups is None else np.asarray(self.groups)
        if groups.shape != alone.shape or groups.dtype.kind not in "iu" or groups.min() < 0:
            accepted = f"a whole number from 0 for each of {len(alone)} features"
            raise ProblemError(f"groups={self.groups!r}. Accepted: {accepted}.")
        _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        return core.RowGroups(groups, alpha * np.sqrt(sizes))  # pyright: ignore[reportArgumentType]


@dataclass(eq=False, repr=False)
class MultiTaskLasso(_Linear):
    """1/2 mean |y - w x - b|^2 + sum_j alpha_j |w_:j|: a feature serves all targets, or none.

    Args:
        alpha: not negative; or one for each feature [n].
    """

    def _penalty(self, alpha: Any) -> AbstractPenalty:
        return core.GroupLasso(alpha)


@dataclass(eq=False, repr=False)
class _CV(_Linear):
    """The choice of `alpha` by cross-validation: `alpha_`, `alphas_` and the errors `mse_path_` [alphas folds].

    `alphas` is their number, from the least with all weights zero to `eps` times it, or the numbers themselves.
    """

    alphas: int | Sequence[float] = 100
    eps: float = 1e-3
    cv: Any = None

    def fit(self, X: Any, y: Any) -> Self:
        X, y = self._admitted(X, y)
        quadratic, penalty = self._moments(X, y), self._penalty(self.alpha)
        self.alphas_ = np.sort(self._alphas(quadratic, penalty))[::-1]
        columns = []
        for train, test in check_cv(self.cv).split(X, y):  # pyright: ignore[reportAttributeAccessIssue]
            part = Problem(self._moments(X[train], y[train]), penalty)
            solutions = path(part, self.alphas_, self.solver, tolerance=self.tol)
            fits = (X[test] @ each.weight.T + (each.intercept if self.fit_intercept else 0.0) for each in solutions)
            columns.append([float(np.mean((y[test] - fit) ** 2)) for fit in fits])
        self.mse_path_ = np.array(columns).T
        self.alpha_ = float(self.alphas_[self.mse_path_.mean(1).argmin()])
        best = Problem(quadratic, penalty.times(self.alpha_))
        return self._finish(solve(best, self.solver, tolerance=self.tol))

    def _alphas(self, quadratic: Quadratic, penalty: AbstractPenalty) -> np.ndarray:
        is_count = isinstance(self.alphas, int | np.integer) and self.alphas > 0
        if not ((is_count and 0 < self.eps < 1) or (np.ndim(self.alphas) and np.size(self.alphas))):
            accepted = "a number of alphas, with eps in (0, 1), or a list of alphas"
            raise ProblemError(f"alphas={self.alphas!r}, eps={self.eps!r}. Accepted: {accepted}.")
        if not is_count:
            return np.asarray(self.alphas, dtype=float)
        norm = replace(penalty, ridge=0.0) if isinstance(penalty, core.ElasticNet) else penalty
        largest = float((1 / norm.to(quadratic.cross.dtype).dual_scale(quadratic.cross)).max())
        if not isfinite(largest):
            raise ProblemError("No alpha makes all weights zero, as some have no price but a ridge. List the `alphas`.")
        return np.geomspace(largest or 1.0, self.eps * (largest or 1.0), self.alphas)  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(eq=False, repr=False)
class LassoCV(_CV, Lasso):
    """`Lasso` with a cross-validated alpha; a given `alpha` is a factor of all alphas."""


@dataclass(eq=False, repr=False)
class ElasticNetCV(_CV, ElasticNet):
    """`ElasticNet` with a cross-validated alpha."""


@dataclass(eq=False, repr=False)
class GroupLassoCV(_CV, GroupLasso):
    """`GroupLasso` with a cross-validated alpha."""


@dataclass(eq=False, repr=False)
class MultiTaskLassoCV(_CV, MultiTaskLasso):
    """`MultiTaskLasso` with a cross-validated alpha."""
