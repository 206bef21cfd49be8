"""The moments of many short windows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from convexprune._layerwise.statistics import FEW, CalibrationStatistics
from convexprune.core._moments import ErrorMoments, Moments

WIDTH, WINDOWS, LENGTH = 6, 50, 32
X, LACKING = torch.randn(2, WINDOWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).unbind(0)
JUDGED = 14  # the last ones


WEIGHTS = torch.rand(WINDOWS - JUDGED, LENGTH, generator=torch.Generator().manual_seed(1))


def counted(
    batch: int, x: Tensor = X, lacking: Tensor = LACKING, weights: Tensor | None = None
) -> CalibrationStatistics:
    folds = CalibrationStatistics(WIDTH, torch.device("cpu"), weights=weights)
    for part, held_out in ((slice(-JUDGED), False), (slice(-JUDGED, None), True)):
        for inputs, change in zip(x[part].split(batch), lacking[part].split(batch), strict=True):
            own = inputs.clone()
            folds.add(own, change, held_out)
            own.zero_()  # the caller's memory is the caller's again
    return folds


def test_short_windows_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    tokens, changes = list[int](), list[int]()
    add, correct = Moments.add, ErrorMoments.add

    def watched(self: Moments, pruned: Tensor, *rest: Any, **named: Any) -> None:
        tokens.append(len(pruned))
        add(self, pruned, *rest, **named)

    def correcting(self: ErrorMoments, x: Tensor, *rest: Any) -> None:
        changes.append(len(x))
        correct(self, x, *rest)

    monkeypatch.setattr(Moments, "add", watched)
    monkeypatch.setattr(ErrorMoments, "add", correcting)
    folds = counted(1)
    assert folds.tokens == 36 * LENGTH and folds.held_out.tokens == 14 * LENGTH
    for products in (tokens, changes):
        assert sum(products) == WINDOWS * LENGTH
        assert sorted(products)[3:] == [FEW] * (len(products) - 3)  # one rest of each half and of what judges
    tokens.clear()
    CalibrationStatistics(WIDTH, torch.device("cpu")).add(torch.ones(2, FEW, WIDTH), None, False)
    assert tokens == [FEW, FEW]


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_no_token_is_lost_whatever_the_batches(batch: int):
    folds, one = counted(batch), counted(1)
    fitted = X[:-JUDGED].double()
    for half, windows in zip(folds.halves, (fitted[::2], fitted[1::2]), strict=True):
        assert half.tokens == 18 * LENGTH
        flat = windows.flatten(0, 1)
        torch.testing.assert_close(half.gram, (flat.T @ flat / len(flat)).float())
    flat, lacking = fitted.flatten(0, 1), LACKING[:-JUDGED].double().flatten(0, 1)
    torch.testing.assert_close(folds.total.cross, (lacking.T @ flat / len(flat)).float())
    flat, lacking = X[-JUDGED:].double().flatten(0, 1), LACKING[-JUDGED:].double().flatten(0, 1)
    torch.testing.assert_close(folds.held_out.cross, (lacking.T @ flat / len(flat)).float())
    for mine, other in ((folds.total, one.total), (folds.held_out, one.held_out)):
        assert torch.equal(mine.gram, other.gram) and mine.cross is not None and other.cross is not None
        assert torch.equal(mine.cross, other.cross)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_token_counts_by_its_weight_in_what_is_fitted_and_alike_in_what_judges(batch: int):
    folds, alike = counted(batch, weights=WEIGHTS), counted(batch)
    fitted, lacking, weights = X[:-JUDGED].double(), LACKING[:-JUDGED].double(), WEIGHTS.double()[..., None]
    for half, own in zip(folds.halves, (slice(None, None, 2), slice(1, None, 2)), strict=True):
        expected = ((fitted * weights)[own].flatten(0, 1).T @ fitted[own].flatten(0, 1)) / weights[own].sum()
        torch.testing.assert_close(half.gram, expected.float())
    expected = (lacking * weights).flatten(0, 1).T @ fitted.flatten(0, 1) / weights.sum()
    torch.testing.assert_close(folds.total.cross, expected.float())
    assert folds.is_weighted and not alike.is_weighted and folds.tokens == alike.tokens
    torch.testing.assert_close(folds.unweighted.gram, alike.total.gram)
    torch.testing.assert_close(folds.unweighted.cross, alike.total.cross)
    assert torch.equal(folds.held_out.gram, alike.held_out.gram)


def test_weights_of_one_change_no_bit():
    folds, alike = counted(7, weights=torch.ones_like(WEIGHTS)), counted(7)
    assert torch.equal(folds.total.gram, alike.total.gram)
    assert folds.total.cross is not None and alike.total.cross is not None
    assert torch.equal(folds.total.cross, alike.total.cross)


def test_a_waiting_token_that_is_not_finite_is_noticed():
    folds = CalibrationStatistics(WIDTH, torch.device("cpu"))
    folds.add(torch.full((1, 1, WIDTH), torch.nan), None, False)
    assert not folds.is_finite()
