"""The groups of operators of a stage: each posed as one problem, solved, stored in the model, and reported."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.model import Group
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics, at_once
from convexprune._layerwise.steps.bounds import sampled_bounds_of_all
from convexprune._layerwise.targets import height, stack_of, width
from convexprune.constraints import Constraint, Stacked
from convexprune.core._damping import NO_DAMPING
from convexprune.core._moments import Moments
from convexprune.errors import PruningError
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem
from convexprune.report import OnOperator, OperatorReport


def prune_groups(
    layer: str,
    folds: Mapping[Group, CalibrationStatistics],
    settings: LayerSettings,
    on_operator: OnOperator,
    began: float,
    facts: Callable[[Group], dict[str, float]],
) -> None:
    """Prune the groups of a stage: of each, one stack of rows as one problem for each pruner of its operators.

    Where a device waits for the host, problems of one shape that come one after another are solved side by side.
    """
    parts = (part for group, fold in folds.items() for part in _parts(layer, group, fold, settings, facts(group)))
    for _, alike in groupby(parts, lambda part: (part.shape, id(part.pruner))):
        waiting = list(alike)
        count = at_once(waiting[0].shape, waiting[0].pruner, waiting[0].device)
        for first in range(0, len(waiting), count):
            _prune_together(waiting[first : first + count], settings, on_operator, began)
            began = time.perf_counter()


@dataclass(frozen=True, eq=False)
class _Part:
    """Operators of a group that one pruner prunes: those `rows` of what shares the input."""

    names: tuple[str, ...]
    group: Group
    rows: slice
    folds: CalibrationStatistics
    pruner: AbstractPruner
    asked: tuple[Constraint, ...]
    correction: float
    facts: dict[str, float]
    columns: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stack [m n]."""
        return height(self.group), width(self.group)

    @property
    def device(self) -> torch.device:
        """Where it is pruned."""
        return self.group.operators[0].read().device

    def posed(self) -> LayerProblem:
        """The problem of the stack."""
        pattern = Stacked(self.asked, tuple(operator.shape[0] for operator in self.group.operators))
        halves = self.folds.halves if all(half.tokens for half in self.folds.halves) else ()
        weight, importance = stack_of(self.group), None
        if self.columns:
            operators = zip(self.columns, self.group.operators, strict=True)
            blocks = (each.repeat_interleave(o.shape[1] // len(each)).expand(o.shape) for each, o in operators)
            importance = torch.cat(list(blocks)).to(weight)
        moments = self.folds.total.rows(self.rows)
        return LayerProblem(weight, moments, pattern, self.correction, halves, importance)


def _parts(
    layer: str, group: Group, folds: CalibrationStatistics, settings: LayerSettings, facts: dict[str, float]
) -> Iterator[_Part]:
    """A group, by the pruners of its operators."""
    first = 0
    for _, alike in groupby(group.operators, lambda operator: id(settings.pruner_of(f"{layer}.{operator.name}"))):
        part = replace(group, operators=tuple(alike))
        rows = slice(first, first := first + height(part))
        names = tuple(f"{layer}.{operator.name}" for operator in part.operators)
        asked = tuple(settings.pattern_of(name) for name in names)
        columns = tuple(settings.columns[name] for name in names) if settings.columns else ()
        yield _Part(names, part, rows, folds, settings.pruner_of(names[0]), asked, settings.correction, facts, columns)


def _prune_together(parts: Sequence[_Part], settings: LayerSettings, on_operator: OnOperator, began: float) -> None:
    """Prune stacks of one shape side by side; the time of the solves is shared equally."""
    problems = [part.posed() for part in parts]
    factors = [settings.row_factors(part.names) for part in parts]
    with solving_in(settings.solve_precision), certifying_in(settings.certificate_precision):
        pruned = solved(problems, factors, parts[0].pruner)
        pruned = [settings.quantizer.quantize(*each) for each in zip(problems, pruned, strict=True)]
    for part, edit in zip(parts, pruned, strict=True):
        if not bool(edit.weight.isfinite().all()):
            raise PruningError(f"{part.names[0]}: the pruned weight is not finite. Raise the damping.")
    stored = [
        _store(part.group, edit, problem.weight) for part, edit, problem in zip(parts, pruned, problems, strict=True)
    ]
    dampings = [edit.damping or NO_DAMPING for edit in pruned]
    bounds = sampled_bounds_of_all(list(zip(problems, stored, dampings, factors, strict=True)), settings.bound_rows)
    share = (time.perf_counter() - began) / len(parts)
    for each in zip(parts, problems, pruned, stored, bounds, strict=True):
        _report(*each, settings, on_operator, time.perf_counter() - share)


def _report(
    part: _Part,
    problem: LayerProblem,
    pruned: LayerEdit,
    stored: Tensor,
    bounds: Sequence[dict[str, float] | None],
    settings: LayerSettings,
    on_operator: OnOperator,
    began: float,
) -> None:
    """Report what was stored for a stack."""
    names, folds = part.names, part.folds
    errors = minimised = _relative_errors(problem, stored)
    if folds.is_weighted:
        errors = _errors_elsewhere(problem, folds.unweighted.rows(part.rows), stored)
    held_out = _errors_elsewhere(problem, folds.held_out.rows(part.rows), stored)
    more = pruned.facts | part.facts | ({"borrowed_tokens": folds.borrowed} if folds.borrowed else {})
    counted = _counted(part.group, names, part.asked, problem.weight, stored)
    each = zip(names, counted, errors, minimised, held_out, bounds, strict=True)
    for name, counts, error, weighted, unseen, bound in each:
        on_operator(
            OperatorReport(
                name=name,
                **counts,
                relative_error=error,
                held_out_error=unseen,
                weighted_error=weighted if folds.is_weighted else None,
                **_certified(pruned),
                facts=more | ({"rule": settings.rules[name]} if name in settings.rules else {}),
                tokens=folds.tokens,
                held_out_tokens=int(folds.held_out.tokens),
                seconds=time.perf_counter() - began,
                bound=bound,
            )
        )


def solved(
    problems: Sequence[LayerProblem], factors: Sequence[Tensor | None], pruner: AbstractPruner
) -> list[LayerEdit]:
    """What a pruner makes of stacks of operators.

    What no zeros are asked of is as it was, unless its pattern makes up for what is removed elsewhere.

    Args:
        factors: by how much the rows of each count [m]; None: alike.
    """
    changed = [p.pattern.zeros(*p.weight.shape) > 0 or p.pattern.compensates for p in problems]
    scaled = [
        problem.scaled(each) for problem, each, is_changed in zip(problems, factors, changed, strict=True) if is_changed
    ]
    edits = iter(pruner.prune_all(scaled))
    del scaled
    return [
        _as_in_model(problem, next(edits), each)
        if is_changed
        else LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
        for problem, each, is_changed in zip(problems, factors, changed, strict=True)
    ]


def _as_in_model(problem: LayerProblem, pruned: LayerEdit, factors: Tensor | None) -> LayerEdit:
    """What was found for the scaled problem, for this one."""
    dense, weight = problem.weight, problem.unscaled(pruned.weight, factors)
    parts = problem.pattern.parts(len(dense))
    changed = [(weight if own.zeros(*dense[rows].shape) or own.compensates else dense)[rows] for rows, own in parts]
    return replace(pruned, weight=torch.cat(changed))


def _counted(
    group: Group, names: Sequence[str], asked: Sequence[Constraint], dense: Tensor, stored: Tensor
) -> list[dict[str, Any]]:
    """The shapes and zeros of each operator's report."""
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
    """mean |V x* - target|^2 over mean |W x|^2, of each operator of the stack [m n]; 0 where both are."""
    errors, energies = problem.squared_error(weight), problem.energy
    parts = [(errors[rows].sum(), energies[rows].sum()) for rows, _ in problem.pattern.parts(len(weight))]
    return [float(error / energy) if error != 0 else 0.0 for error, energy in parts]


def _errors_elsewhere(problem: LayerProblem, held_out: Moments, weight: Tensor) -> list[float] | list[None]:
    """The relative errors on tokens that were not fitted; None where there are none."""
    unseen = replace(problem, moments=held_out, folds=())
    return _relative_errors(unseen, weight) if held_out.tokens else [None] * len(problem.pattern.parts(len(weight)))
