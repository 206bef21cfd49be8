"""Block grids of ggml: their bytes are read by the library `gguf` as the same weights, bit for bit."""

from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import random, seeds
from torch import Tensor

from convexprune.constraints import Grid, Quantized, SemiStructured, Stacked, Unstructured
from convexprune.constraints._codebook import OnGrid
from convexprune.constraints._ggml import BLOCKS, Q4_K, Q8_0, Block, Super, WithMinima
from convexprune.constraints._scales import Scales, spread
from convexprune.errors import PatternError
from convexprune.pruners import LayerEdit
from convexprune.pruners._damped import choose_damping, damped
from convexprune.quantizers import Descent
from convexprune.quantizers._descent import _rescaled, fitted_scales

blocks = st.sampled_from([grid() for grid in BLOCKS])


def decoded(grid: Block, data: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[grid.name.upper()]))


@given(blocks, st.floats(1e-3, 1e2), seeds)
def test_the_bytes_are_read_as_the_same_weight(grid: Block, size: float, seed: int):
    weight = random(seed, 3, 512).float() * size
    weight[0, :256] = 0
    weight[1] = weight[1].abs()
    scales = grid.fit(weight)
    codes = grid.codes(weight, scales)
    data = grid.pack(codes, scales)
    assert data.shape == (3, 512 * grid.bits / 8)
    assert torch.equal(decoded(grid, data), grid.weight(codes, scales))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_zeros_and_what_float16_takes_for_zeros_stay_zeros(kind: type[Block], size: float):
    grid = kind()
    weight = random(1, 2, 256).float() * size
    scales = grid.fit(weight)
    assert not grid.project(weight).any() and not decoded(grid, grid.pack(grid.codes(weight, scales), scales)).any()


@pytest.mark.parametrize("grid", [grid() for grid in BLOCKS], ids=str)
@settings(max_examples=2)
@given(seeds)
def test_so_are_those_of_a_descent(grid: Block, seed: int):
    problem = layer_problem(correlated(seed, m=4, n=256, tokens=600), Quantized(Unstructured(0.0), grid))
    edit = Descent().quantize(problem, LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool)))
    (data,) = edit.blocks
    assert data is not None and torch.equal(decoded(grid, data), edit.weight)


def test_operators_of_a_stack_have_their_own_bytes_and_zeros_stay_zero():
    own = (Quantized(SemiStructured(2, 4), Q8_0()), Unstructured(0.0), Quantized(Unstructured(0.0), Q4_K()))
    problem = layer_problem(correlated(1, m=6, n=256, tokens=600), own[0])
    problem = type(problem)(problem.weight, problem.moments, Stacked(own, (2, 1, 3)))
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    mask[:2, ::2] = False
    edit = Descent().quantize(problem, LayerEdit(problem.weight * mask, mask))
    first, none, last = edit.blocks
    assert none is None and first is not None and last is not None
    assert torch.equal(decoded(Q8_0(), first), edit.weight[:2]) and not bool(edit.weight[:2, ::2].any())
    assert torch.equal(decoded(Q4_K(), last), edit.weight[3:])


def best_of_neighbours(q: Tensor, slope: Tensor, flat: Tensor, units: Tensor) -> float:
    """How much a scale alone could lower the error of a row, by one unit up or down."""
    steps = torch.stack([units, -units])
    return float((q.diagonal() * steps.square() / 2 - slope * steps).min())


@settings(max_examples=15)
@given(st.sampled_from([grid() for grid in BLOCKS if issubclass(grid, Super)]), seeds)
def test_scales_in_units_have_no_better_neighbour(grid: Super, seed: int):
    """With enough sweeps each scale is the best multiple of its unit while all others stay."""
    problem = layer_problem(correlated(seed, m=3, n=256, tokens=600), Quantized(Unstructured(0.0), grid))
    quadratic = damped(problem, choose_damping(problem, None)).double
    weight = problem.weight.double()
    found = OnGrid.nearest(grid, weight, grid.fit(weight))
    begin = quadratic.values(found.weight)
    type(grid).sweeps, before = 40, type(grid).sweeps
    try:
        scales = fitted_scales(quadratic.gram, found, quadratic.residual(found.weight))
    finally:
        type(grid).sweeps = before
    after = OnGrid(grid, scales, found.codes)
    # Rounding to multiples may cost more than the fit gains. The descent leaves such rows as they were.
    _, kept, _ = _rescaled(quadratic, found, quadratic.residual(found.weight))
    assert bool((quadratic.values(kept.weight) <= begin).all())
    units = torch.cat([spread(unit, scales.step.shape[1]) for unit in scales.units], dim=1)
    whole = (scales.flat / units).nan_to_num()
    assert bool((whole - whole.round() == 0).all()) and bool((whole.abs() <= max(map(abs, grid.multiples))).all())
    residual = quadratic.residual(after.weight)
    for row in range(3):
        groups = found.codes[row].view(-1, grid.group)
        kinds = [groups, -torch.ones_like(groups)] if isinstance(grid, WithMinima) else [groups]
        columns = torch.cat([torch.block_diag(*kind[:, None]) for kind in kinds])
        q, slope = columns @ quadratic.gram @ columns.T, columns @ residual[row]
        inside = (whole[row] > grid.multiples[0]) & (whole[row] < grid.multiples[1])
        best = best_of_neighbours(q[inside][:, inside], slope[inside], scales.flat[row][inside], units[row][inside])
        assert best >= -1e-3 * float(begin[row])


def test_start_is_not_worse_than_llama_cpps_for_8_bits():
    """The library's own rounding has the largest weight over 127 as its scale."""
    weight = random(0, 16, 256)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    error = (decoded(Q8_0(), torch.from_numpy(theirs)) - weight).square().sum()
    assert (Q8_0().project(weight) - weight).square().sum() < 0.8 * error


@pytest.mark.parametrize(("grid", "columns"), [(Q4_K(), 128), (Q8_0(), 48)])
def test_columns_that_do_not_fit_are_refused_with_a_grid_that_does(grid: Block, columns: int):
    told = (
        rf"{columns} columns are no whole number of blocks of {grid.block}.*Take {'int8' if columns % 32 else 'iq4_nl'}"
    )
    with pytest.raises(PatternError, match=told):
        grid.check(4, columns)


def test_zeros_need_a_zero():
    with pytest.raises(PatternError, match="q4_k has no zero"):
        Quantized(Unstructured(0.5), Q4_K())
    assert Quantized(Unstructured(0.5), Q8_0()).sparsity == 0.5


def test_whole_numbers_of_a_run_are_those_of_a_file(tmp_path: Path):
    """int4 and int8 become Q4_0 and Q8_0 without loss: a bfloat16 scale is a float16 one."""
    weight = Grid(8, 64).project(random(3, 4, 128))
    step, codes, _ = Grid(8, 64).find(weight)
    data = Q8_0().pack(codes.float(), Scales(step.repeat_interleave(2, dim=1)))
    assert data is not None and torch.equal(decoded(Q8_0(), data), weight)
