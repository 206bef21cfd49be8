"""Quantizers: zeros stay zero, errors do not grow, and each step is the best one; GPTQ is the published sweep."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import Layer, random, seeds
from test_damping import folds_of
from torch import Tensor

from convexprune.constraints import Constraint, Grid, Quantized, SemiStructured, Stacked, Unstructured
from convexprune.constraints._codebook import Codebook, OnGrid
from convexprune.constraints._ggml import Q4_K
from convexprune.constraints._grid import NF4, ROW
from convexprune.constraints._scales import Scales, spread
from convexprune.pruners import Damping, LayerEdit, LayerProblem, Wanda
from convexprune.pruners._damped import choose_damping, damped
from convexprune.quantizers import GPTQ, QUANTIZERS, Descent, Nearest
from convexprune.quantizers._descent import _gram_of_scales, fitted_scales
from convexprune.quantizers._passes import FEW, Sweep, exchanged, minimizer

GRID, HALF = Grid(4, 32), Unstructured(0.5)
supports = st.sampled_from((Unstructured(0.0), Unstructured(0.5), SemiStructured(2, 4), Unstructured(0.25, "row")))


def posed(seed: int, support: Constraint = HALF, grid: Grid = GRID) -> LayerProblem:
    return layer_problem(correlated(seed, m=6, n=64, tokens=200), Quantized(support, grid))


def dense(problem: LayerProblem) -> LayerEdit:
    return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


def pruned(problem: LayerProblem) -> LayerEdit:
    return Wanda().prune(problem) if problem.pattern.zeros(*problem.weight.shape) else dense(problem)


@given(st.sampled_from(sorted(QUANTIZERS)), supports, st.integers(3, 8), st.sampled_from((32, ROW)), seeds)
def test_the_answer_is_on_the_grid_and_zeros_stay_zero(
    name: str, support: Constraint, bits: int, group: int, seed: int
):
    problem = posed(seed, support, Grid(bits, group))
    before = pruned(problem)
    edit = QUANTIZERS[name]().quantize(problem, before)
    for dtype in (torch.float32, torch.bfloat16):
        assert problem.pattern.violation(edit.weight.to(dtype)) == 0
    assert not bool(edit.weight[~before.mask].any())
    assert torch.equal(edit.mask, edit.weight != 0)


@given(supports, seeds)
def test_more_rounds_and_sweeps_never_have_a_larger_error(support: Constraint, seed: int):
    problem = posed(seed, support)
    before = replace(pruned(problem), damping=Damping(0.01))
    quadratic = damped(problem, Damping(0.01))
    ways = (Descent(1, 0, beam=1), Descent(2, 0, beam=1), Descent(2, 1, beam=1), Descent(2, 2, beam=1))
    errors = [quadratic.values(way.quantize(problem, before).weight) for way in ways]
    for less, more in zip(errors[1:], errors, strict=False):
        assert bool((less <= more * (1 + 1e-4)).all())


@given(st.sampled_from((Grid(4, 32), Grid(3, ROW), Q4_K())), seeds)
def test_whole_numbers_around_are_those_of_any_grid(grid: Codebook, seed: int):
    multiples = torch.cat([10 * random(seed, 50, 2).flatten(), torch.arange(-40, 41) / 2])  # with ties and both ends
    for found, expected in zip(grid.around(multiples), Codebook.around(grid, multiples), strict=True):
        assert torch.equal(found, expected)


@given(st.sampled_from((Grid(4, 32), Grid(3, ROW), NF4(32), Q4_K())), seeds)
def test_a_beam_never_has_a_larger_error_and_says_how_near_it_is(grid: Codebook, seed: int):
    problem = layer_problem(correlated(seed, m=4, n=256, tokens=400), Quantized(Unstructured(0.0), grid))
    before = replace(dense(problem), damping=Damping(0.01))
    quadratic = damped(problem, Damping(0.01))
    alone, wide = (Descent(beam=width).quantize(problem, before) for width in (1, 8))
    assert bool((quadratic.values(wide.weight) <= quadratic.values(alone.weight) * (1 + 1e-5)).all())
    assert 1 - 1e-5 <= wide.facts["codes_over_best"] <= alone.facts["codes_over_best"] * 1.2


@given(st.sampled_from((1, 2, 5)), st.sampled_from((Grid(3, ROW), NF4(32), Q4_K())), seeds)
def test_a_beam_is_that_of_one_row_after_another(width: int, grid: Codebook, seed: int):
    """The slow twin keeps lists of beginnings; a beam of one is the sweep."""
    problem = layer_problem(correlated(seed, m=3, n=256, tokens=400), Quantized(Unstructured(0.0), grid))
    sweep, weight = Sweep(damped(problem, Damping(0.05)).gram.double()), problem.weight.double()
    start = OnGrid.nearest(grid, weight, grid.fit(weight))
    found = sweep.beam(weight, start, width)
    if width == 1:
        assert torch.equal(found.codes, sweep.onto(weight, start, torch.ones_like(weight, dtype=torch.bool)).codes)
    for row in range(3):
        assert torch.equal(found.codes[row], beam_of_a_row(sweep, weight[row], start.rows(torch.tensor([row])), width))


def beam_of_a_row(sweep: Sweep, weight: Tensor, start: OnGrid, width: int) -> Tensor:
    """Codes of the best of `width` beginnings, each a cost, what is left of the weight, and codes."""
    order, upper = sweep._order, sweep._upper
    step, offset = (None if each is None else each[0, order] for each in start.scales.spread(len(weight)))
    assert step is not None
    values = torch.tensor(start.grid.values, dtype=weight.dtype)
    beginnings = [(0.0, weight[order], [])]
    for j in range(len(weight)):
        longer = list[tuple[float, Tensor, list[Tensor]]]()
        for cost, left, codes in beginnings:
            wanted = left[j] + (0 if offset is None else offset[j])
            near = (values - wanted / step[j]).abs().argmin()
            side = int(near) + (1 if wanted / step[j] >= values[near] else -1)
            for place in {int(near), min(max(side, 0), len(values) - 1)}:
                error = (wanted - values[place] * step[j]) / upper[j, j]
                after = left.clone()
                after[j:] -= upper[j, j:] * error
                longer.append((cost + float(error) ** 2, after, [*codes, values[place]]))
        beginnings = sorted(longer, key=lambda each: each[0])[:width]
    return torch.empty_like(weight).index_copy_(0, order, torch.stack(beginnings[0][2]))


@given(seeds)
def test_an_exchange_of_one_row_is_that_row_of_all(seed: int):
    problem = posed(seed, Unstructured(0.0))
    quadratic, mask = damped(problem, Damping(0.01)), torch.ones_like(problem.weight, dtype=torch.bool)
    start = OnGrid.nearest(GRID, problem.weight, GRID.fit(problem.weight))
    residual = quadratic.residual(start.weight)
    found, after = exchanged(quadratic.gram, start, residual.clone(), mask, 0.0)
    own = start.rows(torch.tensor([2]))
    codes = own.codes.clone()
    one, rest = exchanged(quadratic.gram, own, residual[2:3].clone(), mask[2:3], 0.0)
    assert torch.equal(one.codes[0], found.codes[2]) and torch.equal(own.codes, codes)
    assert torch.allclose(rest[0], after[2], rtol=1e-4, atol=1e-4 * float(after.abs().max()))


@pytest.mark.parametrize("n", [32, 608])
def test_an_exchange_is_that_of_one_column_after_another(n: int):
    """The slow twin subtracts each move from the whole residual at once; the last passes subtract a sparse product."""
    problem = layer_problem(correlated(1, m=6, n=n, tokens=800), Quantized(HALF, GRID))
    gram, mask = damped(problem, Damping(0.05)).gram.double(), pruned(problem).mask
    weight = problem.weight.double() * mask
    found = OnGrid.nearest(GRID, weight, GRID.fit(weight))
    residual, codes, scales = (weight - found.weight) @ gram, found.codes.clone(), spread(found.scales.step, n)
    slow, moves = residual.clone(), []
    for _ in range(5):
        before = codes.clone()
        for j in range(n):
            best = GRID.nearest(codes[:, j] + slow[:, j] / (scales[:, j] * gram[j, j])) * mask[:, j]
            slow -= ((best - codes[:, j]) * scales[:, j])[:, None] * gram[j]
            codes[:, j] = best
        found, residual = exchanged(gram, found, residual, mask, 0.0)
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(residual, slow)
        moves.append(float((codes != before).double().mean()))
    assert moves[0] > FEW > moves[-1]


@given(seeds)
def test_no_other_code_of_one_entry_is_better_at_the_end_of_a_descent(seed: int):
    problem = posed(seed)
    before = replace(pruned(problem), damping=Damping(0.01))
    quadratic = damped(problem, Damping(0.01)).double
    found = Descent(sweeps=20, rounds=0).on_grid(problem, before, GRID)
    residual, scales = quadratic.residual(found.weight.double()), spread(found.scales.step, 64).double()
    for step in (-1.0, 1.0):
        code = found.codes + step
        allowed = before.mask & (code >= GRID.values[0]) & (code <= GRID.values[-1])
        worse = quadratic.gram.diagonal() * (step * scales).square() / 2 - residual * step * scales  # of one code alone
        assert bool((worse[allowed] >= -1e-5 * quadratic.values(found.weight.double()).max()).all())


@given(seeds)
def test_the_scales_are_those_of_least_squares_for_each_row(seed: int):
    problem = posed(seed)
    quadratic = damped(problem, Damping(0.01)).double
    begin = OnGrid.nearest(GRID, problem.weight, GRID.fit(problem.weight))
    found = OnGrid(GRID, begin.scales.map(Tensor.double), begin.codes.double())
    scales = fitted_scales(quadratic.gram, found, quadratic.residual(found.weight)).step
    root = torch.linalg.cholesky(quadratic.gram)
    target = minimizer(quadratic.cross, quadratic.gram, problem.weight.double())
    for row in range(len(scales)):
        columns = torch.block_diag(*found.codes[row].view(-1, 1, 32))
        best = torch.linalg.lstsq((columns @ root).T, target[row] @ root).solution
        torch.testing.assert_close(scales[row], best, rtol=2**-7, atol=0)


@given(seeds, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2]))
def test_the_gram_matrices_of_scales_are_those_of_columns_of_codes(seed: int, count: int, group: int, kinds: int):
    codes = random(seed, 3 * count, group).view(3, count, group)
    gram = random(seed + 1, 9, count * group).T @ random(seed + 1, 9, count * group)
    for of_row, row in zip(_gram_of_scales(codes, gram, kinds), codes, strict=True):
        columns = torch.cat([torch.block_diag(*each[:, None]) for each in (row, -torch.ones_like(row))[:kinds]])
        torch.testing.assert_close(of_row, columns @ gram @ columns.T)


def test_scales_of_rows_with_many_groups_are_fitted_by_several_threads():
    """torch's LU of many matrices of 151 rows and more fails with threads (pytorch/pytorch#142815)."""
    x, weight, residual = random(0, 64, 2560).float(), random(1, 4, 2560).float(), 0.01 * random(2, 4, 2560).float()
    gram, grid = x.T @ x / 64 + torch.eye(2560), Q4_K()
    found = OnGrid.nearest(grid, weight, grid.fit(weight))
    alone, threads = fitted_scales(gram, found, residual).step, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = fitted_scales(gram, found, residual).step
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(together, alone, rtol=2**-5, atol=0)


