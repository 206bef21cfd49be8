"""Problems of CVXPY as problems of ours, where the form is known, and ours as problems of CVXPY."""

from collections.abc import Iterator
from math import inf
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convexprune.core import L1, AbstractPenalty, ElasticNet, GroupLasso, NuclearNorm, Problem, Quadratic, RowGroups
from convexprune.core._arrays import DataFormat, require_type
from convexprune.errors import ProblemError, UnsupportedError
from convexprune.solvers._base import square_root
from convexprune.solvers._statements import Constraints, stated

KNOWN = (
    "`from_cvxpy` knows the sum of a quadratic (sum_squares, square, quad_form) and of one penalty (norm1 or abs, norm "
    "of groups, normNuc) of one variable, and bounds of its entries that include zero."
)
SAME = 1e-12  # of the largest entry: the Gram matrices of responses


def to_cvxpy(problem: Problem) -> cp.Problem:
    """State a problem in CVXPY. Its only variable is V [m n].

    Args:
        problem: min q + p.

    Returns:
        The problem, with the same objective.

    Raises:
        UnsupportedError: the penalty has no statement in CVXPY.
    """
    require_type(problem, Problem)
    q = problem.quadratic.double.at(None)
    root, inverse = square_root(q.gram.cpu().numpy())
    targets, weight, constraints = q.cross.cpu().numpy() @ inverse, cp.Variable(problem.shape), Constraints()
    rest = float(q.energy.sum()) - float((targets**2).sum())
    price = stated(problem.penalty, weight, constraints)
    return cp.Problem(cp.Minimize(cp.sum_squares(weight @ root.T - targets) / 2 + rest / 2 + price), constraints)


def from_cvxpy(problem: cp.Problem) -> Problem:
    """Return a problem of CVXPY as a problem of ours.

    A variable [n] is a weight of one row. A variable X [n m], whose columns are responses, becomes the weight V = X'.
    Constants in the objective are dropped.

    Args:
        problem: to minimise a quadratic plus a penalty of one variable.

    Returns:
        The problem, which `solve` answers in NumPy.

    Raises:
        ProblemError: a parameter has no value.
        UnsupportedError: an atom or a constraint has no form here, or CVXPY does not know the problem as convex.
    """
    require_type(problem, cp.Problem)
    if empty := [str(each) for each in problem.parameters() if each.value is None]:
        raise ProblemError(f"Parameters without a value: {', '.join(empty)}. Set the value of each.")
    variables = problem.variables()
    if len(variables) != 1 or not isinstance(problem.objective, cp.Minimize):
        raise _refusal(f"{type(problem.objective).__name__} over {len(variables)} variables")
    if not problem.is_dcp():
        raise _refusal("a form that is not convex by CVXPY's rules")
    before = variables[0].value
    variables[0].save_value(np.zeros(variables[0].shape))
    try:
        parts = _Parts(variables[0])
        for atom, factor in _terms(problem.objective.args[0], np.ones(())):
            parts.add(atom, factor)
        for condition in problem.constraints:
            parts.bound(condition)
        return parts.problem()
    finally:
        variables[0].save_value(before)


def _refusal(found: str) -> UnsupportedError:
    return UnsupportedError(f"The problem has {found}. {KNOWN}")


