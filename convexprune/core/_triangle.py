"""Symmetric matrices: sums as upper triangles, at little more than half the cost, and quadratic forms."""

from torch import Tensor

from convexprune._device.precision import add_gram, has_wide_sums

STRIPS = 6  # of rows, in which a symmetric product is computed: 7/12 of the whole


def add_square(total: Tensor, x: Tensor) -> None:
    """Add X' X on and above the diagonal; the rest is symmetric, and would cost as much again.

    Args:
        total: the sum [n n], in place.
        x: X [tokens n], in the dtype of the sum or in 16 bits.
    """
    if not has_wide_sums(x.device):
        x = x.to(total)
    rows = -(-len(total) // STRIPS)
    for first in range(0, len(total), rows):
        add_gram(total[first : first + rows, first:], x[:, first : first + rows], x[:, first:])


def from_upper(triangle: Tensor) -> Tensor:
    """The symmetric matrix [n n] with the upper triangle of `triangle`."""
    return triangle.triu() + triangle.triu(1).T


def quadratic_forms(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return w_i M w_i' by row.

    Args:
        weight: W [m n].
        matrix: M [n n], symmetric.

    Returns:
        [m], in the dtype of `matrix`.
    """
    weight = weight.to(matrix)
    return ((weight @ matrix) * weight).sum(1)
