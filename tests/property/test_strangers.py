"""A stranger's input: what is wrong is refused with what came and what is accepted; what only looks wrong is solved."""

from math import inf

import numpy as np
import pytest
import scipy.sparse
import torch
from test_doors import POSED, X, Y

from convexprune import (
    L1,
    Blocks,
    ElasticNet,
    GroupLasso,
    Problem,
    Quadratic,
    Status,
    certify,
    make_solver,
    path,
    problems,
    solve,
    solve_all,
)
from convexprune.errors import ConvexpruneError


def changed(value: float):
    x = X.copy()
    x[3, 2] = value
    return x


@pytest.mark.parametrize(("wrong", "says"), {
    "nan": (lambda: Quadratic.least_squares(changed(np.nan), Y), "NaN or infinite"),
    "infinite": (lambda: Quadratic.least_squares(X, Y * inf), "NaN or infinite"),
    "sparse nan": (lambda: Quadratic.least_squares(scipy.sparse.csr_array(changed(np.nan)), Y), "NaN or infinite"),
    "too large": (lambda: Quadratic.least_squares(changed(1e200), Y), "too large for their dtype"),
    "fewer targets": (lambda: Quadratic.least_squares(X, Y[:5]), r"\[30, 6\] and targets \[5, 1\]"),
    "flat inputs": (lambda: Quadratic.least_squares(X[:, 0], Y), r"Inputs \[30\]"),
    "nothing": (lambda: Quadratic.least_squares(X[:0], Y[:0]), "one token or more"),
    "no columns": (lambda: Quadratic.least_squares(X[:, :0], Y), "one of each at least"),
    "text": (lambda: Quadratic.least_squares([["a"]], [1.0]), "array of numbers"),
    "two dtypes": (lambda: Quadratic.least_squares(X.astype(np.float32), Y), "both must be float32"),
    "halves": (lambda: Quadratic.least_squares(X.astype(np.float16), Y.astype(np.float16)), "float16"),
    "bfloat16": (lambda: Quadratic.least_squares(torch.ones(3, 2).bfloat16(), torch.ones(3).bfloat16()), "bfloat16"),
    "complex": (lambda: Quadratic.least_squares(X.astype(complex), Y), "complex128"),
    "meta": (lambda: Quadratic.least_squares(torch.ones(3, 2, device="meta"), torch.ones(3)), "in memory"),
    "a sparse tensor": (lambda: Quadratic.least_squares(torch.eye(3).to_sparse(), torch.ones(3)), "dense"),
    "a mask": (lambda: Quadratic.least_squares(np.ma.masked_greater(X, 1), Y), "without a mask"),
    "a short anchor": (lambda: Quadratic.least_squares(X, Y, np.zeros(5)), r"`anchor` is \[5\]; needed is \[1, 6\]"),
    "no strengths": (lambda: L1(np.ones(0)), "without a number"),  # pyright: ignore[reportArgumentType]
    "a bound of text": (lambda: ElasticNet(0.1, lower="a"), "`lower` is of type str"),  # pyright: ignore[reportArgumentType]
    "one block": (lambda: Blocks(L1(0.1)), "pairs of a penalty"),  # pyright: ignore[reportArgumentType]
    "a truth for times": (lambda: POSED.quadratic.repeated(True), "times=True"),
    "no times": (lambda: POSED.quadratic.repeated(-1), "times=-1"),
    "a number more": (lambda: POSED.quadratic + 1, "A value of type int was given"),  # pyright: ignore[reportOperatorIssue]
    "another shape": (lambda: POSED.quadratic + POSED.quadratic.columns(torch.arange(3)), "have no sum"),
    "nothing to certify": (lambda: certify(None, X[0]), "type NoneType was given"),  # pyright: ignore[reportArgumentType]
    "no solver": (lambda: list(problems.check("fista")), "type str was given"),  # pyright: ignore[reportArgumentType]
    "no penalty": (lambda: list(problems.check_penalty(L1)), "was given"),  # pyright: ignore[reportArgumentType]
    "negative": (lambda: L1(-1.0), "negative or NaN"),
    "text strength": (lambda: L1("0.1"), "is of type str"),  # pyright: ignore[reportArgumentType]
    "group": (lambda: GroupLasso(-1.0), "not negative"),
    "another width": (lambda: Problem(POSED.quadratic, L1(np.ones(4))), "does not broadcast"),  # pyright: ignore[reportArgumentType]
    "a list": (lambda: solve([POSED]), "A problem of type list"),  # pyright: ignore[reportArgumentType]
    "a quadratic": (lambda: solve(POSED.quadratic), "of type Quadratic"),  # pyright: ignore[reportArgumentType]
    "numbers": (lambda: solve_all([1, 2]), "of type int"),  # pyright: ignore[reportArgumentType]
    "starts": (lambda: solve_all([POSED], starts=[None, None]), "2 starts for 1 problems"),
    "a start of nan": (lambda: solve(POSED, start=np.full(6, np.nan)), "`start` holds"),
    "a long start": (lambda: solve(POSED, start=np.zeros(7)), r"\[1, 7\]; this problem needs \[1, 6\]"),
    "whole numbers": (lambda: certify(POSED, np.zeros(6, int)), "floating point"),
    "a function": (lambda: solve(POSED, make_solver), "The solver is of type function"),  # pyright: ignore[reportArgumentType]
    "settings": (lambda: solve(POSED, make_solver("fista"), tolerance=1e-3), "has its own"),
    "a tolerance": (lambda: solve(POSED, tolerance=-1), "greater than or equal to 0"),
    "a relaxation that diverges": (lambda: make_solver("admm", relaxation=2.0), "less than 2"),
    "a number for a path": (lambda: path(POSED, 0.1), "a list of positive numbers"),  # pyright: ignore[reportArgumentType]
    "texts for a path": (lambda: path(POSED, ["a"]), "a list of positive numbers"),  # pyright: ignore[reportArgumentType]
}.values())  # fmt: skip
def test_a_stranger_is_told_what_came_and_what_is_accepted(wrong, says: str):
    with pytest.raises(ConvexpruneError, match=says):
        wrong()


def test_what_only_looks_wrong_is_solved():
    pandas = pytest.importorskip("pandas")
    wide, twice, dead = X[:4], np.c_[X, X[:, 0]], np.c_[X, 0 * X[:, 0]]
    for x, y in (
        (X, (Y[:, 0] > 1).astype(int)), (X, Y[:, 0] > 1), (wide, Y[:4, 0]), (twice, Y[:, 0]), (dead, Y[:, 0]),
        (X, 0 * Y[:, 0]), (pandas.DataFrame(X), pandas.Series(Y[:, 0])), (X, Y[:, 0]),
    ):  # fmt: skip
        for strength in (0.1, 0.0, [0.1] * x.shape[1]):
            solution = solve(Problem(Quadratic.least_squares(x, y), L1(strength)))  # pyright: ignore[reportArgumentType]
            assert solution.status is Status.SOLVED or strength == 0.0
            assert isinstance(solution.weight, np.ndarray) and solution.weight.shape == (x.shape[1],)
