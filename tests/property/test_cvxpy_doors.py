"""Problems of CVXPY come in where the form is known, and go out again: the least value is the same."""

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random, seeds

from convexprune import (
    L1,
    MCP,
    ElasticNet,
    GroupLasso,
    NuclearNorm,
    Problem,
    Quadratic,
    RowGroups,
    TotalVariation,
    from_cvxpy,
    solve,
    to_cvxpy,
)
from convexprune.errors import ProblemError, UnsupportedError

A, B = random(0, 12, 6).numpy(), random(1, 12, 3).numpy()
PRICES = np.array([0.1, 0.5, 1, 0, 2, 0.3])


def flat(x):
    return cp.sum_squares(A @ x - B[:, 0]) / 24


def wide(x):
    return cp.sum_squares(A @ x - B) / 24


def vector(**given):
    return cp.Variable(6, **given)


def matrix():
    return cp.Variable((6, 3))


FORMS = {
    "lasso": (vector(), lambda x: flat(x) + 0.1 * cp.norm1(x), L1),
    "prices by entry": (vector(), lambda x: flat(x) + 0.1 * cp.sum(cp.multiply(PRICES, cp.abs(x))), L1),
    "a product with prices": (vector(), lambda x: flat(x) + PRICES @ cp.abs(x) / 10 + 3, L1),
    "a price of zero": (vector(), lambda x: flat(x) + cp.norm1(cp.multiply(PRICES, x)) / 10, L1),
    "sizes and a price of zero": (vector(), lambda x: flat(x) + PRICES @ cp.abs(cp.multiply(PRICES - 1, x)), L1),
    "quad_form": (vector(), lambda x: 0.5 * cp.quad_form(x - B[:6, 0], A.T @ A) + cp.norm1(2 * x), L1),
    "a sparse quad_form": (vector(), lambda x: cp.quad_form(x - 1, sp.csc_array(A.T @ A)) + cp.norm1(x), L1),
    "sparse prices": (matrix(), lambda x: wide(x) + cp.sum(cp.multiply(sp.csc_array(B[:6] ** 2), cp.abs(x))), L1),
    "sparse targets": (matrix(), lambda x: cp.sum_squares(A @ x - sp.csc_array(B)) / 24 + cp.sum(cp.abs(x)) / 9, L1),
    "ridge": (vector(), lambda x: flat(x) + 0.1 * (cp.norm1(x) + cp.sum(cp.square(x))), L1),
    "non-negative": (vector(nonneg=True), lambda x: flat(x) + 0.1 * cp.norm1(x), ElasticNet),
    "groups": (vector(), lambda x: flat(x) + 0.2 * cp.norm(x[:2], 2) + 0.1 * cp.norm(x[3:], 2), RowGroups),
    "sparse groups": (vector(), lambda x: flat(x) + cp.norm(x[[0, 4]]) / 5 + cp.norm1(x) / 9, RowGroups),
    "responses": (matrix(), lambda x: wide(x) + 0.1 * cp.norm1(cp.vec(x, order="F")), L1),
    "rows of the variable": (matrix(), lambda x: wide(x) + 0.2 * cp.mixed_norm(x, 2, 1), GroupLasso),
    "rows summed": (matrix(), lambda x: wide(x) + 0.2 * cp.sum(cp.norm(x, 2, axis=1)), GroupLasso),
    "low rank": (matrix(), lambda x: wide(x) + 0.3 * cp.normNuc(x), NuclearNorm),
}


