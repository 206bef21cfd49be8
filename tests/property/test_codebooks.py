"""Grids by name: nearest is nearest, descriptions and stored weights parse back, and every quantizer knows them all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import correlated, layer_problem
from strategies import random, seeds
from torch import Tensor

from convexprune.constraints import GRIDS, Quantized, Unstructured, make_grid, parse_pattern
from convexprune.constraints._codebook import Codebook
from convexprune.constraints._grid import E2M1, MXFP4
from convexprune.errors import PatternError
from convexprune.pruners import LayerEdit
from convexprune.quantizers import QUANTIZERS, Descent

DENSE = Unstructured(0.0)
grids = st.builds(make_grid, st.sampled_from(sorted(GRIDS)), st.sampled_from((32, 64)))


def multiples(grid: Codebook, seed: int) -> Tensor:
    """Numbers around and between the values, and halfway."""
    values = torch.tensor(grid.values)
    return torch.cat([random(seed, 64) * values.abs().max(), values, (values[1:] + values[:-1]) / 2])


@given(grids, seeds)
def test_no_value_is_nearer_than_the_nearest(grid: Codebook, seed: int):
    wanted = multiples(grid, seed)
    found = grid.nearest(wanted.clone())
    every = torch.tensor(grid.values)
    assert bool((found[:, None] == every).any(1).all())
    torch.testing.assert_close((found - wanted).abs(), (every - wanted[:, None]).abs().amin(1))


@given(grids, seeds)
def test_codes_are_the_nearest_for_their_scales(grid: Codebook, seed: int):
    weight = random(seed, 3, 256)
    scales = grid.fit(weight)
    step, offset = scales.spread(256)
    every = step[..., None] * torch.tensor(grid.values) - (0.0 if offset is None else offset[..., None])
    least = (every - weight[..., None]).abs().amin(2)
    found = grid.weight(grid.codes(weight, scales), scales)
    torch.testing.assert_close((found - weight).abs(), least, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(grid=grids, seed=seeds)
def test_a_stored_weight_is_known_to_be_on_its_grid(grid: Codebook, dtype: torch.dtype, seed: int):
    """So are rows so small that float16 rounds them to multiples of 2^-24."""
    sizes = torch.logspace(-8, 0, 17, dtype=torch.float64)
    stored = grid.project(random(seed, 17, 256) * sizes[:, None]).to(dtype)
    assert grid.violation(stored) == 0
    assert parse_pattern(str(Quantized(DENSE, grid))) == Quantized(DENSE, grid)


@given(grids.filter(lambda grid: len(grid.values) <= 16), seeds)
def test_a_weight_that_is_not_is_counted(grid: Codebook, seed: int):
    assert grid.violation(random(seed, 4, 256)) > 0


def test_mxfp4_has_no_scale_between_powers_of_two():
    codes = torch.tensor(E2M1).repeat(5)[:32].expand(2, 32)
    assert MXFP4().violation(codes * torch.tensor([[2.0], [1.5]])) == 32


@given(st.integers(-20, 20), seeds)
def test_mxfp4_takes_the_best_power_of_two(power: int, seed: int):
    grid, weight = MXFP4(), random(seed, 4, 64) * 2.0**power
    steps = [2.0 ** (power + each) for each in range(-8, 4)]
    errors = torch.stack([(grid.nearest(weight / step) * step - weight).square() for step in steps])
    found = grid.project(weight)
    least = errors.unflatten(2, (-1, 32)).sum(3).amin(0)
    torch.testing.assert_close((found - weight).square().unflatten(1, (-1, 32)).sum(2), least)
    assert torch.equal(grid.project(found), found)


@given(grids, seeds)
def test_scales_that_are_rounded_stay(grid: Codebook, seed: int):
    scales = grid.fit(random(seed, 3, 256))
    again = grid.rounded(scales)
    for one, other in zip((scales.step, scales.offset), (again.step, again.offset), strict=True):
        assert one is other is None or torch.equal(one, other)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_every_quantizer_takes_every_grid(name: str, quantizer: str):
    problem = layer_problem(correlated(2, m=6, n=256, tokens=600), Quantized(DENSE, make_grid(name, 32)))
    before = LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
    edit = QUANTIZERS[quantizer]().quantize(problem, before)
    assert problem.pattern.violation(edit.weight) == 0
    rounded = problem.pattern.project(problem.weight)
    assert quantizer != "descent" or problem.squared_error(edit.weight).sum() < problem.squared_error(rounded).sum()


@given(grids, seeds)
def test_a_descent_never_raises_the_error(grid: Codebook, seed: int):
    problem = layer_problem(correlated(seed, m=4, n=256, tokens=600), Quantized(DENSE, grid))
    before = LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
    errors = [
        problem.squared_error(Descent(*ways, beam=1, damping=0.0).quantize(problem, before).weight)
        for ways in ((2, 0), (2, 2))
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-4)).all())


def test_unknown_grids_are_refused():
    with pytest.raises(PatternError, match="Unknown grid 'int9'"):
        make_grid("int9", 64)
