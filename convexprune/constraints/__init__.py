"""Constraints by name. To add a kind: a file here and a line in `KINDS`; a grid has its line in `GRIDS`."""

import re

from convexprune.constraints._base import Constraint, Mask, Quota
from convexprune.constraints._budget import Budget
from convexprune.constraints._channels import Channels
from convexprune.constraints._coded import Coded
from convexprune.constraints._columns import Columns
from convexprune.constraints._grid import Grid
from convexprune.constraints._grids import GRIDS, read_grid
from convexprune.constraints._heads import Heads
from convexprune.constraints._quantized import Quantized
from convexprune.constraints._semi_structured import SemiStructured
from convexprune.constraints._stacked import Stacked
from convexprune.constraints._unstructured import Unstructured
from convexprune.constraints._whole import Experts, Layers
from convexprune.errors import PatternError

KINDS: tuple[type[Constraint], ...] = (Unstructured, SemiStructured, Columns, Channels, Heads, Layers, Experts)


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
    stack = [re.fullmatch(r"(\d+) rows (.+)", part) for part in text.split("; ")]
    if all(stack):
        parts = [(parse_pattern(match[2]), int(match[1])) for match in stack if match]
        return Stacked(tuple(own for own, _ in parts), tuple(height for _, height in parts))
    support, _, values = text.rpartition(", ")
    if support and (grid := read_grid(values)) is not None:
        return Quantized(parse_pattern(support), grid)
    for kind in KINDS:
        found = kind.parse(text, sparsity, quota)
        if found is not None:
            return found
    return None


__all__ = [
    "GRIDS", "KINDS", "Budget", "Channels", "Coded", "Columns", "Constraint", "Experts", "Grid", "Heads", "Layers",
    "Mask", "Quantized", "SemiStructured", "Stacked", "Unstructured", "parse_pattern",
]  # fmt: skip
