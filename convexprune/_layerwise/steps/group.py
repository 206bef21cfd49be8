"""One group of operators: posed as one problem, solved, stored in the model, and reported."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.model import Group
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.steps.bounds import sampled_bounds
from convexprune._layerwise.targets import height, stack_of
from convexprune.constraints import Constraint, Stacked
from convexprune.core._damping import NO_DAMPING
from convexprune.core._moments import Moments
from convexprune.errors import PruningError
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem
from convexprune.report import OnOperator, OperatorReport


def prune_group(
    layer: str,
    group: Group,
    folds: CalibrationStatistics,
    settings: LayerSettings,
    on_operator: OnOperator,
    began: float,
    facts: dict[str, float],
) -> None:
    """Prune operators that share an input: one stack of rows, solved as one problem by each pruner of theirs.

    Args:
        layer: its name.
        group: the operators.
        folds: the moments of their input.
        settings: of the run.
        on_operator: called with the report of each operator.
        began: when the group's work began, by `time.perf_counter`.
        facts: numbers for the reports, by name.

    Raises:
        PruningError: the pruned weight is not what was asked for.
    """
    first = 0
    for _, alike in groupby(group.operators, lambda operator: id(settings.pruner_of(f"{layer}.{operator.name}"))):
        part = replace(group, operators=tuple(alike))
        rows = slice(first, first := first + height(part))
        _prune_part(layer, part, rows, folds, settings, on_operator, began, facts)
        began = time.perf_counter()


def _prune_part(
    layer: str,
    group: Group,
    rows: slice,
    folds: CalibrationStatistics,
    settings: LayerSettings,
    on_operator: OnOperator,
    began: float,
    facts: dict[str, float],
) -> None:
    """Prune operators that one pruner prunes: those `rows` of what shares the input.

    Raises:
        PruningError: the pruned weight is not what was asked for.
    """
    names = [f"{layer}.{operator.name}" for operator in group.operators]
    asked = tuple(settings.pattern_of(name) for name in names)
    pattern = Stacked(asked, tuple(operator.shape[0] for operator in group.operators))
    factors = settings.row_factors(names)
    halves = folds.halves if all(half.tokens for half in folds.halves) else ()
    problem = LayerProblem(stack_of(group), folds.total.rows(rows), pattern, settings.correction, halves)
    pruned = _solved(problem, factors, settings.pruner_of(names[0]), settings)
    if not bool(pruned.weight.isfinite().all()):
        raise PruningError(f"{names[0]}: the pruned weight is not finite. Raise the damping.")
    stored = _store(group, pruned, problem.weight)
    bounds = sampled_bounds(problem, stored, settings.bound_rows, pruned.damping or NO_DAMPING, factors)
    errors, held_out = _relative_errors(problem, stored), _errors_elsewhere(problem, folds.held_out.rows(rows), stored)
    more = pruned.facts | facts | ({"borrowed_tokens": folds.borrowed} if folds.borrowed else {})
    counted = _counted(group, names, asked, problem.weight, stored)
    for name, counts, error, unseen, bound in zip(names, counted, errors, held_out, bounds, strict=True):
        on_operator(
            OperatorReport(
                name=name,
                **counts,
                relative_error=error,
                held_out_error=unseen,
                **_certified(pruned),
                facts=more | ({"rule": settings.rules[name]} if name in settings.rules else {}),
                tokens=folds.tokens,
                held_out_tokens=folds.held_out.tokens,
                seconds=time.perf_counter() - began,
                bound=bound,
            )
        )


def _solved(
    problem: LayerProblem, factors: Tensor | None, pruner: AbstractPruner, settings: LayerSettings
) -> LayerEdit:
    """What the pruner makes of a stack whose rows count by their `factors`, on the grids of its patterns."""
    with solving_in(settings.solve_precision), certifying_in(settings.certificate_precision):
        return settings.quantizer.quantize(problem, solved(problem, factors, pruner))


def solved(problem: LayerProblem, factors: Tensor | None, pruner: AbstractPruner) -> LayerEdit:
    """What a pruner makes of a stack of operators.

    What no zeros are asked of is as it was, unless its pattern makes up for what is removed elsewhere.

    Args:
        problem: of the stack.
        factors: by how much its rows count [m]; None: alike.
        pruner: the pruner.

    Returns:
        It, as the model has its rows.
    """
    dense, pattern = problem.weight, problem.pattern
    if pattern.zeros(*dense.shape) == 0 and not pattern.compensates:
        return LayerEdit(dense, torch.ones_like(dense, dtype=torch.bool))
    pruned = pruner.prune(problem.scaled(factors))
    weight = problem.unscaled(pruned.weight, factors)
    parts = pattern.parts(len(dense))
    changed = [(weight if own.zeros(*dense[rows].shape) or own.compensates else dense)[rows] for rows, own in parts]
    return replace(pruned, weight=torch.cat(changed))


def _counted(
    group: Group, names: Sequence[str], asked: Sequence[Constraint], dense: Tensor, stored: Tensor
) -> list[dict[str, Any]]:
    """The shapes and zeros of each operator's report.

    Raises:
        PruningError: a stored weight breaks its pattern.
    """
    heights, found = [operator.shape[0] for operator in group.operators], []
    parts = zip(group.operators, names, asked, stored.split(heights), dense.split(heights), strict=True)
    for operator, name, pattern, weight, before in parts:
        outputs, inputs = operator.shape
        zeros = int((weight == 0).sum())
        if broken := pattern.violation(operator.read()):  # zeros that are too many were zero before
            raise PruningError(f"{name}: {broken} entries break the pattern {pattern} ({zeros} zeros).")
        found.append(
            {
                "outputs": outputs,
                "inputs": inputs,
                "zeros": zeros,
                "expected_zeros": pattern.zeros(outputs, inputs),
                "dense_zeros": int((before == 0).sum()),
                "pattern": str(pattern),
            }
        )
    return found


def _certified(pruned: LayerEdit) -> dict[str, Any]:
    """What an operator's report says of the convex solves behind its stack."""
    certificates = [solution.certificate for solution in pruned.solutions]
    last = pruned.solutions[-1] if pruned.solutions else None
    return {
        "gap": last.certificate.relative_gap if last else None,
        "largest_gap": max((c.relative_gap for c in certificates), default=None),
        "kkt_residual": last.certificate.kkt_residual if last else None,
        "status": last.status.name if last else None,
        "solves": len(certificates),
        "products": pruned.products,
        "damping": pruned.damping,
    }


