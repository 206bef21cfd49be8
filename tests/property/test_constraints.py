"""What every kind of constraint promises: projections, violations, budgets, and words that parse back."""

import re
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random, seeds

import convexprune
from convexprune._layerwise.allocation import ModelAllocation
from convexprune.constraints import (
    GRIDS,
    KINDS,
    Budget,
    Channels,
    Coded,
    Columns,
    Constraint,
    Experts,
    Grid,
    Heads,
    Layers,
    Quantized,
    SemiStructured,
    Stacked,
    Unstructured,
    make_grid,
    parse_pattern,
)
from convexprune.constraints._grid import ROW
from convexprune.errors import PatternError

shares = st.floats(0, 1, exclude_max=True)
groups = st.integers(2, 16).flatmap(lambda group: st.tuples(st.integers(1, group - 1), st.just(group)))
plain = st.one_of(
    st.builds(Unstructured, shares, st.sampled_from(("matrix", "row"))),
    groups.map(lambda pair: SemiStructured(*pair)),
    st.builds(Columns, shares, block=st.integers(1, 256)),
    st.builds(Channels, shares, st.integers(1, 512)),
    st.builds(Heads, shares),
    st.builds(Layers, shares),
)
grids = st.builds(Grid, st.integers(3, 8), st.sampled_from((32, 64, 128, ROW)))
singles = plain | st.builds(Quantized, plain.filter(lambda c: c.removes is None), grids)
stacks = st.lists(st.tuples(singles, st.integers(1, 4096)), min_size=1, max_size=4).map(
    lambda parts: Stacked(tuple(own for own, _ in parts), tuple(height for _, height in parts))
)

SMALL: dict[str, Constraint] = {
    "matrix": Unstructured(0.5),
    "row": Unstructured(0.5, "row"),
    "2:4": SemiStructured(2, 4),
    "columns": Columns(0.5),
    "channels": Channels(0.5, 2),
    "blocks of columns": Columns(0.5, block=2),
    "heads": Heads(0.5),
    "layers": Layers(0.5),
    "experts": Experts(0.5),
    "int4": Quantized(Unstructured(0.5), Grid(4, 32)),
    "5.9 bits a weight": Quantized(Unstructured(0.5), Coded(5.9)),
    "int8 per output channel": Quantized(Unstructured(0.0), Grid(8, ROW)),
    "stack": Stacked((Unstructured(0.5), SemiStructured(2, 4)), (1, 2)),
}


@given(st.one_of(singles, stacks))
def test_a_description_parses_back_to_its_constraint(constraint: Constraint):
    assert parse_pattern(constraint.describe()) == constraint
    assert str(constraint) == constraint.describe()


@given(singles.filter(lambda c: c.continuous), st.lists(shares, min_size=1, max_size=3))
def test_so_do_those_of_an_allocation(asked: Constraint, each: list[float]):
    patterns = ModelAllocation({f"operator {i}": share for i, share in enumerate(each)}).patterns(asked)
    assert [parse_pattern(own.describe()) for own in patterns.values()] == [asked.with_share(s) for s in each]


def test_every_kind_is_described_here():
    drawn = {type(constraint) for constraint in SMALL.values()}
    assert drawn == {*KINDS, Quantized, Stacked}


NONE = (
    *("unstructured 50%", "unstructured 150% per row", "unstructured 5.0.0% per row", "columns 0.5", "columns .%"),
    *("int4", "x rows 2:4", "0 rows 2:4", "2:4, x bits a weight", "2:4, mxfp4 in groups of 64", f"{'9' * 5000}:4"),
)


@pytest.mark.parametrize("text", NONE, ids=range(len(NONE)))
def test_what_is_no_description_is_refused(text: str):
    with pytest.raises(PatternError, match=r"Unknown pattern|outside \[0, 1\)"):
        parse_pattern(text)


@pytest.mark.parametrize("given", [{"sparsity": nan}, {"sparsity": "half"}, {"sparsity": 0.25}, {"quota": "row"}])
@pytest.mark.parametrize("text", ["2:4", "unstructured 50% per matrix", "2 rows 2:4; 1 rows 2:4", "2:4, int4"])
def test_settings_beside_a_description_that_contradict_it_are_refused(text: str, given: dict[str, Any]):
    with pytest.raises(PatternError, match=r"sparsity|Sparsity|quota"):
        parse_pattern(text, **given)


