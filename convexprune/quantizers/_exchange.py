"""Exchange codes in turn, with all further codes fixed; and the cost of a code in bits."""

import torch
from torch import Tensor

from convexprune.constraints._codebook import divisible
from convexprune.quantizers._base import OnGrid

BLOCK = 64  # columns between two products


def exchanged(gram: Tensor, found: OnGrid, residual: Tensor, mask: Tensor, price: float) -> tuple[OnGrid, Tensor]:
    """Pass over the columns once: each code becomes the best one while all others stay as they are.

    That is the nearest one to t_ij = (V_ij + K_ij / H_jj + offset) / step (QuantEase, arXiv 2309.01885), but for what
    codes cost (`Codebook.chooser`). Columns are rows of what is transposed, so that they lie together in memory.

    Args:
        gram: H [n n], positive definite.
        residual: K [m n] there; it is overwritten.
        mask: which entries are kept [m n].
        price: of a bit, in units of q.
    """
    grid = found.grid
    scales = found.scales.spread(len(gram))[0].T.contiguous()
    codes, kept, diagonal = found.codes.T.contiguous(), mask.T.contiguous(), gram.diagonal()[:, None]
    pulls, choose = divisible(scales) * diagonal, grid.chooser(found.codes, price)
    for first in range(0, len(gram), BLOCK):
        last = min(first + BLOCK, len(gram))
        ahead = residual[:, first:last].T.contiguous()
        steps = torch.empty_like(ahead)
        for j in range(first, last):
            best = codes[j] + ahead[j - first] / pulls[j]
            code = choose(best, pulls[j] * scales[j])
            code *= kept[j]
            steps[j - first] = step = (code - codes[j]) * scales[j]
            codes[j] = code
            ahead[j - first :] -= gram[j, j:last, None] * step
        residual.addmm_(steps.T, gram[first:last], alpha=-1)
    return OnGrid(grid, found.scales, codes.T.contiguous()), residual
