"""Cholesky factors in blocks: those of torch, their bound on rounding, and what is not positive definite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convexprune.core import _symmetric as factor
from convexprune.core._relaxation import rounding
from convexprune.core._symmetric import cholesky


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(factor, "WIDE", 9)
    monkeypatch.setattr(factor, "BLOCK", 4)


def gram_of(n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    inputs = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return inputs @ inputs.T / n


SIZES = st.integers(1, 23)  # below, at and above a block, a multiple of it or not, and the least width that is blocked


@given(SIZES, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_blocks_give_the_factor_of_torch(n, seed, dtype):
    gram = gram_of(n, seed, dtype)
    before = gram.clone()
    found = cholesky(gram)
    assert found is not None
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9  # the factor of an ill-conditioned matrix moves with rounding
    torch.testing.assert_close(found, torch.linalg.cholesky(gram), atol=tolerance, rtol=tolerance)
    assert torch.equal(found, found.tril()) and torch.equal(gram, before)
    assert found.stride() == torch.linalg.cholesky(gram).stride()
    wrong = (found.double() @ found.double().T - gram.double()).abs().max()
    assert wrong <= rounding(gram)


@given(SIZES, st.data())
def test_what_is_not_positive_definite_has_none_wherever_that_shows(n, data):
    gram = gram_of(n, 0, torch.float64)
    at = data.draw(st.integers(0, n - 1))
    gram[at, at] = -1.0
    assert cholesky(gram) is None
    gram[at, at] = torch.nan
    assert cholesky(gram) is None
