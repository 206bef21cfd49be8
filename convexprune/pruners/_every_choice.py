"""Few choices of whole columns, as of a model's heads: all of them are tried."""

from itertools import combinations
from math import comb, inf

import torch
from torch import Tensor

from convexprune.constraints import Constraint
from convexprune.core._quadratic import Quadratic
from convexprune.pruners._refit import on_columns


def choices(pattern: Constraint, shape: tuple[int, int]) -> int | None:
    """How many choices a pattern leaves.

    Args:
        pattern: the pattern.
        shape: (m, n) of the weight.

    Returns:
        The number; None if it does not choose whole columns, alike in all rows.
    """
    if not pattern.by_column or len(pattern.parts(shape[0])) > 1:
        return None
    return comb(shape[1] // pattern.block, pattern.zeros(1, shape[1]) // pattern.block)


def best_choice(quadratic: Quadratic, pattern: Constraint) -> Tensor:
    """The choice of whole columns with the least error, with the values that are the best on it.

    The values belong to it: what is made up for best may be what is missed most where nothing makes up for it.

    Args:
        quadratic: the error as a quadratic of V [m n], about the dense weight.
        pattern: that leaves few choices.

    Returns:
        The weight [m n], zero in what is not kept.
    """
    assert quadratic.anchor is not None
    n, block = quadratic.anchor.shape[1], pattern.block
    best, least = quadratic.anchor, inf
    for gone in combinations(range(n // block), pattern.zeros(1, n) // block):
        kept = torch.ones(n // block, dtype=torch.bool, device=best.device)
        kept[list(gone)] = False
        kept = kept.repeat_interleave(block)
        weight = on_columns(quadratic, kept, quadratic.anchor * kept)
        error = float(quadratic.values(weight).sum())
        if error < least:
            best, least = weight, error
    return best
