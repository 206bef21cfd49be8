"""The exact truth on small problems: every support is tried, so that a pruner's distance to the optimum is known."""

from itertools import combinations, product

import torch
from torch import Tensor

from convexprune.core import Quadratic
from convexprune.errors import ProblemError
from convexprune.pruners import AbstractPruner, LayerProblem

LARGEST = 20  # columns: 184 756 supports of one half
CHUNK = 20_000  # supports solved at once


@torch.no_grad()
def best_pruning(problem: LayerProblem) -> Tensor:
    """Return the weight in a pattern with the least squared error, by enumeration of all supports of a row.

    Rows are independent. With a quota of the whole matrix the best weight of a row is computed for every number of
    non-zeros, and dynamic programming allocates the numbers. Whole columns are a common support of all rows.

    Args:
        problem: of a weight [m n] with n <= 20.

    Returns:
        The weight [m n].

    Raises:
        ProblemError: the weight has more than 20 columns, or the pattern is not that of one operator.
        PatternError: the n:m pattern does not fit.
    """
    quadratic, pattern = problem.quadratic.double, problem.pattern
    m, n = quadratic.shape
    if n > LARGEST:
        raise ProblemError(f"All supports of {n} columns are too many; brute force takes at most {LARGEST}.")
    budget = pattern.budget((m, n))
    if budget is None:
        raise ProblemError(f"Brute force needs a pattern of one operator that counts its zeros; this is {pattern}.")
    if not budget.by_entry:
        columns = torch.arange(n).view(-1, budget.block)
        return _best(quadratic, columns[_choices(0, budget.width, budget.kept)].flatten(1), together=True)[0]
    if pattern.by_row:
        lines = [_choices(j, budget.width, budget.kept) for j in range(0, n, budget.width)]
        return _best(quadratic, torch.stack([torch.cat(parts) for parts in product(*lines)]))[0]
    every = [_best(quadratic, _choices(0, n, k)) for k in range(n + 1)]
    costs = torch.stack([values for _, values in every])  # [n + 1, m]
    counts = _allocate(costs.T, m * n - pattern.zeros(m, n))
    return torch.stack([every[k][0][i] for i, k in enumerate(counts)])


def excess(problem: LayerProblem, pruners: dict[str, AbstractPruner]) -> dict[str, float]:
    """Measure the distance of pruners from the best pruning.

    Args:
        problem: see `best_pruning`.
        pruners: by name.

    Returns:
        The squared error by pruner over the squared error of the best pruning: 1 is optimal.
    """
    least = float(problem.squared_error(best_pruning(problem)).sum())
    return {
        name: float(problem.squared_error(pruner.prune(problem).weight).sum()) / least
        for name, pruner in pruners.items()
    }


def _choices(first: int, width: int, kept: int) -> Tensor:
    """All ways to keep so many of the `width` columns from `first` on [ways kept]."""
    return torch.tensor(list(combinations(range(first, first + width), kept)), dtype=torch.long)


def _best(q: Quadratic, supports: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
    """Return every row's, or all rows' `together`, best weight [m n] on `supports` [count kept], and its value [m]."""
    q = q.at(None)
    best = q.energy / 2 if supports.shape[1] == 0 else torch.full_like(q.energy, float("inf"))
    weight = torch.zeros_like(q.cross)
    if supports.shape[1] == 0:
        return weight, best
    scale = q.scale()
    gram, cross = q.gram / scale / scale[:, None], q.cross / scale
    for chunk in supports.split(CHUNK):
        inverse = torch.linalg.pinv(gram[chunk[:, :, None], chunk[:, None, :]], hermitian=True, rtol=1e-13)
        part = cross[:, chunk]  # [m count kept]
        solution = torch.einsum("cij,mcj->mci", inverse, part)
        every = q.energy[:, None] / 2 - (solution * part).sum(2) / 2
        values, index = (every.sum(0).expand_as(every) if together else every).min(1)
        for i in (values < best).nonzero()[:, 0].tolist():
            best[i] = values[i]
            weight[i] = 0
            weight[i, chunk[index[i]]] = solution[i, index[i]] / scale[chunk[index[i]]]
    return weight, best


def _allocate(costs: Tensor, total: int) -> list[int]:
    """Return numbers of non-zeros by row with sum `total` and the least sum of costs [m n+1]."""
    options = costs.shape[1]
    least = [0.0] + [float("inf")] * total
    choices: list[list[int]] = []
    for row in costs.tolist():
        following, chosen = [float("inf")] * (total + 1), [0] * (total + 1)
        for used in range(total + 1):
            for k in range(min(options - 1, used) + 1):
                if least[used - k] + row[k] < following[used]:
                    following[used], chosen[used] = least[used - k] + row[k], k
        least = following
        choices.append(chosen)
    counts, left = [], total
    for chosen in reversed(choices):
        counts.append(chosen[left])
        left -= chosen[left]
    return counts[::-1]