def _store(group: Group, pruned: LayerEdit, dense: Tensor) -> Tensor:
    """Write the stack's weights and return them [m n] as stored, float32.

    A kept weight that the model's dtype would round to zero is stored as the smallest number: counts stay exact.
    """
    stored = []
    heights = [operator.shape[0] for operator in group.operators]
    parts = zip(pruned.weight.split(heights), pruned.mask.split(heights), dense.split(heights), strict=True)
    for operator, (weight, mask, before) in zip(group.operators, parts, strict=True):
        dtype = operator.read().dtype
        rounded = weight.to(dtype)
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        vanished = mask & (rounded == 0) & (before != 0)
        rounded = torch.where(vanished, torch.copysign(torch.full_like(rounded, smallest), before), rounded)
        operator.write(rounded.masked_fill(~mask, 0))  # no negative zeros in the file
        stored.append(operator.read().float())
    return torch.cat(stored)


def _relative_errors(problem: LayerProblem, weight: Tensor) -> list[float]:
    """mean |V x* - target|^2 over mean |W x|^2, of each operator of the stack [m n]."""
    errors, energies = problem.squared_error(weight), problem.energy
    return [float(errors[rows].sum() / energies[rows].sum()) for rows, _ in problem.pattern.parts(len(weight))]


def _errors_elsewhere(problem: LayerProblem, held_out: Moments, weight: Tensor) -> list[float] | list[None]:
    """The relative errors on tokens that were not fitted; None where there are none."""
    unseen = replace(problem, moments=held_out, folds=())
    return _relative_errors(unseen, weight) if held_out.tokens else [None] * len(problem.pattern.parts(len(weight)))
