"""Grids of few bits: scales that fit, and codes that are known again in a stored weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random, seeds
from torch import Tensor

from convexprune.constraints import Grid, Quantized, Unstructured
from convexprune.constraints._grid import ROW
from convexprune.constraints._scales import Scales, rounded_scale, spread
from convexprune.errors import PatternError

grids = st.builds(Grid, st.integers(3, 8), st.sampled_from((32, 64, ROW)))


def on_grid(grid: Grid, seed: int, rows: int = 3, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Scales and codes at random; some groups are all zero."""
    generator = torch.Generator().manual_seed(seed)
    width = 48 if grid.group == ROW else grid.group
    groups = 1 if grid.group == ROW else groups
    codes = torch.randint(int(grid.values[0]), int(grid.values[-1]) + 1, (rows, groups * width), generator=generator)
    codes *= torch.rand(codes.shape, generator=generator) < 0.7
    codes[0, :width] = 0
    signs = torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
    scales = rounded_scale(torch.randn(rows, groups, generator=generator).exp() * 0.02 * signs)
    return scales, codes.float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(grid=grids, tiny=st.booleans(), seed=seeds)
def test_a_stored_weight_tells_its_scales_and_codes(grid: Grid, dtype: torch.dtype, tiny: bool, seed: int):
    scales, codes = on_grid(grid, seed, rows=17)
    if tiny:  # float16 rounds such weights to multiples of 2^-24
        scales = rounded_scale(scales * torch.logspace(-6, -2, 17)[:, None])
    stored = (codes * spread(scales, codes.shape[1])).to(dtype)
    found_scales, found_codes, on = grid.find(stored)
    assert bool(on.all())
    assert torch.equal(grid.weight(found_codes.float(), Scales(found_scales)).to(dtype), stored)
    assert int(grid.values[0]) <= int(found_codes.min()) and int(found_codes.max()) <= int(grid.values[-1])


@given(st.sampled_from((torch.float32, torch.float16)), st.integers(3, 6), seeds)
def test_a_weight_that_is_off_is_seen(dtype: torch.dtype, bits: int, seed: int):
    grid = Grid(bits, 32)
    scales, codes = on_grid(grid, seed)
    codes[1, 0] = int(grid.values[0])  # so that the group cannot be on a coarser grid
    codes[1, 1] = int(grid.values[-1])
    stored = (codes * spread(scales, codes.shape[1])).to(dtype)
    stored[1, 5] += 0.4 * scales[1, 0].to(dtype)
    assert (~grid.find(stored)[2]).nonzero().tolist() == [[1, 0]]
    assert Quantized(Unstructured(0.0), grid).violation(stored) == 32


def slow_error(grid: Grid, row: Tensor, scale: float, metric: Tensor) -> float:
    total = 0.0
    for value, weight in zip(row.tolist(), metric.tolist(), strict=True):
        code = min(max(round(value / scale), int(grid.values[0])), int(grid.values[-1]))
        total += weight * (code * scale - value) ** 2 if value else 0.0
    return total


@given(grids, seeds)
def test_no_candidate_has_a_lower_error_than_the_scale_that_fits(grid: Grid, seed: int):
    width = grid.width(48)
    weight, metric = random(seed, 2, width), random(seed + 1, width).square()
    weight[0, ::3] = 0
    scales = grid.fit(weight, metric).step
    for row, (scale,) in zip(weight, scales.tolist(), strict=True):
        largest = float(row[row.abs().argmax()])
        least = slow_error(grid, row, scale, metric)
        for clip in (1.05, 0.85, 0.65):  # some of the candidates
            other = float(rounded_scale(torch.tensor(largest * clip / int(grid.values[0]), dtype=torch.float64)))
            assert least <= slow_error(grid, row, other, metric) * (1 + 1e-9)


def test_a_group_of_zeros_has_a_scale_and_no_code():
    grid = Grid(4, 32)
    assert grid.codes(torch.zeros(1, 32), grid.fit(torch.zeros(1, 32))).tolist() == [[0.0] * 32]


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (9, 64), (4, 48)])
def test_other_grids_are_refused(bits: int, group: int):
    with pytest.raises(PatternError, match=r"have 3 to 8 bits|groups are 32, 64, 128 columns, or -1 for a row"):
        Grid(bits, group)


def test_rows_that_are_no_whole_number_of_groups_are_refused():
    pattern = Quantized(Unstructured(0.5), Grid(4, 64))
    for columns, way in ((96, "Take group_size 32 or -1"), (100, "Take group_size -1")):
        with pytest.raises(PatternError, match=f"{columns} columns are no whole number of groups of 64. {way}"):
            pattern.check(8, columns)
