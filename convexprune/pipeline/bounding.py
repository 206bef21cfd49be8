"""How far a pruned operator is from the best possible, on a few of its rows."""

from dataclasses import replace

import torch
from torch import Tensor

from convexprune.bound import LowerBound
from convexprune.pruners import PruningProblem
from convexprune.pruners.damped import Damping, damped

QUICK = LowerBound(rounds=2, iterations=10, last_iterations=20, barriers=(1.0, 0.1), per_row=False)
"""For a report: it must cost little beside the pruning. `verify` takes its time."""

WIDE = 1024
"""Inputs beyond which its split is the first one, 1 / [H^-1]_jj shrunk: the Newton steps would cost the most."""

WIDEST = 4096
"""Inputs of an operator beyond which a report has no bound: its cost grows with their cube, in float64."""


def drawn_rows(count: int, rows: int | None, generator: torch.Generator) -> Tensor:
    """The indices of `rows` of `count` rows drawn at random; all of them in their order if None or too many."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:rows]


def sampled_bound(problem: PruningProblem, weight: Tensor, rows: int, damping: Damping) -> dict[str, float] | None:
    """The quick bound for `rows` rows of a pruned operator [m n], the same ones in every run (see `OperatorReport`).

    The error is that of the problem that was posed: mean |V x* - target|^2 plus the `damping` that the pruner added.
    None if no rows are asked, if nothing was to be pruned, or if the operator is too wide.
    """
    m, n = weight.shape
    if rows == 0 or n > WIDEST or problem.pattern.zeros(m, n) == 0:
        return None
    chosen = drawn_rows(m, rows, torch.Generator().manual_seed(0)).to(weight.device)
    part = problem.rows(chosen, problem.pattern)
    method = replace(QUICK, rounds=0) if n > WIDE else QUICK
    found = method.of(damped(part, damping), part.pattern, weight[chosen])
    facts = {"rows": found.rows, "damping": damping.strength}
    return facts | {"error": found.error, "lower": found.lower, "ratio": found.ratio}
