"""OSSCAR: Optimal Brain Surgeon for whole columns or blocks of columns, and a local search."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._setting_types import NotNegative
from convexprune.core import definite_factor, definite_inverse, ridged
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first
from convexprune.pruners._cost import Cost

LEAST = 1e-9  # relative: what an exchange has to gain, beyond rounding


@dataclass(frozen=True)
class OSSCAR(AbstractPruner):
    """Meng et al., arXiv 2403.12983 (mazumder-lab/OSSCAR): blocks of columns are removed in turn, then exchanged.

    With P = H^-1 of the remaining columns, and V their best weights, removing a block B of columns costs tr(V_:B
    P_BB^-1 V_:B') / 2 once all weights have adapted. The cheapest block goes, and

        V <- V - V_:B P_BB^-1 P_B:,   P <- P - P_:B P_BB^-1 P_B:

    which is Optimal Brain Surgeon for groups, as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110). A block is
    a single column by default, and a KV group for heads. In a round of exchanges, the cheapest blocks give way to as
    many blocks with the largest gain, by separate costs and gains; a round that does not lower the error is undone, and
    the next round exchanges half as many. The last step is least squares on the remaining columns. The method begins at
    the damped minimiser.

    Differences from the authors' code: blocks go singly, and an error correction on request.

    Args:
        damping: the ridge, in units of the mean diagonal of H.
        exchanged: the share of the removed blocks exchanged in the first round; 0 is Optimal Brain Surgeon alone.
    """

    columns_only = True
    cost: ClassVar[Cost] = Cost(6.4, 8.0, 5, 8, 8.0)

    damping: NotNegative = 0.01
    exchanged: NotNegative = 0.1

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        self.require(problem.pattern)
        gram = ridged(problem.quadratic.gram.double(), self.damping)
        target = (problem.weight.double() @ gram).add_(problem.quadratic.cross)
        weights, masks = list[Tensor](), list[Tensor]()
        for rows, pattern in problem.pattern.parts(len(target)):
            kept = self._choice(gram, target[rows], pattern.zeros(1, len(gram)) // pattern.block, pattern.block)
            weights.append(best(gram, target[rows], kept))
            masks.append(kept.expand_as(target[rows]))
        return LayerEdit(torch.cat(weights).to(problem.weight), torch.cat(masks))

    def _choice(self, gram: Tensor, target: Tensor, count: int, block: int) -> Tensor:
        """Choose the kept columns [n], `count` blocks fewer than all."""
        kept = backward(gram, target, count, block)
        size = min(int(self.exchanged * count), int(kept.sum()) // block)  # no more can go than are kept
        value = explained(gram, target, kept)
        while size > 0:
            found = exchange(gram, target, kept, size, block)
            better = explained(gram, target, found)
            if better > value * (1 + LEAST):
                kept, value = found, better
            else:
                size //= 2
        return kept


def backward(gram: Tensor, target: Tensor, count: int, block: int = 1) -> Tensor:
    """Return the mask of columns [n] that are kept when blocks are removed in turn, from the minimiser V = G H^-1."""
    inverse = definite_inverse(gram)
    weight = target @ inverse
    kept = torch.ones(len(gram) // block, dtype=torch.bool, device=gram.device)
    for _ in range(count):
        costs = forms(weight, diagonal_blocks(inverse, block))
        j = int(costs.masked_fill(~kept, torch.inf).argmin())
        its = slice(j * block, (j + 1) * block)
        rows = torch.linalg.solve(inverse[its, its], inverse[its])
        weight.addmm_(weight[:, its].clone(), rows, alpha=-1)
        inverse.addmm_(inverse[:, its].clone(), rows, alpha=-1)
        kept[j] = False
    return kept.repeat_interleave(block)


def exchange(gram: Tensor, target: Tensor, kept: Tensor, size: int, block: int = 1) -> Tensor:
    """Drop the cheapest blocks of the kept columns [n], and take in as many with the largest gain."""
    weight, left = best(gram, target, kept), kept[::block].clone()
    on = left.nonzero().flatten()
    inverse = definite_inverse(gram[kept][:, kept])
    costs = forms(weight[:, kept], diagonal_blocks(inverse, block))
    left[on[costs.topk(size, largest=False).indices]] = False
    columns = left.repeat_interleave(block)
    residual, factor = target - best(gram, target, columns) @ gram, definite_factor(gram[columns][:, columns])
    solved = torch.linalg.solve_triangular(factor, gram[columns], upper=False).unflatten(1, (-1, block))
    alone = diagonal_blocks(gram, block)
    unexplained = alone - torch.einsum("lkb,lkc->kbc", solved, solved)
    unexplained.diagonal(dim1=1, dim2=2).add_(1e-12 * alone.diagonal(dim1=1, dim2=2))  # beyond rounding
    gains = forms(residual, unexplained)
    left[gains.masked_fill(left | gains.isinf(), -torch.inf).topk(size).indices] = True
    return left.repeat_interleave(block)


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """Return the blocks [n/b b b] on the diagonal of a matrix [n n]."""
    parts = matrix.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def forms(columns: Tensor, blocks: Tensor) -> Tensor:
    """Return tr(C_k B_k^-1 C_k') of every block of columns C [m k*b]; infinite where B is not positive definite."""
    factors, failed = torch.linalg.cholesky_ex(blocks)
    sides = columns.unflatten(1, blocks.shape[:2]).permute(1, 2, 0)
    solved = sides / factors if blocks.shape[1] == 1 else torch.linalg.solve_triangular(factors, sides, upper=False)
    return solved.square().sum((1, 2)).masked_fill(failed > 0, torch.inf)


def best(gram: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Return the weights of least squares on some columns [n], zero elsewhere."""
    weight = torch.zeros_like(target)
    weight[:, kept] = torch.cholesky_solve(target[:, kept].T, definite_factor(gram[kept][:, kept])).T
    return weight


def explained(gram: Tensor, target: Tensor, kept: Tensor) -> float:
    """Return the decrease of the error from zero weights: tr(V G') / 2 of the best V on some columns."""
    return float((best(gram, target, kept) * target).sum()) / 2
