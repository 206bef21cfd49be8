"""The step that reports: counts, errors and lower bounds of the operators as a layer has them by then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune._layerwise.pipeline import AbstractStackStep, Stack
from convexprune._layerwise.stages import stack_of
from convexprune.constraints import Constraint
from convexprune.core import LowerBound, Moments, PruningBound, Quadratic
from convexprune.errors import PruningError
from convexprune.pruners import Damping, LayerEdit, LayerProblem, damped
from convexprune.report import OnOperator, OperatorReport

QUICK = LowerBound(rounds=2, iterations=10, last_iterations=20, barriers=(1.0, 0.1), per_row=False)
"""For a report: it must cost little beside the pruning. `verify` takes its time."""

WIDE = 1024
"""Inputs beyond which its split is the first one, 1 / [H^-1]_jj shrunk: the Newton steps would cost the most."""

WIDEST = 4096  # inputs of an operator beyond which a report has no bound: its cost grows with their cube, in float64


TOGETHER = 64  # times as many rows are bounded where all choose the same columns: few rows alone could have better ones


def rows_to_bound(pattern: Constraint, rows: int) -> int:
    """Return the number of rows to draw for a bound."""
    return rows * TOGETHER if pattern.by_column else rows


def drawn_rows(count: int, rows: int | None, generator: torch.Generator) -> Tensor:
    """Draw numbers of rows at random, or all in order if `rows` is None."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:rows]


Posed = tuple[LayerProblem, Tensor, Damping, Tensor | None]
"""A problem, its pruned weight, and the damping and the factors of its rows."""


def sampled_bounds_of_all(stacks: Sequence[Posed], rows: int) -> list[list[dict[str, float] | None]]:
    """Return quick bounds by stack and operator for `rows` rows, the same rows in every run.

    The error is the pruner's objective: mean |V x* - target|^2, plus the damping (see `OperatorReport`). More rows
    are drawn for whole columns (`rows_to_bound`). None without a request, without pruning, or for wide operators.
    """
    drawn = [_drawn(*stack, rows) for stack in stacks]
    method = replace(QUICK, rounds=0) if stacks[0][1].shape[1] > WIDE else QUICK
    found = chain.from_iterable(method.of_all([posed for posed, _ in drawn if posed is not None]))
    return [
        [_facts(next(found), damping) if is_wanted else None for is_wanted in wanted]
        for (_, wanted), (_, _, damping, _) in zip(drawn, stacks, strict=True)
    ]


def _drawn(
    problem: LayerProblem, weight: Tensor, damping: Damping, factors: Tensor | None, rows: int
) -> tuple[tuple[Quadratic, list[Constraint], Sequence[Tensor]] | None, list[bool]]:
    """Return a stack as `LowerBound.of_all` takes it, and the bounded operators; None without any."""
    parts, n = problem.operators(), weight.shape[1]
    wanted = [rows > 0 and n <= WIDEST and _is_bounded(part) for part in parts]
    if not any(wanted):
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


@dataclass(frozen=True)
class Measure(AbstractStackStep):
    """Report every operator, and refuse weights that break their pattern."""

    on_operator: OnOperator
    edits: ClassVar[bool] = False
    reports: ClassVar[bool] = True

    def __call__(self, stacks: Sequence[Stack]) -> None:
        stored = [stack_of(stack.group) for stack in stacks]
        posed = [
            (s.problem, weight, s.edit.damping or Damping(0.0), s.settings.row_factors(s.names))
            for s, weight in zip(stacks, stored, strict=True)
        ]
        bounds = sampled_bounds_of_all(posed, stacks[0].settings.bound_rows)
        seconds = [stack.seconds(len(stacks)) for stack in stacks]
        for each in zip(stacks, stored, bounds, seconds, strict=True):
            self._report(*each)

    def _report(self, stack: Stack, stored: Tensor, bounds: Sequence[dict[str, float] | None], seconds: float) -> None:
        folds, rules, problem = stack.statistics, stack.settings.rules, stack.problem
        errors = minimised = _relative_errors(problem, stored)
        if folds.is_weighted:
            errors = errors_elsewhere(problem, folds.unweighted.rows(stack.rows), stored)
        held_out = errors_elsewhere(problem, folds.held_out.rows(stack.rows), stored)
        facts = stack.edit.facts | stack.facts
        counted = _counted(stack, stored)
        each = zip(stack.names, counted, errors, minimised, held_out, bounds, strict=True)
        for name, counts, error, weighted, unseen, bound in each:
            self.on_operator(
                OperatorReport(
                    name=name,
                    **counts,
                    relative_error=error,
                    weighted_error=weighted if folds.is_weighted else None,
                    held_out_error=unseen,
                    **_certified(stack.edit),
                    facts=facts | ({"rule": rules[name]} if name in rules else {}),
                    tokens=folds.tokens,
                    held_out_tokens=int(folds.held_out.tokens),
                    seconds=seconds,
                    bound=bound,
                )
            )


def _counted(stack: Stack, stored: Tensor) -> list[dict[str, Any]]:
    """Return shapes and zeros for the operators' reports, or refuse a stored weight that breaks its pattern."""
    heights, counted = [operator.shape[0] for operator in stack.group.operators], []
    weights = zip(stored.split(heights), stack.weight.split(heights), strict=True)
    for operator, name, pattern, (weight, before) in zip(
        stack.group.operators, stack.names, stack.patterns, weights, strict=True
    ):
        outputs, inputs = operator.shape
        zeros = int((weight == 0).sum())
        if broken := pattern.violation(operator.read()):  # zeros that are too many were zero before
            raise PruningError(f"{name}: {broken} entries break the pattern {pattern} ({zeros} zeros).")
        counted.append(
            {
                "outputs": outputs,
                "inputs": inputs,
                "zeros": zeros,
                "expected_zeros": pattern.zeros(outputs, inputs),
                "dense_zeros": int((before == 0).sum()),
                "weight_growth": float(weight.abs().max() / largest) if (largest := before.abs().max()) > 0 else 1.0,
                "pattern": str(pattern),
            }
        )
    return counted


def _certified(edit: LayerEdit) -> dict[str, Any]:
    certificates = [solution.certificate for solution in edit.solutions]
    last = edit.solutions[-1] if edit.solutions else None
    return {
        "gap": last.certificate.relative_gap if last else None,
        "largest_gap": max((c.relative_gap for c in certificates), default=None),
        "kkt_residual": last.certificate.kkt_residual if last else None,
        "status": last.status.name if last else None,
        "solves": len(certificates),
        "products": edit.products,
        "damping": edit.damping,
    }


def _relative_errors(problem: LayerProblem, weight: Tensor) -> list[float]:
    """Return mean |V x* - target|^2 over mean |W x|^2 by operator of the stack [m n]; 0 where both are."""
    errors, energies = problem.squared_error(weight), problem.energy
    parts = [(errors[rows].sum(), energies[rows].sum()) for rows, _ in problem.pattern.parts(len(weight))]
    return [float(error / energy) if error != 0 else 0.0 for error, energy in parts]


def errors_elsewhere(problem: LayerProblem, held_out: Moments, weight: Tensor) -> list[float] | list[None]:
    """Return the relative errors on tokens that were not fitted; None where there are none."""
    unseen = replace(problem, moments=held_out, folds=())
    return _relative_errors(unseen, weight) if held_out.tokens else [None] * len(problem.pattern.parts(len(weight)))
