"""OSSCAR: Optimal Brain Surgeon for whole columns, and a local search after it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.core._factor import definite_factor
from convexprune.core._setting_types import NotNegative
from convexprune.pruners._base import AbstractPruner, LayerEdit, LayerProblem, dead_inputs_first

LEAST = 1e-9  # relative: what an exchange has to gain, beyond rounding


@dataclass(frozen=True)
class OSSCAR(AbstractPruner):
    """Meng et al., arXiv 2403.12983 (mazumder-lab/OSSCAR): whole columns are removed one by one, then exchanged.

    With P = H^-1 of the columns that are left, and V their best weights, removing column j costs |V_:j|^2 / 2 P_jj once
    all others have adapted. The one that costs least goes, and

        V <- V - V_:j P_j: / P_jj,   P <- P - P_:j P_j: / P_jj

    which is Optimal Brain Surgeon for groups, as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110). In each
    round of exchanges after it, the columns that cost least to remove give way to as many that gain most, by what each
    alone costs and gains; a round that does not lower the error is undone, and the next one exchanges half as many.
    Last come the weights of least squares on what is left. All of it begins at the damped minimiser.

    Differences to the authors' code: one column at a time, and an error correction if one is asked for.

    Args:
        damping: the ridge, in units of the mean diagonal of H.
        exchanged: the share of the removed columns that the first round exchanges; 0 is Optimal Brain Surgeon alone.
    """

    columns_only = True
    one_by_one = True

    damping: NotNegative = 0.01
    exchanged: NotNegative = 0.1

    @dead_inputs_first
    def prune(self, problem: LayerProblem) -> LayerEdit:
        """See `AbstractPruner.prune`.

        Raises:
            PruningError: the damped Gram matrix is not positive definite.
        """
        gram = problem.quadratic.gram.to(torch.float64, copy=True)
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        target = (problem.weight.double() @ gram).add_(problem.quadratic.cross)
        weights, masks = list[Tensor](), list[Tensor]()
        for rows, pattern in problem.pattern.parts(len(target)):
            kept = self._choice(gram, target[rows], pattern.zeros(1, len(gram)))
            weights.append(best(gram, target[rows], kept))
            masks.append(kept.expand_as(target[rows]))
        return LayerEdit(torch.cat(weights).to(problem.weight), torch.cat(masks))

    def _choice(self, gram: Tensor, target: Tensor, count: int) -> Tensor:
        """Which columns are kept [n], `count` less than all."""
        kept = backward(gram, target, count)
        size, value = int(self.exchanged * count), explained(gram, target, kept)
        while size > 0:
            found = exchange(gram, target, kept, size)
            better = explained(gram, target, found)
            if better > value * (1 + LEAST):
                kept, value = found, better
            else:
                size //= 2
        return kept


def backward(gram: Tensor, target: Tensor, count: int) -> Tensor:
    """Remove columns one by one.

    Args:
        gram: H [n n].
        target: G [m n]; V = G H^-1 is the minimiser.
        count: how many are removed.

    Returns:
        Which are kept [n].

    Raises:
        PruningError: H is not positive definite.
    """
    inverse = torch.cholesky_inverse(definite_factor(gram))
    weight = target @ inverse
    kept = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(count):
        costs = weight.square().sum(0) / inverse.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
        j = int(costs.masked_fill(~kept, torch.inf).argmin())
        row = inverse[j] / inverse[j, j]
        weight.addr_(weight[:, j].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, j].clone(), row, alpha=-1)
        kept[j] = False
    return kept


def exchange(gram: Tensor, target: Tensor, kept: Tensor, size: int) -> Tensor:
    """Drop the columns that cost least, and take in as many that gain most.

    Args:
        gram: H [n n].
        target: G [m n].
        kept: which columns are kept [n].
        size: how many change.

    Returns:
        Which are kept now [n].
    """
    weight = best(gram, target, kept)
    on = kept.nonzero().flatten()
    inverse = torch.cholesky_inverse(definite_factor(gram[on][:, on]))
    costs = weight[:, on].square().sum(0) / inverse.diagonal()
    left = kept.clone()
    left[on[costs.topk(size, largest=False).indices]] = False
    residual, factor = target - best(gram, target, left) @ gram, definite_factor(gram[left][:, left])
    solved = torch.linalg.solve_triangular(factor, gram[left], upper=False)
    gains = residual.square().sum(0) / (gram.diagonal() - solved.square().sum(0)).clamp_min(1e-12 * gram.diagonal())
    left[gains.masked_fill(left, -torch.inf).topk(size).indices] = True
    return left


def best(gram: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """The weights of least squares on some columns.

    Args:
        gram: H [n n].
        target: G [m n].
        kept: the columns [n].

    Returns:
        V [m n], zero elsewhere.
    """
    weight = torch.zeros_like(target)
    weight[:, kept] = torch.cholesky_solve(target[:, kept].T, definite_factor(gram[kept][:, kept])).T
    return weight


def explained(gram: Tensor, target: Tensor, kept: Tensor) -> float:
    """How much less the error is than that of no weights: tr(V G') / 2 of the best V on some columns.

    Args:
        gram: H [n n].
        target: G [m n].
        kept: the columns [n].

    Returns:
        The number.
    """
    return float((best(gram, target, kept) * target).sum()) / 2
