"""Grids by name. To add one: a subclass of `Codebook` in a file here, and a line in `GRIDS`."""

import re
from collections.abc import Callable
from functools import partial

from convexprune.constraints._codebook import Codebook
from convexprune.constraints._coded import Coded
from convexprune.constraints._ggml import BLOCKS
from convexprune.constraints._grid import ROW, Grid
from convexprune.constraints._tables import FP4, MXFP4, NF4
from convexprune.errors import PatternError, unknown

GRIDS: dict[str, Callable[[int], Codebook]] = {
    **{f"int{bits}": partial(Grid, bits) for bits in (8, 7, 6, 5, 4, 3)},
    "nf4": NF4,
    "fp4": FP4,
    **{grid.name: lambda group, grid=grid: grid() for grid in (MXFP4, *BLOCKS)},
}
"""Make the grid of a name for a number of columns that share a scale."""


def make_grid(name: str, group: int) -> Codebook:
    """Return the grid of a name.

    Args:
        name: a key of `GRIDS`.
        group: columns that share a scale.

    Returns:
        The grid.

    Raises:
        PatternError: there is no such grid.
    """
    if name not in GRIDS:
        raise PatternError(unknown("grid", name, tuple(GRIDS)))
    return GRIDS[name](group)


def read_grid(text: str) -> Codebook | None:
    """Return the grid that a description (its `str`) names; None for another text."""
    if match := re.fullmatch(r"(\S+) bits a weight", text):
        return Coded(float(match[1]))
    match = re.fullmatch(r"(\w+)( in groups of (\d+)| per output channel)?", text)
    return make_grid(match[1], int(match[3] or ROW)) if match and match[1] in GRIDS else None
