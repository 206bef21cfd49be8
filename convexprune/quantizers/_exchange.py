"""Codes one after another, each the best while all others stay; and what a code costs in bits."""

import torch
from torch import Tensor

from convexprune.constraints._abstract_grid import spread
from convexprune.constraints._coded import frequencies
from convexprune.quantizers._base import OnGrid

BLOCK = 64  # columns between two products


def exchanged(gram: Tensor, found: OnGrid, residual: Tensor, mask: Tensor, price: float) -> tuple[OnGrid, Tensor]:
    """One pass over the columns: each code becomes the best one while all others stay as they are.

    Without a price that is the nearest one to t_ij = (V_ij + K_ij / H_jj) / scale_j (QuantEase, arXiv 2309.01885). With
    a price a code c costs `price` times its length l_c in bits besides: min q(V) + price * bits(V). With
    h = H_jj scale_j^2 that is h (c - t)^2 / 2 + price * l_c, so c is better than c - 1 for

        |t| > c - 1/2 + price (l_c - l_{c-1}) / h.

    Columns are rows of what is transposed, so that they lie together in memory.

    Args:
        gram: H [n n], positive definite.
        residual: K [m n] there; it is overwritten.
        mask: which entries are kept [m n].
        price: of a bit, in units of q; 0: none.
    """
    grid = found.grid
    codes, scales = found.codes.T.contiguous(), spread(found.scales, len(gram)).T.contiguous()
    pulls, kept = scales * gram.diagonal()[:, None], mask.T.contiguous()
    extra = code_lengths(found.codes).diff() * price if price else None
    halves = torch.arange(grid.highest, dtype=gram.dtype, device=gram.device) + 0.5
    for first in range(0, len(gram), BLOCK):
        last = min(first + BLOCK, len(gram))
        ahead = residual[:, first:last].T.contiguous()
        steps = torch.empty_like(ahead)
        for j in range(first, last):
            best = codes[j] + ahead[j - first] / pulls[j]
            if extra is None:
                code = best.round_().clamp_(grid.lowest, grid.highest)
            else:
                ends = (halves + extra / (pulls[j] * scales[j])).cummax(0).values
                code = best.sign() * torch.bucketize(best.abs(), ends)
            code *= kept[j]
            steps[j - first] = step = (code - codes[j]) * scales[j]
            codes[j] = code
            ahead[j - first :] -= gram[j, j:last, None] * step
        residual.addmm_(steps.T, gram[first:last], alpha=-1)
    return OnGrid(grid, found.scales, codes.T.contiguous()), residual


def code_lengths(codes: Tensor) -> Tensor:
    """What codes 0 to 127 cost in bits: -log2 of their frequencies, those of c and -c taken together.

    Args:
        codes: of any shape, -127 to 127.

    Returns:
        [128], never falling, in the dtype of `codes`. What never occurs counts as a sixteenth of an occurrence.
    """
    counts = frequencies(codes).to(codes)[1:]
    counts = (counts + counts.flip(0))[127:] / 2 + 1 / 16
    return -(counts / (2 * counts.sum() - counts[0])).cummin(0).values.log2_()
