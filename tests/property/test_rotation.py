"""The search for coordinates in which N:M removes less, and its scores, against refits of rotated problems."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.constraints import SemiStructured
from convexprune.core._rotation import Readers, Writers, removed, rotation

PATTERNS = [SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(4, 8)]


def drawn(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(drawn(size, size, seed))[0]


def refitted_error(weight: torch.Tensor, gram: torch.Tensor, column: int) -> float:
    """Return the least error of a row [n] without an entry: the others make up for it."""
    others = [j for j in range(len(weight)) if j != column]
    moved = torch.linalg.solve(gram[others][:, others], gram[others, column]) * weight[column]
    delta = torch.zeros_like(weight)
    delta[others], delta[column] = moved, -weight[column]
    return float(delta @ gram @ delta)


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 10**6))
def test_a_score_is_the_error_of_the_rotated_operator_without_the_entry(rows: int, size: int, seed: int):
    weight, q, x = drawn(rows, size, seed), orthogonal(size, seed + 1), drawn(3 * size, size, seed + 2)
    gram = x.T @ x + 0.1 * torch.eye(size, dtype=torch.float64)
    scores = Readers(weight, torch.linalg.inv(gram)).scores(q)
    expected = [[refitted_error(row, q.T @ gram @ q, j) for j in range(size)] for row in weight @ q]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))
    made = drawn(size, size, seed)  # an operator that makes the vectors: its rows are rotated
    scores = Writers(made / torch.linalg.inv(gram).diagonal().sqrt()).scores(q)
    expected = [[refitted_error(row, gram, j) for j in range(size)] for row in q.T @ made]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_rotation_is_orthogonal_and_less_is_removed(pattern: SemiStructured, keeps_ones: bool):
    """The vectors lie along a few directions that only a rotation brings onto coordinates."""
    size = 16
    x = drawn(200, size, 0) * torch.logspace(0, -2, size, dtype=torch.float64) @ orthogonal(size, 1)
    inverse = torch.linalg.inv(x.T @ x / 200 + 1e-3 * torch.eye(size, dtype=torch.float64))
    blocks = [Readers(drawn(24, size, 2), inverse), Writers(drawn(size, 16, 3) * 0.1)]
    q, unit = rotation(blocks, pattern, keeps_ones), torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, unit)
    assert float(removed(blocks, q, pattern)) < 0.8 * float(removed(blocks, unit, pattern))
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(ones @ q, ones) is keeps_ones
    assert torch.equal(q, rotation(blocks, pattern, keeps_ones))  # the same bits again
