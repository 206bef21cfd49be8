"""Coded weights: their bits are counted as they are, they are kept, and nearly all are used."""

from collections import Counter
from dataclasses import replace
from math import log2
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import Layer, random, seeds

from convexprune.constraints import Coded, Constraint, Quantized, SemiStructured, Stacked, Unstructured, parse_pattern
from convexprune.constraints._codebook import OnGrid
from convexprune.constraints._coded import code_lengths, entropy
from convexprune.constraints._scales import Scales
from convexprune.errors import PatternError
from convexprune.pruners import Damping, LayerEdit, LayerProblem, Wanda
from convexprune.pruners._damped import choose_damping, damped
from convexprune.quantizers import QUANTIZERS, Descent
from convexprune.quantizers._forecast import Forecast
from convexprune.quantizers._passes import exchanged

DENSE = Unstructured(0.0)


def posed(seed: int, bits: float, support: Constraint = DENSE, rows: int = 96) -> tuple[LayerProblem, LayerEdit]:
    problem = layer_problem(correlated(seed, m=rows, n=48, tokens=200), Quantized(support, Coded(bits)))
    if support.zeros(rows, 48):
        return problem, Wanda().prune(problem)
    return problem, LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=200))
def test_the_entropy_is_that_of_the_frequencies(codes: list[int]):
    slow = -sum(count / len(codes) * log2(count / len(codes)) for count in Counter(codes).values())
    assert entropy(torch.tensor(codes)) == pytest.approx(slow, abs=1e-12)


@given(st.floats(1, 6), seeds)
def test_a_description_parses_back(bits: float, seed: int):
    constraint = Quantized(SemiStructured(2, 4), Coded(bits))
    assert parse_pattern(str(constraint)) == constraint


@settings(max_examples=10)
@given(seeds, st.sampled_from((1.5, 2.5, 4.0)), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_a_projection_has_the_bits_that_it_may_have(seed: int, bits: float, dtype: torch.dtype):
    constraint, weight = Coded(bits), random(seed, 64, 32)
    projected = constraint.project(weight, random(seed + 1, 32).square())
    assert constraint.violation(projected.to(dtype)) == 0
    assert torch.equal(constraint.project(projected), projected)
    codes, on = constraint.found(projected.to(dtype))
    assert bool(on.all()) and bits - 0.2 < constraint.rate(codes) <= bits


def test_bits_that_are_too_many_are_counted_and_so_are_columns_off_the_grid():
    weight = Coded(4.0).project(random(0, 64, 32))
    assert 0 < Coded(2.0).violation(weight) <= weight.numel() * 2
    weight[3, 7] += 1e-3
    assert Coded(6.0).violation(weight) == 64


@settings(max_examples=10)
@given(st.sampled_from(sorted(QUANTIZERS)), st.sampled_from((DENSE, Unstructured(0.5), SemiStructured(2, 4))), seeds)
def test_quantizers_use_the_bits_that_there_are_and_no_more(name: str, support: Constraint, seed: int):
    bits = 1.9 if support.zeros(96, 48) else 3.0
    problem, before = posed(seed, bits, support)
    edit = QUANTIZERS[name]().quantize(problem, before)
    for dtype in (torch.float32, torch.bfloat16):
        assert problem.pattern.violation(edit.weight.to(dtype)) == 0
    assert not bool(edit.weight[~before.mask].any()) and torch.equal(edit.mask, edit.weight != 0)
    coded: Any = problem.pattern.grid
    assert coded.rate(coded.found(edit.weight)[0]) > bits - 0.1


@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_steps_of_columns_and_descent_are_worth_it(bits: float):
    errors = dict.fromkeys(("descent", "gptq", "rtn"), 0.0)
    for seed in range(4):
        problem, before = posed(seed, bits)
        loose = replace(before, damping=choose_damping(problem, None))  # as zeros have: this is the error of the sample
        for name in errors:
            errors[name] += float(problem.squared_error(QUANTIZERS[name]().quantize(problem, loose).weight).sum())
    assert errors["descent"] < errors["gptq"] < errors["rtn"]


@given(seeds, st.sampled_from((0.0, 0.1)))
def test_each_code_is_the_cheapest_of_all_while_others_stay(seed: int, price: float):
    problem, before = posed(seed, 3.0, rows=6)
    quadratic = damped(problem, Damping(0.01)).double
    grid = Coded(3.0)
    scales = random(seed + 1, 1, 48).double().abs().add(0.2) * problem.weight.std()
    price *= float((quadratic.gram.diagonal() * scales.square()).min())
    begin = OnGrid.nearest(grid, problem.weight.double(), Scales(scales))
    lengths = code_lengths(begin.codes) * price
    found, residual = exchanged(quadratic.gram, begin, quadratic.residual(begin.weight), before.mask, price)
    torch.testing.assert_close(residual, quadratic.residual(found.weight))
    codes, every = begin.codes.clone(), torch.arange(-127, 128, dtype=torch.float64)
    for j in range(48):  # the slow twin, columns from left to right
        pull = quadratic.residual(grid.weight(codes, Scales(scales)))[:, j]
        step = (every - codes[:, j, None]) * scales[0, j]
        cost = quadratic.gram[j, j] * step.square() / 2 - pull[:, None] * step + lengths[every.abs().long()]
        codes[:, j] = every[cost.argmin(1)]
    assert torch.equal(found.codes, codes)


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=300))
def test_lengths_are_those_of_frequencies_and_never_fall(codes: list[int]):
    lengths = code_lengths(torch.tensor(codes, dtype=torch.float64))
    assert bool((lengths.diff() >= 0).all()) and lengths[0] > 0
    likely = torch.tensor([0.0] * 90000 + [1.0] * 5000 + [-1.0] * 5000, dtype=torch.float64)
    assert code_lengths(likely)[:2].tolist() == pytest.approx([-log2(0.9), -log2(0.05)], rel=0.05)


