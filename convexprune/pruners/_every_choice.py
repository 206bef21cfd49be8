"""Enumerate the choices of whole columns where they are few, as for a model's heads."""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

from convexprune.constraints import Constraint
from convexprune.core import Quadratic
from convexprune.pruners._refit import on_columns


def choices(pattern: Constraint, shape: tuple[int, int]) -> int | None:
    """Count the choices of a pattern; None if it does not choose whole columns, alike in all rows."""
    if not pattern.by_column or len(pattern.parts(shape[0])) > 1:
        return None
    return comb(*_blocks(pattern, shape))


def _blocks(pattern: Constraint, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the number of blocks of columns, and the number that a pattern removes."""
    rows, columns = shape
    return columns // pattern.block, pattern.zeros(rows, columns) // (rows * pattern.block)


def best_choice(quadratic: Quadratic, pattern: Constraint) -> Tensor:
    """Return the choice of whole columns with the least error, with its best values.

    The values belong to the choice: a column that is compensated best may be the one that is missed most without
    compensation.

    Args:
        quadratic: the error as a quadratic of V [m n], about the dense weight.

    Returns:
        The weight [m n], zero in removed columns.
    """
    dense = quadratic.anchor
    assert dense is not None
    blocks, removed = _blocks(pattern, quadratic.shape)

    def without(gone: tuple[int, ...]) -> Tensor:
        kept = torch.ones(blocks, dtype=torch.bool, device=dense.device)
        kept[list(gone)] = False
        kept = kept.repeat_interleave(pattern.block)
        return on_columns(quadratic, kept, dense * kept)

    return min(
        map(without, combinations(range(blocks), removed)), key=lambda weight: float(quadratic.values(weight).sum())
    )