def test_a_stack_of_another_height_is_refused():
    with pytest.raises(PatternError, match="Accepted: 3 rows"):
        SMALL["stack"].check(4, 32)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group", [32, ROW])
def test_a_grid_is_known_by_its_description(name: str, group: int):
    grid = make_grid(name, group)
    assert parse_pattern(f"unstructured 0% per matrix, {grid}").grid == grid


@given(st.sampled_from(sorted(SMALL)), seeds, st.booleans())
def test_a_projection_is_in_the_set_and_stays_there(name: str, seed: int, weighted: bool):
    constraint, weight = SMALL[name], random(seed, 3, 32)
    metric = random(seed + 1, 32).square() if weighted else None
    projected = constraint.project(weight, metric)
    assert constraint.violation(projected) == 0
    torch.testing.assert_close(constraint.project(projected, metric), projected)


@given(st.sampled_from(("matrix", "row", "2:4", "columns")), seeds)
def test_no_other_choice_of_entries_is_nearer_in_the_metric(name: str, seed: int):
    constraint, weight, metric = SMALL[name], random(seed, 2, 4), random(seed + 1, 4).square()

    def distance(other: torch.Tensor) -> float:
        return float(((other - weight).square() * metric).sum())

    choices = (torch.tensor(bits).view(2, 4) * weight for bits in product((0.0, 1.0), repeat=8))
    least = min(distance(other) for other in choices if constraint.violation(other) == 0)
    assert distance(constraint.project(weight, metric)) == pytest.approx(least)


@pytest.mark.parametrize(("name", "broken"), [("matrix", 12), ("row", 12), ("2:4", 12), ("columns", 4), ("stack", 12)])
def test_what_is_too_many_is_counted(name: str, broken: int):
    assert SMALL[name].violation(torch.ones(3, 8)) == broken


@given(st.sampled_from(("matrix", "row", "2:4", "columns", "blocks of columns")), st.integers(1, 5), st.integers(1, 3))
def test_a_budget_counts_the_zeros(name: str, rows: int, eights: int):
    constraint, columns = SMALL[name], 8 * eights
    budget = constraint.budget((rows, columns))
    assert budget is not None
    unit = budget.block * budget.rows
    assert rows * columns // budget.width * (budget.width - budget.kept) == constraint.zeros(rows, columns)
    weight = random(eights, rows, columns)
    sums, norms = budget.sums(weight), budget.norms(weight.abs())
    assert sums.shape == norms.shape == (rows * columns // (budget.width * unit), budget.width)
    torch.testing.assert_close(sums.sum(), weight.sum())
    torch.testing.assert_close(norms.square(), budget.sums(weight.square()))
    spread = budget.spread(sums, weight.shape)
    assert spread.shape == weight.shape
    torch.testing.assert_close(budget.sums(spread), unit * sums)


def test_a_unit_of_columns_is_they_in_its_rows():
    budget = Budget(width=2, kept=1, block=2, rows=2)
    weight = torch.arange(16).view(4, 4)
    assert budget.sums(weight).tolist() == [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]
    rows = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert budget.spread(torch.tensor([[1, 2], [3, 4]]), (4, 4)).tolist() == rows


def test_what_has_no_lines_has_no_budget():
    assert SMALL["stack"].budget((3, 8)) is None


def test_nothing_in_the_product_asks_which_kind_a_constraint_is():
    kinds = "|".join(kind.__name__ for kind in (*KINDS, Quantized, Stacked, Constraint)) + "|Mask|AbstractPattern"
    asks = re.compile(rf"(isinstance|issubclass)\(.*\b({kinds})\b|type\(\w*(pattern|constraint)\w*\)")
    folder = Path(convexprune.__file__).parent
    files = [path for each in (folder, folder / "adapters", folder / "validation") for path in each.rglob("*.py")]
    assert len(files) > 100
    assert [f"{path}: {line}" for path in files for line in path.read_text().splitlines() if asks.search(line)] == []
