"""A diagonal below the Gram matrix: the separable part of an error."""

import torch
from torch import Tensor

from convexprune.core._factor import cholesky

LEAST_LENGTH = 1e-6  # of a Newton step: shorter ones are not worth a factorisation
POWER_ITERATIONS = 20
POWER_STARTS = 4
FLOOR = 0.1  # of the barrier that keeps a split positive, to the one that keeps it below


def first_split(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """The inverse of H, and a split to begin with: 1 / [H^-1]_jj, shrunk until H - B is positive semidefinite.

    Args:
        gram: H [n n].

    Returns:
        H^-1 [n n] and B [n]; None if H is not positive definite by more than rounding.
    """
    factor = cholesky(_less(gram, torch.full_like(gram[0], rounding(gram))))
    if factor is None:
        return None
    inverse = torch.cholesky_inverse(factor)
    del factor
    root = inverse.diagonal().rsqrt()
    # Its largest eigenvalue is what 1 / [H^-1]_jj is too large by; a guess, for `safe_split` to prove.
    scaled = torch.outer(root, root).mul_(inverse).float()
    vectors = torch.randn(POWER_STARTS, len(gram), generator=torch.Generator().manual_seed(0)).to(scaled)
    for _ in range(POWER_ITERATIONS):
        vectors = vectors / vectors.norm(dim=1, keepdim=True) @ scaled  # rows: thin columns are slow on a CPU
    split = safe_split(gram, 0.95 * root.square()[None] / float(vectors.norm(dim=1).max()))[0]
    return (inverse, split) if bool((split > 0).all()) else None


def safe_split(gram: Tensor, split: Tensor) -> Tensor:
    """A split shrunk, row by row, until a Cholesky factorisation proves H - B positive semidefinite.

    Args:
        gram: H [n n].
        split: B [m n], not negative.

    Returns:
        The split [m n].
    """
    distinct = split[:1] if split.stride(0) == 0 else split
    rows = []
    for row in distinct:
        shrink = 1.0
        while not is_below(gram, row * shrink):
            shrink = shrink * 0.999 if shrink > 0.9 else shrink * 0.5 if shrink > 1e-9 else 0.0
        rows.append(row * shrink)
    return torch.stack(rows).expand(split.shape)


def fit_split(gram: Tensor, split: Tensor, gain: Tensor, barrier: float) -> Tensor:
    """A Newton step on  <gain, B> + barrier (log det(H - B) + 1/10 sum log B)  from a feasible split.

    Args:
        gram: H [n n].
        split: B [n].
        gain: the derivative of the relaxed value by B [n].

    Returns:
        The split [n]; as it was if no step is feasible.
    """
    factor = cholesky(_less(gram, split))
    if factor is None:
        return split
    inverse = torch.cholesky_inverse(factor)
    gradient = gain - barrier * inverse.diagonal() + FLOOR * barrier / split
    del factor
    hessian = inverse.square_().mul_(barrier)
    hessian.diagonal().add_(barrier * FLOOR / split.square())
    factor = cholesky(hessian)
    if factor is None:
        return split
    move = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    shrinking = move < 0
    length = min(1.0, 0.9 * float((-split / move)[shrinking].min())) if bool(shrinking.any()) else 1.0
    while length > LEAST_LENGTH:
        if cholesky(_less(gram, split + length * move)) is not None:
            return split + (length if length == 1 else 0.9 * length) * move
        length *= 0.7
    return split


def rounding(gram: Tensor) -> float:
    """A bound on the error of a Cholesky factorisation of H, as a multiple of the identity (Higham 2002, theorem 10.3).

    Args:
        gram: H [n n].

    Returns:
        n (n + 2) rounding errors of the largest diagonal entry.
    """
    n = len(gram)
    return n * (n + 2) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max())


def is_below(gram: Tensor, split: Tensor) -> bool:
    """Return True if a Cholesky factorisation proves H - B positive semidefinite.

    Args:
        gram: H [n n].
        split: B [n].

    Returns:
        True with a proof.
    """
    return cholesky(_less(gram, split + rounding(gram))) is not None


def _less(gram: Tensor, diagonal: Tensor) -> Tensor:
    """H - B [n n] for a diagonal B [n]."""
    rest = gram.clone()
    rest.diagonal().sub_(diagonal)
    return rest
