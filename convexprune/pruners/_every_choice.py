"""Few choices of whole columns, as of a model's heads: all of them are tried."""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

from convexprune.constraints import Constraint
from convexprune.core._quadratic import Quadratic
from convexprune.pruners._refit import on_columns


def choices(pattern: Constraint, shape: tuple[int, int]) -> int | None:
    """How many choices a pattern leaves.

    Returns:
        The number; None if it does not choose whole columns, alike in all rows.
    """
    if not pattern.by_column or len(pattern.parts(shape[0])) > 1:
        return None
    return comb(*_blocks(pattern, shape))


def _blocks(pattern: Constraint, shape: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of columns there are, and how many of them a pattern removes."""
    rows, columns = shape
    return columns // pattern.block, pattern.zeros(rows, columns) // (rows * pattern.block)


def best_choice(quadratic: Quadratic, pattern: Constraint) -> Tensor:
    """The choice of whole columns with the least error, with the values that are the best on it.

    The values belong to it: what is made up for best may be what is missed most where nothing makes up for it.

    Args:
        quadratic: the error as a quadratic of V [m n], about the dense weight.

    Returns:
        The weight [m n], zero in what is not kept.
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
