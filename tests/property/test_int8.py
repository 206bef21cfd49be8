"""Whole numbers of 8 bits per output channel as a constraint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import random, seeds

from convexprune.constraints import Int8, Stacked, Unstructured, parse_pattern
from convexprune.constraints._int8 import LARGEST, rounded
from convexprune.errors import PatternError
from convexprune.pruners import PRUNERS, Magnitude, Wanda


def slow_rounding(row: list[float]) -> list[float]:
    step = max(map(abs, row)) / LARGEST
    return [round(value / step) * step for value in row]


@given(st.integers(1, 5), st.integers(1, 9), seeds)
def test_each_row_is_rounded_to_a_127th_of_its_largest_weight(m: int, n: int, seed: int):
    weight = random(seed, m, n)
    expected = torch.tensor([slow_rounding(row) for row in weight.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rounded(weight, 1.0), expected)


@given(seeds)
def test_a_row_is_cut_where_that_is_nearer_in_the_metric(seed: int):
    weight, metric = random(seed, 3, 32), random(seed + 1, 32).square()
    weight[:, 0], metric[0] = 4.0, 1e-9  # a large weight that hardly counts

    def distance(other: torch.Tensor) -> float:
        return float(((other - weight).square() * metric).sum())

    assert distance(Int8().project(weight, metric)) < distance(rounded(weight, 1.0))
    assert Int8().violation(Int8().project(weight, metric)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_grid_is_known_again_in_the_dtype_of_the_model(dtype: torch.dtype):
    weight = random(0, 16, 64)
    assert Int8().violation(Int8().project(weight).to(dtype)) == 0
    assert Int8().violation(weight.to(dtype)) > 100


def test_rows_of_zeros_stay_zero():
    assert Int8().project(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert Int8().violation(torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
def test_methods_that_project_put_a_weight_on_the_grid(method: Magnitude | Wanda):
    problem = layer_problem(correlated(0), Int8())
    edit = method.prune(problem)
    assert Int8().violation(edit.weight) == 0
    assert float(problem.squared_error(edit.weight).sum()) < 1e-3 * float(problem.energy.sum())


@pytest.mark.parametrize("constraint", [Int8(), Stacked((Int8(), Unstructured(0.5)), (4, 4))], ids=str)
@pytest.mark.parametrize("method", sorted(PRUNERS.keys() - {"magnitude", "wanda"}))
def test_a_method_that_searches_a_support_refuses_it(method: str, constraint: Int8 | Stacked):
    with pytest.raises(PatternError, match="'magnitude' and 'wanda'"):
        PRUNERS[method]().require(constraint)


def test_it_has_no_share_of_zeros():
    assert parse_pattern("int8") == Int8() and Int8().zeros(3, 4) == 0
    for ask in (lambda: parse_pattern("int8", 0.5), lambda: parse_pattern("int8", quota="row")):
        with pytest.raises(PatternError, match="Leave sparsity and quota out"):
            ask()
    with pytest.raises(PatternError, match="no share of zeros"):
        Int8().with_sparsity(0.5)
    for ask in (Int8().mask, Int8().threshold):
        with pytest.raises(PatternError, match="no choice of entries"):
            ask(torch.ones(1, 1))