def _terms(atom: Any, factor: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Split <factor, atom> into atoms that are no sums and no multiples, with the factors of their entries."""
    kind = type(atom).__name__
    if atom.is_constant():
        return
    fixed = [_dense(each) for each in atom.args if each.is_constant()]
    if kind == "AddExpression":
        for part in atom.args:
            yield from _terms(part, factor if part.shape == atom.shape else np.full(part.shape, factor.sum()))
    elif kind == "NegExpression":
        yield from _terms(atom.args[0], -factor)
    elif kind in ("Sum", "norm1") and atom.axis is None and not atom.args[0].is_affine():
        yield from _terms(atom.args[0], np.full(atom.args[0].shape, factor))
    elif kind in ("multiply", "DivExpression") or (kind == "MulExpression" and fixed and atom.ndim == 0):
        (inner,) = (each for each in atom.args if not each.is_constant())
        number = 1 / fixed[0] if kind == "DivExpression" else fixed[0]
        yield from _terms(inner, np.broadcast_to(factor * number, inner.shape))
    else:
        yield atom, factor.ravel(order="F")


def _dense(expression: Any) -> Any:
    value = expression.value
    return value.toarray() if sp.issparse(value) else value


class _Parts:
    """The quadratic and the prices of the entries of a variable, in the order of its columns."""

    def __init__(self, x: cp.Variable) -> None:
        given = {name for name, value in x.attributes.items() if value is not None and value is not False}
        if x.ndim > 2 or given - {"nonneg"}:
            raise _refusal(f"a variable that is {', '.join(sorted(given - {'nonneg'})) or list(x.shape)}")
        self.x, self.size = x, x.size
        self.n, self.m = (*x.shape, 1, 1)[:2]
        self.gram, self.cross, self.energy = sp.csc_array((x.size, x.size)), np.zeros(x.size), np.zeros(self.m)
        self.l1, self.lower, self.upper = (
            np.zeros(x.size),
            np.full(x.size, 0.0 if given else -inf),
            np.full(x.size, inf),
        )
        self.groups, self.nuclear = list[tuple[np.ndarray, float]](), 0.0

    def add(self, atom: Any, factor: np.ndarray) -> None:
        kind, (inner, *rest) = type(atom).__name__, atom.args or [atom]
        exponent = getattr(getattr(atom, "p", 0), "value", getattr(atom, "p", 0))
        known = inner.is_affine() and all(each.is_constant() for each in rest) and not (factor < 0).any()
        if known and kind == "quad_over_lin" and atom.axis is None:
            self._square(*self._affine(inner), factor / atom.args[1].value)
        elif known and kind == "QuadForm":
            values, vectors = np.linalg.eigh(sp.csc_array(atom.args[1].value).toarray())
            slope, constant = self._affine(inner)
            self._square(sp.csc_array(slope @ vectors), vectors.T @ constant, factor * values.clip(0))
        elif known and kind.startswith("Power") and exponent == 2:
            self._square(*self._affine(inner), factor)
        elif known and (kind == "abs" or (kind == "norm1" and atom.axis is None)):
            entries, sizes = self._entries(inner)
            np.add.at(self.l1, entries, np.broadcast_to(factor, sizes.shape) * sizes)
        elif known and kind.startswith("Pnorm") and exponent == 2:
            entries, sizes = (each.reshape(inner.shape, order="F") for each in self._entries(inner))
            axis = -1 if atom.axis is None else atom.axis
            entries, sizes = (np.moveaxis(e.ravel() if atom.axis is None else e, axis, -1) for e in (entries, sizes))
            if np.ptp(sizes):
                raise _refusal("a length of entries with different factors")
            prices = np.broadcast_to(factor * sizes.max(), entries.size // entries.shape[-1])
            self.groups += zip(entries.reshape(-1, entries.shape[-1]), prices.tolist(), strict=True)
        elif known and kind == "normNuc" and inner is self.x:
            self.nuclear += float(factor[0])
        else:
            found = "a linear term" if atom.is_affine() else f"{kind} of {type(inner).__name__}"
            raise _refusal(found + " with a negative factor" * bool((factor < 0).any()))

    def bound(self, condition: Any) -> None:
        kind = type(condition).__name__
        if kind not in ("Inequality", "Equality", "NonNeg", "NonPos", "Zero") or not condition.expr.is_affine():
            raise _refusal(f"the constraint {kind}")
        if condition.expr.is_constant():
            raise _refusal("a constraint without the variable")
        slope, constant = self._affine(condition.expr)
        if (np.diff(slope.indptr) != 1).any():
            raise _refusal("a constraint on several entries together")
        ends, falls = -constant / slope.data, (slope.data < 0) ^ (kind == "NonNeg")
        both = np.full(len(ends), kind in ("Equality", "Zero"))
        np.minimum.at(self.upper, slope.indices[both | ~falls], ends[both | ~falls])
        np.maximum.at(self.lower, slope.indices[both | falls], ends[both | falls])

    def problem(self) -> Problem:
        gram = self.gram[: self.n, : self.n].toarray()
        apart = abs(self.gram - sp.kron(sp.eye_array(self.m), gram, format="csc")).max()
        if apart > SAME * abs(gram).max(initial=0):
            raise _refusal("columns, the responses, with different Gram matrices (perhaps its rows are the responses)")
        data = DataFormat(numpy=True, flat=self.x.ndim == 1)
        return Problem(Quadratic(gram, self._rows(self.cross), self.energy, data=data), self._penalty())  # pyright: ignore[reportArgumentType]

    def _affine(self, expression: Any) -> tuple[sp.csc_array, np.ndarray]:
        """Return J [size k] and c [k] with the expression J' x + c."""
        slope = expression.grad[self.x]
        slope = sp.csc_array(np.atleast_2d(slope) if np.isscalar(slope) else slope)
        slope.eliminate_zeros()
        return slope, np.asarray(_dense(expression), dtype=float).ravel(order="F")

    def _entries(self, expression: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers and the factors of the entries that an expression consists of; a factor 0 has number 0."""
        slope, constant = self._affine(expression)
        counts = np.diff(slope.indptr)
        if constant.any() or (counts > 1).any():
            raise _refusal(f"a penalty of {type(expression).__name__}, not of entries of the variable")
        entries, sizes = np.zeros_like(counts), np.zeros(len(counts))
        entries[counts == 1], sizes[counts == 1] = slope.indices, abs(slope.data)
        return entries, sizes

    def _square(self, slope: sp.csc_array, constant: np.ndarray, factor: np.ndarray) -> None:
        weights = 2 * np.broadcast_to(factor, constant.shape)
        self.gram = self.gram + slope @ sp.diags_array(weights) @ slope.T
        self.cross -= slope @ (weights * constant)
        first = np.minimum(slope.indptr[:-1], max(slope.nnz - 1, 0))
        rows = slope.indices[first] // self.n if slope.nnz else np.zeros_like(first)
        np.add.at(self.energy, rows, weights * constant**2)

    def _rows(self, entries: np.ndarray) -> np.ndarray:
        return entries.reshape(self.m, self.n)

    def _penalty(self) -> AbstractPenalty:
        bounded = bool((self.lower > -inf).any() or (self.upper < inf).any())
        if (self.lower > 0).any() or (self.upper < 0).any():
            raise _refusal("bounds that leave out zero")
        l1, columns = self._rows(self.l1), self.m > 1 and bool(self.groups)
        if bounded + bool(self.groups) + (self.nuclear > 0) + ((self.nuclear > 0 or columns) and self.l1.any()) > 1:
            raise _refusal("several penalties, or a penalty and bounds")
        if self.nuclear:
            return NuclearNorm(self.nuclear)
        if bounded:
            return ElasticNet(l1, lower=self._rows(self.lower), upper=self._rows(self.upper))  # pyright: ignore[reportArgumentType]
        if not self.groups:
            return L1(l1)  # pyright: ignore[reportArgumentType]
        entries, prices = np.concatenate([group for group, _ in self.groups]), np.array([p for _, p in self.groups])
        if len(np.unique(entries)) < len(entries):
            raise _refusal("groups that overlap")
        if not columns:
            labels = np.full(self.n, len(prices))
            for label, (group, _) in enumerate(self.groups):
                labels[group] = label
            return RowGroups(labels, np.append(prices, 0.0)[: labels.max() + 1], l1)  # pyright: ignore[reportArgumentType]
        places = [np.unique(group % self.n) for group, _ in self.groups]
        if any(len(place) > 1 for place in places) or any(len(group) < self.m for group, _ in self.groups):
            raise _refusal("groups that are no rows of the variable")
        strength = np.zeros(self.n)
        strength[np.concatenate(places)] = prices
        return GroupLasso(strength)  # pyright: ignore[reportArgumentType]