def least(statement: cp.Problem) -> float:
    statement.solve(solver="CLARABEL", tol_gap_abs=1e-9, tol_gap_rel=1e-9)
    return float(statement.value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", FORMS)
def test_a_known_form_has_the_least_value_and_the_solution_that_cvxpy_finds(name: str):
    x, objective, penalty = FORMS[name]
    statement = cp.Problem(cp.Minimize(objective(x)))
    solution = solve(problem := from_cvxpy(statement), tolerance=1e-10)
    assert isinstance(problem.penalty, penalty)
    expected = least(statement)
    assert solution.certificate.primal == pytest.approx(expected - (3 if "product" in name else 0), rel=1e-6)
    np.testing.assert_allclose(solution.weight, x.value.T, atol=1e-4)


def test_bounds_are_constraints():
    x = vector()
    bounds = [x >= -0.1, x[:3] <= 0.05, x[4] == 0]
    statement = cp.Problem(cp.Minimize(flat(x)), bounds)
    assert solve(from_cvxpy(statement), tolerance=1e-10).certificate.primal == pytest.approx(least(statement), rel=1e-6)


@pytest.mark.parametrize("match, objective, constraints", [
    ("huber", lambda x: cp.sum(cp.huber(x)), lambda x: []),
    ("not convex", lambda x: flat(x) - cp.norm1(x), lambda x: []),
    ("not convex", lambda x: cp.norm1(x) + cp.quad_form(x, np.diag([1, -1, 1, 1, 1, 1])), lambda x: []),
    ("not convex", lambda x: flat(x) + cp.sum(1 / cp.square(x)), lambda x: []),
    ("not convex", lambda x: cp.norm1(cp.square(x) - 1), lambda x: []),
    ("negative factor", lambda x: flat(x) - cp.quad_form(x, -np.eye(6)), lambda x: []),
    ("quad_over_lin", lambda x: flat(x) + cp.quad_over_lin(x, x[0] + 1), lambda x: []),
    ("leave out zero", flat, lambda x: [x[0] == 1]),
    ("leave out zero", flat, lambda x: [x >= 1]),
    ("not of entries of the variable", lambda x: flat(x) + cp.norm1(x - 1), lambda x: []),
    ("not of entries of the variable", lambda x: flat(x) + cp.tv(x), lambda x: []),
    ("several entries together", flat, lambda x: [cp.sum(x) == 1]),
    ("the constraint SOC", flat, lambda x: [cp.SOC(x[0], x[1:])]),
    ("overlap", lambda x: flat(x) + cp.norm(x[:3]) + cp.norm(x[2:]), lambda x: []),
    ("different factors", lambda x: flat(x) + cp.norm(cp.multiply([0, 1, 1], x[:3])), lambda x: []),
    ("several penalties", lambda x: flat(x) + cp.norm(x[:3]), lambda x: [x >= 0]),
    ("a constraint without the variable", flat, lambda x: [cp.Constant(1) <= 2]),
    ("Minimize over 2 variables", lambda x: flat(x) + cp.norm1(vector()), lambda x: []),
    ("a linear term", lambda x: flat(x) + x[0], lambda x: []),
    ("a linear term", lambda x: flat(x) + np.ones(6) @ x, lambda x: []),
])  # fmt: skip
def test_another_form_is_refused_by_its_name(match, objective, constraints):
    x = vector()
    with pytest.raises(UnsupportedError, match=match):
        from_cvxpy(cp.Problem(cp.Minimize(objective(x)), constraints(x)))


def test_a_variable_with_three_dimensions_is_refused_in_words():
    x = cp.Variable((2, 3, 2))
    with pytest.raises(UnsupportedError, match=r"a variable that is \[2, 3, 2\]"):
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + cp.norm1(x))))


def test_a_statement_whose_rows_are_the_responses_is_refused_in_words():
    x, y = (torch.randn(9, n, dtype=torch.float64) for n in (4, 3))
    quadratic = Quadratic.least_squares(x, y)
    with pytest.raises(UnsupportedError, match="perhaps its rows are the responses"):
        from_cvxpy(to_cvxpy(Problem(quadratic, L1(0.1))))


def test_what_is_no_problem_or_has_no_numbers_is_refused():
    parameter, x = cp.Parameter(nonneg=True, name="a"), vector()
    wrong_kind: Any = flat(x)
    for wrong, match in (
        (lambda: from_cvxpy(wrong_kind), r"Accepted: an object of cvxpy\.Problem"),
        (lambda: to_cvxpy(wrong_kind), r"Accepted: an object of convexprune\.Problem"),
        (lambda: from_cvxpy(cp.Problem(cp.Minimize(flat(x) + parameter * cp.norm1(x)))), "without a value: a"),
    ):
        with pytest.raises(ProblemError, match=match):
            wrong()


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from(("L1", "net", "groups", "jumps")))
def test_what_goes_out_comes_in_and_has_the_same_value(seed: int, form: str):
    x, y = random(seed, 20, 4), random(seed + 1, 20, 2)
    penalty = {
        "L1": L1(0.1),
        "net": ElasticNet(0.1, 0.2, lower=0),
        "groups": GroupLasso(0.2),
        "jumps": TotalVariation(0.1),
    }
    problem = Problem(Quadratic.least_squares(x, y, random(seed + 2, 2, 4)), penalty[form])
    statement = to_cvxpy(problem)
    assert solve(problem, tolerance=1e-9).certificate.primal == pytest.approx(least(statement), rel=1e-6)
    weight = torch.from_numpy(statement.variables()[0].value)
    assert problem.penalty.values(weight.clamp_min(0) if form == "net" else weight).isfinite().all()
    with pytest.raises(UnsupportedError, match="MCP has no statement"):
        to_cvxpy(Problem(problem.quadratic, MCP(0.1)))
