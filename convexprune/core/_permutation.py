"""The order of a weight's columns: the cost of N:M patterns depends on the order."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from convexprune.constraints import Constraint

ASSIGNED = 256  # groups at once: an assignment costs the third power of them, and more gain little


def pruned_fraction(scores: Tensor, pattern: Constraint) -> float:
    """Return the part of the sum of all scores [m n] that lies on pruned entries; 0 where all scores are 0."""
    kept, whole = (float(part.sum(dtype=torch.float64)) for part in (scores.where(pattern.mask(scores), 0), scores))
    return 1 - kept / whole if whole > 0 else 0.0


def permutation(scores: Tensor, pattern: Constraint, sweeps: int = 4, seed: int = 0) -> Tensor:
    """Return an order [n] of the columns of scores [m n] in which N:M prunes less of their sum.

    A step takes a column, drawn at random, out of every group of M, and puts every column back into the group with the
    least total cost: a linear assignment problem, solved exactly (SciPy), so no step raises the sum. With b the (M -
    N)-th smallest score of the group's remaining columns in a row, the additional cost of column s there is

        sum_i min(b_i, s_i) = sum_i (b_i + s_i - |b_i - s_i|) / 2

    whose first two terms are equal for all assignments: the sum of the distances |b - s|_1 is maximised. Permuting
    channels for N:M is from Pool & Yu (NeurIPS 2021), the linear assignment from RIA (Zhang et al., ICLR 2024).
    """
    pattern.check(*scores.shape)
    size, generator = pattern.block, torch.Generator().manual_seed(seed)
    groups = torch.arange(scores.shape[1]).view(-1, size)
    for _ in range(sweeps * size):
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1))
        for some in torch.randperm(len(groups), generator=generator).split(ASSIGNED):
            groups[some, 0] = groups[some, 0][_assigned(scores, groups[some], pattern)]
    return groups.flatten()


def _assigned(scores: Tensor, groups: Tensor, pattern: Constraint) -> Tensor:
    """Return, for every group [g M], the number of the group whose first column it receives."""
    loose, remaining = scores[:, groups[:, 0]], scores[:, groups[:, 1:].flatten()]
    by_group = remaining.view(len(scores), len(groups), -1)
    budget = pattern.budget(scores.shape)
    assert budget is not None, f"{pattern} does not see the order of columns"
    threshold = by_group.kthvalue(budget.width - budget.kept, dim=-1).values
    distances = torch.cdist(threshold.T, loose.T, p=1)
    return torch.as_tensor(linear_sum_assignment(distances.cpu().numpy(), maximize=True)[1])
