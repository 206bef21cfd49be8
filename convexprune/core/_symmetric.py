"""Symmetric matrices: sums as upper triangles, Cholesky factors, the largest eigenvalue, and units without rounding."""

import torch
from torch import Tensor

from convexprune._device.precision import add_gram, bare_product, has_wide_sums, in_columns
from convexprune.errors import PruningError

STRIPS = 6  # of rows, in which a symmetric product is computed: 7/12 of the whole
WIDE = 1024
"""Rows from which torch, on a CPU, spends most of a factorisation in copying the triangle column by column."""
BLOCK = 256
ITERATIONS = 100
STARTS = 8
MARGIN = 1.01  # the power method approaches the largest eigenvalue from below


def add_square(total: Tensor, x: Tensor) -> None:
    """Add X' X on and above the diagonal of a sum [n n]; the rest is symmetric, and would cost as much again.

    X [tokens n] has the dtype of the sum, or 16 bits.
    """
    if not has_wide_sums(x.device):
        x = in_columns(x.to(total))
    rows = -(-len(total) // STRIPS) or 1
    for first in range(0, len(total), rows):
        add_gram(total[first : first + rows, first:], x[:, first : first + rows], x[:, first:])


def from_upper(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix [n n] with the upper triangle of `triangle`."""
    return triangle.triu() + triangle.triu(1).T


def quadratic_forms(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return w_i M w_i' by row [m] of a weight, in the dtype of a symmetric M."""
    weight = weight.to(matrix)
    return (bare_product(weight, matrix) * weight).sum(1)


def rounding_margin(gram: Tensor) -> float:
    """Return the reduction of the diagonal before a factorisation, so that F F' does not exceed H by rounding.

    More than observed errors, and less than the n (n + 2) rounding errors that are proven (Higham 2002, theorem 10.3).
    """
    return len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())


def cholesky(gram: Tensor) -> Tensor | None:
    """Return the lower triangular F with F F' = H [n n], or of several [e n n]; None if an H is not positive definite.

    Blocks are the same sums in a different order: bounds on the rounding hold for both (Higham 2002, theorem 10.3).
    Like torch's, the factor lies column by column in memory, as LAPACK wants.
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
    """Return the Cholesky factor of a matrix that has to be positive definite."""
    factor = cholesky(gram)
    if factor is None:
        raise PruningError("The Gram matrix is not positive definite: raise the damping, or calibrate on more tokens.")
    return factor


def definite_inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(definite_factor(gram))


def upper_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular U with U' U = H^-1: R^-1 where H = R R' with an upper triangular R."""
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(definite_factor(gram.flip(0, 1)), unit, upper=False).flip(0, 1)


def ridged(gram: Tensor, damping: float) -> Tensor:
    """Return H + damping mean(diag H) I [n n]."""
    ridged = gram.clone()
    ridged.diagonal().add_(damping * gram.diagonal().mean())
    return ridged


def largest_eigenvalue(gram: Tensor) -> float:
    """Return an upper estimate of the largest eigenvalue, by the power method with a margin of 1 %."""
    generator = torch.Generator().manual_seed(0)  # several random starts: none may be orthogonal to what is sought
    vectors = torch.randn(STARTS, gram.shape[-1], generator=generator).to(gram)
    unit = power_of_two(gram.diagonal(dim1=-2, dim2=-1).amax())  # or the squares of a norm overflow
    for _ in range(ITERATIONS):  # on rows: thin columns are slow on a CPU
        norms = vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
        vectors = (vectors / norms @ gram) / unit
    return MARGIN * float(vectors.norm(dim=-1).max()) * float(unit)


def power_of_two(size: Tensor) -> Tensor:
    """Return the power of two above positive numbers, at most twice as large; 1 where `size` is zero."""
    return torch.where(size > 0, size / torch.frexp(size).mantissa, torch.ones_like(size))