def test_operators_of_a_stack_have_their_own_bits():
    own = (Quantized(DENSE, Coded(2.0)), Quantized(DENSE, Coded(2.0)), Quantized(DENSE, Coded(4.0)))
    problem = replace(posed(0, 3.0)[0], pattern=Stacked(own, (32, 32, 32)))
    weight = problem.weight.clone()
    weight[:32] *= 10  # with the same steps as the next, it would take more bits than it may
    problem = replace(problem, weight=weight)
    edit = Descent().quantize(problem, LayerEdit(weight, torch.ones_like(weight, dtype=torch.bool)))
    assert problem.pattern.violation(edit.weight) == 0


@pytest.mark.parametrize("bits", [0.5, 7.0])
def test_other_bits_are_refused(bits: float):
    with pytest.raises(PatternError, match="1 to 6 can be had"):
        Coded(bits)


def test_few_rows_are_refused_because_scales_would_take_the_bits():
    with pytest.raises(PatternError, match=r"2 bits a weight of 8 rows: .* take 2\. Leave such operators out"):
        Quantized(DENSE, Coded(2.0)).check(8, 64)


@settings(max_examples=5)
@given(seeds)
def test_columns_of_outlying_inputs_are_not_cut_off(seed: int):
    """An input a thousand times as large asks for a scale so small that no code would reach its weights."""
    layer = correlated(seed, m=96, n=48, tokens=200)
    outlying = layer.pruned * torch.ones(48).index_fill(0, torch.tensor([5]), 1000.0)
    problem = layer_problem(Layer(layer.weight, outlying, outlying), Quantized(DENSE, Coded(3.0)))
    plain = layer_problem(Layer(layer.weight, layer.pruned, layer.pruned), Quantized(DENSE, Coded(3.0)))
    every = LayerEdit(layer.weight, torch.ones_like(layer.weight, dtype=torch.bool))
    for name in QUANTIZERS:
        weight = QUANTIZERS[name]().quantize(problem, every).weight
        assert bool(((weight - layer.weight).abs()[:, 5] <= layer.weight.abs()[:, 5].max()).all())
    errors = [float(p.squared_error(Descent().quantize(p, every).weight).sum()) for p in (plain, problem)]
    assert errors[1] < 100 * errors[0]


@settings(max_examples=10)
@given(seeds, st.sampled_from((2.0, 3.0, 4.5)))
def test_what_a_sweep_will_cost_is_forecast_from_one_factor(seed: int, bits: float):
    problem, before = posed(seed, bits)
    damping = choose_damping(problem, None, codes=True)
    made = Descent(sweeps=0).quantize(problem, replace(before, damping=damping))
    cost = 2 * damped(problem, damping).values(made.weight).sum()
    assert 0.85 < float(Forecast(problem).errors(problem.pattern).sum() / cost) < 1.1


@given(seeds)
def test_columns_that_hardly_occur_keep_scales_for_texts_in_which_they_do(seed: int):
    weight, metric = random(seed, 64, 32), torch.ones(32)
    metric[7] = 1e-6
    scales = Coded(3.0).fit(weight, metric).step[0]
    assert 3 < scales[7] / scales.median() < 5
    assert bool(Coded(3.0).project(weight, metric)[:, 7].any())
