"""Lower bounds on the error of pruned operators, on some of their rows."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convexprune.constraints import Constraint
from convexprune.core import Quadratic
from convexprune.core._bound import LowerBound, PruningBound
from convexprune.pruners import Damping, LayerProblem
from convexprune.pruners._damped import damped

QUICK = LowerBound(rounds=2, iterations=10, last_iterations=20, barriers=(1.0, 0.1), per_row=False)
"""For a report: it must cost little beside the pruning. `verify` takes its time."""

WIDE = 1024
"""Inputs beyond which its split is the first one, 1 / [H^-1]_jj shrunk: the Newton steps would cost the most."""

WIDEST = 4096
"""Inputs of an operator beyond which a report has no bound: its cost grows with their cube, in float64."""


TOGETHER = 64
"""Times as many rows are bounded where all choose the same columns: few rows alone could have better ones."""


def rows_to_bound(pattern: Constraint, rows: int) -> int:
    """Return the number of rows to draw for a bound."""
    return rows * TOGETHER if pattern.by_column else rows


def drawn_rows(count: int, rows: int | None, generator: torch.Generator) -> Tensor:
    """Draw numbers of rows at random, or all in order if `rows` is None."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:rows]


def sampled_bounds(
    problem: LayerProblem, weight: Tensor, rows: int, damping: Damping, factors: Tensor | None = None
) -> list[dict[str, float] | None]:
    """Return quick bounds by operator for `rows` rows of a pruned stack [m n], the same rows in every run.

    The error is the pruner's objective: mean |V x* - target|^2, plus the damping (see `OperatorReport`). More rows
    are drawn for whole columns (`rows_to_bound`). None without a request, without pruning, or for wide operators.
    """
    return sampled_bounds_of_all([(problem, weight, damping, factors)], rows)[0]


Stack = tuple[LayerProblem, Tensor, Damping, Tensor | None]
"""A problem, its pruned weight, and the damping and the factors of its rows."""


def sampled_bounds_of_all(stacks: Sequence[Stack], rows: int) -> list[list[dict[str, float] | None]]:
    """The bounds of stacks that were pruned side by side."""
    drawn = [_drawn(*stack, rows) for stack in stacks]
    method = replace(QUICK, rounds=0) if stacks[0][1].shape[1] > WIDE else QUICK
    found = iter(method.of_all([posed for posed, _ in drawn if posed is not None]))
    bounds = []
    for (posed, wanted), (_, _, damping, _) in zip(drawn, stacks, strict=True):
        own = iter([] if posed is None else next(found))
        bounds.append([_facts(next(own), damping) if each and posed is not None else None for each in wanted])
    return bounds


def _drawn(
    problem: LayerProblem, weight: Tensor, damping: Damping, factors: Tensor | None, rows: int
) -> tuple[tuple[Quadratic, list[Constraint], Sequence[Tensor]] | None, list[bool]]:
    """Return a stack as `LowerBound.of_all` takes it, and the bounded operators; None without any."""
    parts, n = problem.operators(), weight.shape[1]
    wanted = [_is_bounded(part) for part in parts]
    if rows == 0 or n > WIDEST or not any(wanted):
        return None, wanted
    chosen, patterns, first = list[Tensor](), list[Constraint](), 0
    for part, is_wanted in zip(parts, wanted, strict=True):
        if is_wanted:
            own = rows_to_bound(part.pattern, rows)
            chosen.append(first + drawn_rows(len(part.weight), own, torch.Generator().manual_seed(0)))
            patterns.append(part.pattern)
        first += len(part.weight)
    everywhere = torch.cat(chosen).to(weight.device)
    factors = None if factors is None else factors.to(weight)[everywhere]
    drawn = problem.rows(everywhere, problem.pattern)
    posed = damped(drawn.scaled(factors), damping)
    weights = weight[everywhere] if factors is None else weight[everywhere] * factors[:, None]
    return (posed, patterns, weights.split([len(part) for part in chosen])), wanted


def _is_bounded(part: LayerProblem) -> bool:
    shape = part.weight.shape
    return part.pattern.zeros(*shape) > 0 and part.pattern.budget(shape) is not None


def _facts(bound: PruningBound, damping: Damping) -> dict[str, float]:
    facts = {"rows": bound.rows, "damping": damping.strength}
    return facts | {"error": bound.error, "lower": bound.lower, "ratio": bound.ratio}
