"""Cholesky factors: torch's, and on a CPU in blocks where torch takes longer to copy than to compute."""

import torch
from torch import Tensor

from convexprune.errors import PruningError

WIDE = 1024
"""Rows from which torch, on a CPU, spends most of a factorisation in copying the triangle column by column."""
BLOCK = 256


def rounding_margin(gram: Tensor) -> float:
    """Return the reduction of the diagonal before a factorisation, so that F F' does not exceed H by rounding.

    More than observed errors, and less than the n (n + 2) rounding errors that are proven (Higham 2002, theorem 10.3).

    Args:
        gram: H [n n].
    """
    return len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())


def cholesky(gram: Tensor) -> Tensor | None:
    """Return the Cholesky factor of a symmetric matrix.

    Blocks are the same sums in a different order: bounds on the rounding hold for both (Higham 2002, theorem 10.3).
    Like torch's, the factor lies column by column in memory, as LAPACK wants.

    Args:
        gram: H [n n], or several [e n n].

    Returns:
        The lower triangular F with F F' = H, shaped like H; None if an H is not positive definite.
    """
    if len(gram) < WIDE or gram.device.type != "cpu" or gram.ndim == 3:
        factor, info = torch.linalg.cholesky_ex(gram)
        return None if bool(info.any()) else factor
    upper = gram.triu()  # F', row by row
    for first in range(0, len(gram), BLOCK):
        block, after = slice(first, first + BLOCK), slice(first + BLOCK, None)
        corner, info = torch.linalg.cholesky_ex(upper[block, block], upper=True)
        if int(info):
            return None
        upper[block, block] = corner
        upper[block, after] = torch.linalg.solve_triangular(corner.mT, upper[block, after], upper=False)
        for start in range(first + BLOCK, len(gram), BLOCK):
            rows = slice(start, start + BLOCK)
            upper[rows, start:].addmm_(upper[block, rows].mT, upper[block, start:], alpha=-1)
    return upper.mT


def definite_factor(gram: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that has to be positive definite.

    Args:
        gram: H [n n].
    """
    factor = cholesky(gram)
    if factor is None:
        raise PruningError("The Gram matrix is not positive definite: raise the damping, or calibrate on more tokens.")
    return factor
