"""What is no real number, no factor or no group is refused in words; other numbers are taken, whatever their type."""

from typing import Any

import numpy as np
import pytest
import torch

from convexprune import (
    L1,
    MCP,
    Blocks,
    ElasticNet,
    GroupLasso,
    Problem,
    Quadratic,
    ReverseHuber,
    RowGroups,
    TotalVariation,
    solve,
    solve_all,
)
from convexprune.errors import ProblemError

ONES, COMPLEX = torch.ones(2, 3), torch.tensor([1j, 1, 1])
Q = Quadratic(torch.eye(3), ONES, torch.full((2,), 9.0))
WRONG: dict[str, tuple[Any, str]] = {
    "L1": (lambda: L1(COMPLEX), r"`strength` is torch.complex64. Accepted: real numbers"),
    "a complex number": (lambda: L1(1j), "`strength` is torch.complex128"),  # pyright: ignore[reportArgumentType]
    "ridge": (lambda: ElasticNet(0.1, COMPLEX), "`ridge` is torch.complex64"),
    "lower": (lambda: ElasticNet(lower=COMPLEX), "`lower` is torch.complex64"),
    "columns": (lambda: GroupLasso(COMPLEX), "`strength` is torch.complex64"),
    "jumps": (lambda: TotalVariation(0.1, COMPLEX[:, None]), "`l1` is torch.complex64"),
    "curvature": (lambda: ReverseHuber(COMPLEX, ONES), "`curvature` is torch.complex64"),
    "damping": (lambda: Quadratic.damping(ONES, COMPLEX), "`strength` is torch.complex64"),
    "an anchor": (lambda: Quadratic.least_squares(ONES, ONES[:, 0], COMPLEX), "`anchor` is torch.complex64"),
    "no strength": (lambda: L1(torch.zeros(0)), r"`strength` is \[0\], without a number"),
    "no upper bound": (lambda: ElasticNet(upper=torch.zeros(0)), r"`upper` is \[0\], without a number"),
    "complex groups": (lambda: RowGroups(COMPLEX, 1.0), "`groups` is torch.complex64 .*whole numbers"),
    "no groups": (lambda: RowGroups(torch.zeros(2, 0, dtype=torch.int64), 1.0), r"\[2, 0\]; needed are whole numbers"),
    "prices of groups": (lambda: RowGroups([0, 0, 1], torch.ones(1, 1, 2)), r"\[1, 1, 2\] for 2 groups"),  # pyright: ignore[reportArgumentType]
    "reach": (lambda: MCP(1.0, reach="a"), "reach of MCP is 'a'; it must be a number"),  # pyright: ignore[reportArgumentType]
    "blocks": (lambda: Blocks(((L1(0.1), 1.5), (L1(0.1), 1.5))), "a number of columns above 0"),  # pyright: ignore[reportArgumentType]
    "a sum": (lambda: Q + 1, "A value of type int was given. Accepted: an object of convexprune.Quadratic"),  # pyright: ignore[reportOperatorIssue]
    "a text": (lambda: Q * "a", "times 'a' is no sum of squares; the factor is a finite number"),  # pyright: ignore[reportOperatorIssue]
    "a factor by row": (lambda: Q * torch.ones(2), "factor is a finite number"),  # pyright: ignore[reportOperatorIssue]
    "infinity": (lambda: Q * float("inf"), "times inf is no sum"),
    "a negative penalty": (lambda: L1(0.1).times(-1), "times -1. Accepted: a positive, finite factor"),
    "starts": (lambda: solve_all([Problem(Q, L1(0.1))] * 2, starts=5), "1 starts for 2 problems"),  # pyright: ignore[reportArgumentType]
    "an anchor of NaN": (
        lambda: Quadratic.least_squares(ONES, ONES[:, 0], torch.full((3,), torch.nan)),
        "Inputs, targets or the anchor hold a value that is NaN",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_such_number_is_refused(case: str):
    make, message = WRONG[case]
    with pytest.raises(ProblemError, match=message):
        make()


def test_an_energy_may_be_a_number_in_float32_too():
    for cross in (torch.ones(3), np.ones(3, np.float32)):
        assert Quadratic(torch.eye(3), cross, 9.0).energy.tolist() == [9.0]  # pyright: ignore[reportArgumentType]


def test_numbers_of_groups_may_be_of_any_size_and_of_any_whole_type():
    near = RowGroups([0, 2, 0], 0.3)  # pyright: ignore[reportArgumentType]
    for groups in ([5, 10**12, 5], np.array([0, 1, 0], np.uint64)):
        found = RowGroups(groups, 0.3)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found.values(ONES), near.values(ONES))
        assert solve(Problem(Q, found)).certificate == solve(Problem(Q, near)).certificate


def test_blocks_may_come_one_after_another():
    parts = ((L1(0.1), width) for width in (1, 2))
    assert Problem(Q, Blocks(parts)).value(ONES) == Problem(Q, L1(0.1)).value(ONES)  # pyright: ignore[reportArgumentType]