def slow_gptq(weight: Tensor, gram: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with the inverse made anew for each column, in float64."""
    left, order = weight.double().clone(), gram.diagonal().argsort(descending=True).tolist()
    out, gram = torch.zeros_like(left), gram.double()
    for number, j in enumerate(order):
        rest = order[number:]
        inverse = torch.linalg.inv(gram[rest][:, rest])
        scale = scales[:, j // grid.group].double()
        out[:, j] = (left[:, j] / scale).round().clamp(grid.values[0], grid.values[-1]) * scale
        left[:, rest] -= ((left[:, j] - out[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@given(seeds)
def test_a_sweep_is_the_published_one(seed: int):
    problem = posed(seed)
    gram = (problem.quadratic.gram + 0.01 * torch.eye(64)).double()
    weight, scales = problem.weight.double(), GRID.fit(problem.weight).step.double()
    begin = OnGrid(GRID, Scales(scales), torch.zeros_like(weight))
    found = Sweep(gram).onto(weight, begin, torch.ones_like(weight, dtype=torch.bool))
    torch.testing.assert_close(found.weight, slow_gptq(weight, gram, scales, GRID))


def test_calibrated_codes_have_a_lower_error_than_rounding():
    problem = posed(3, Unstructured(0.0))
    before = replace(dense(problem), damping=choose_damping(problem, None))  # as zeros have, for the sample's error
    errors = {
        name: float(problem.squared_error(kind().quantize(problem, before).weight).sum())
        for name, kind in QUANTIZERS.items()
    }
    assert errors["descent"] < errors["gptq"] < errors["rtn"]


def test_codes_fit_texts_of_another_kind_better_than_by_the_damping_of_zeros():
    """Half of the noisy sample's correlations are those of another kind of text."""
    ratios = []
    for seed in range(4):
        seen, other = correlated(seed, m=6, n=64, tokens=400), correlated(seed + 10, m=6, n=64, tokens=4000)
        problem = layer_problem(seen, Quantized(Unstructured(0.0), GRID), folds=folds_of(seen))
        gram = problem.gram + other.moments.gram * (
            problem.gram.diagonal().mean() / other.moments.gram.diagonal().mean()
        )
        errors = []
        for damping in (choose_damping(problem, None), None):
            off = Descent().quantize(problem, replace(dense(problem), damping=damping)).weight - problem.weight
            errors.append(float((off @ gram * off).sum()))
        ratios.append(errors[1] / errors[0])
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.97


@pytest.mark.parametrize("kind", [Nearest, GPTQ, Descent])
def test_operators_of_a_stack_have_their_own_grids_or_none(kind: type):
    own = (Quantized(Unstructured(0.0), Grid(8, 32)), Unstructured(0.0), Quantized(Unstructured(0.5), GRID))
    problem = replace(posed(0), pattern=Stacked(own, (2, 1, 3)))
    before = pruned(problem)
    edit = kind().quantize(problem, before)
    assert torch.equal(edit.weight[2], before.weight[2])
    assert own[0].violation(edit.weight[:2]) == own[2].violation(edit.weight[3:]) == 0
    assert own[2].violation(edit.weight[:2]) > 0


@pytest.mark.parametrize("kind", [Nearest, GPTQ, Descent])
def test_weights_at_dead_inputs_are_rounded_as_they_are(kind: type):
    layer = correlated(1, m=4, n=64, tokens=100)
    inputs = layer.pruned.index_fill(1, torch.tensor([3, 40]), 0.0)
    problem = layer_problem(Layer(layer.weight, inputs, inputs), Quantized(Unstructured(0.0), Grid(8, 32)))
    edit = kind().quantize(problem, dense(problem))
    near = (edit.weight - problem.weight).abs()[:, [3, 40]]
    assert bool((near <= problem.weight.abs().amax(1, keepdim=True) / 64).all())
