"""Constraints and grids by name. To add one: a file here, and a line in `KINDS` or `GRIDS`."""

import re
from collections.abc import Callable
from functools import partial

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import Budget, check_share, check_some, column_norms, sizes
from convexprune.constraints._codebook import AnyOf, Codebook, OnGrid
from convexprune.constraints._coded import Coded, entropy
from convexprune.constraints._columns import Channels, Columns, Experts, Heads, Layers
from convexprune.constraints._combined import Quantized, Stacked
from convexprune.constraints._entries import SemiStructured, Unstructured
from convexprune.constraints._ggml import BLOCKS, Q4_0, Q5_0, Q8_0, Block
from convexprune.constraints._grid import FP4, GROUPS, MXFP4, NF4, ROW, Grid, Grouped
from convexprune.constraints._scales import Scales, divisible
from convexprune.errors import PatternError, unknown

KINDS: tuple[type[Constraint], ...] = (Unstructured, SemiStructured, Columns, Channels, Heads, Layers, Experts)

GRIDS: dict[str, Callable[[int], Codebook]] = {
    **{f"int{bits}": partial(Grid, bits) for bits in (8, 7, 6, 5, 4, 3)},
    "nf4": NF4,
    "fp4": FP4,
    **{grid.name: lambda group, grid=grid: grid() for grid in (MXFP4, *BLOCKS)},
}
"""Make the grid of a name for a number of columns that share a scale."""
FAMILIES = {
    # IQ4_NL has as many bytes as Q4_0, and errs less.
    "gguf": AnyOf("gguf", tuple(grid() for grid in BLOCKS if grid is not Q4_0)),
    "compressed-tensors": AnyOf("compressed-tensors", (Grid(8, ROW), *(Grid(4, group) for group in GROUPS))),
}
"""Grids of a layout, of which each operator gets one."""


def parse_pattern(pattern: str, sparsity: float | None = None, quota: Quota = "matrix") -> Constraint:
    """Return the constraint of a name or a description.

    Args:
        pattern: "unstructured", "columns", "columns:BLOCK", "channels", "channels:MULTIPLE", "heads", "layers" or
            "experts" (a share), "N:M"; or a text of `Constraint.describe`.
        sparsity: the share of zeros in [0, 1), for a name without a share; None: 0.5, or the pattern's fixed share.
        quota: of "unstructured": the unit with the share, every "matrix" or every "row".

    Returns:
        The constraint.

    Raises:
        PatternError: the name is unknown, or contradicts `sparsity` or `quota`.
    """
    if sparsity is not None:
        check_share(sparsity)
    found = _parsed(pattern, sparsity, quota) if isinstance(pattern, str) else None
    if found is None:
        raise PatternError(
            f"Unknown pattern {pattern!r}. Known: 'unstructured', 'N:M' for N non-zeros in M, 'columns', "
            "'columns:BLOCK', 'channels', 'channels:MULTIPLE', 'heads', 'layers', 'experts'; quantize='int4' puts "
            "what is kept on a grid."
        )
    if sparsity is not None and abs(found.sparsity - sparsity) > 1e-9:
        raise PatternError(
            f"Pattern {found} has sparsity {found.sparsity:g}, but {sparsity:g} was asked. Leave the sparsity out, "
            f"or take a pattern that has it (N:M means N non-zeros in M)."
        )
    return found


def _parsed(text: str, sparsity: float | None, quota: Quota) -> Constraint | None:
    stack = [re.fullmatch(r"([1-9]\d{0,8}) rows (.+)", part) for part in text.split("; ")]
    if all(stack):
        if sparsity is not None or quota != "matrix":
            raise PatternError(f"Pattern {text!r} has shares of its own. Leave sparsity and quota out.")
        parts = [(parse_pattern(match[2]), int(match[1])) for match in stack if match]
        return Stacked(tuple(own for own, _ in parts), tuple(height for _, height in parts))
    support, _, values = text.rpartition(", ")
    if support and (grid := _read_grid(values)) is not None:
        return Quantized(parse_pattern(support, sparsity, quota), grid)
    for kind in KINDS:
        found = kind.parse(text, sparsity, quota)
        if found is not None:
            return found
    return None


def make_grid(name: str, group: int = ROW) -> Codebook:
    """Return the grid of a name.

    Args:
        name: a key of `GRIDS`, or a description (its `str`).
        group: columns that share a scale, for a name.

    Returns:
        The grid.

    Raises:
        PatternError: there is no such grid.
    """
    found = GRIDS[name](group) if name in GRIDS else _read_grid(name)
    if found is None:
        raise PatternError(unknown("grid", name, tuple(GRIDS)))
    return found


def _read_grid(text: str) -> Codebook | None:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) bits a weight", text):
        return Coded(float(match[1]))
    match = re.fullmatch(r"(\w+)( in groups of (\d{1,9})| per output channel)?", text)
    if match is None or match[1] not in GRIDS:
        return None
    grid = make_grid(match[1], int(match[3] or ROW))
    return grid if text in (match[1], str(grid)) else None  # nobody's group is replaced


__all__ = ["SemiStructured", "Unstructured", "parse_pattern"]  # for users; rooms take the other names, too
