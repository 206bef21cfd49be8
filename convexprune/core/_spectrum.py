"""The size of a Gram matrix: its largest eigenvalue, and units without rounding."""

import torch
from torch import Tensor

ITERATIONS = 100
STARTS = 8
MARGIN = 1.01  # the power method approaches the largest eigenvalue from below


def largest_eigenvalue(gram: Tensor) -> float:
    """An upper estimate of the largest eigenvalue, by the power method with a margin of 1 %.

    Args:
        gram: H [n n].
    """
    generator = torch.Generator().manual_seed(0)  # several random starts: none may be orthogonal to what is sought
    vectors = torch.randn(STARTS, len(gram), generator=generator).to(gram)
    unit = power_of_two(gram.diagonal().amax())  # or the squares of a norm overflow
    for _ in range(ITERATIONS):  # on rows: thin columns are slow on a CPU
        norms = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
        vectors = (vectors / norms @ gram) / unit
    return MARGIN * float(vectors.norm(dim=1).max()) * float(unit)


def power_of_two(size: Tensor) -> Tensor:
    """Return the power of two above positive numbers, at most twice as large; 1 where `size` is zero."""
    return torch.where(size > 0, size / torch.frexp(size).mantissa, torch.ones_like(size))
