"""The steps that solve for the weights of stacks: prune, refit what fitted noise, put on grids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.pipeline import AbstractStackStep, Stack
from convexprune._layerwise.steps.measure import errors_elsewhere
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem, damped, refitted, unchanged
from convexprune.solvers._cg import ConjugateGradient

ATTEMPTS, STRONGER = 3, 10  # of repairs


@dataclass(frozen=True)
class Prune(AbstractStackStep):
    """Prune stacks by the pruner of their settings."""

    def __call__(self, stacks: Sequence[Stack]) -> None:
        settings, problems = stacks[0].settings, [stack.problem for stack in stacks]
        factors = [settings.row_factors(stack.names) for stack in stacks]
        with solving_in(settings.solve_precision), certifying_in(settings.certificate_precision):
            edits = solved(problems, factors, stacks[0].pruner)
        for stack, edit in zip(stacks, edits, strict=True):
            stack.put(edit)


def solved(
    problems: Sequence[LayerProblem], factors: Sequence[Tensor | None], pruner: AbstractPruner
) -> list[LayerEdit]:
    """Prune stacks of equal shape, whose rows count by the square of their factors [m], or alike without factors.

    Operators without zeros to place keep their weights, unless they compensate for inputs that another operator lost.
    """
    changed = [p.pattern.zeros(*p.weight.shape) > 0 or p.pattern.compensates for p in problems]
    scaled = [
        problem.scaled(each) for problem, each, is_changed in zip(problems, factors, changed, strict=True) if is_changed
    ]
    edits = iter(pruner.prune_all(scaled))
    del scaled
    return [
        _as_in_model(problem, next(edits), each) if is_changed else unchanged(problem)
        for problem, each, is_changed in zip(problems, factors, changed, strict=True)
    ]


def _as_in_model(problem: LayerProblem, pruned: LayerEdit, factors: Tensor | None) -> LayerEdit:
    """Undo the scaling of rows, bit by bit where entries did not change, and operators without zeros to place."""
    dense, weight = problem.weight, pruned.weight
    if factors is not None:
        same = weight == dense * factors.to(dense)[:, None]
        weight = dense.where(same, weight / factors.to(weight)[:, None])
    parts = problem.pattern.parts(len(dense))
    changed = [(weight if own.zeros(*dense[rows].shape) or own.compensates else dense)[rows] for rows, own in parts]
    return replace(pruned, weight=torch.cat(changed))


@dataclass(frozen=True)
class Repair(AbstractStackStep):
    """Refit stacks that are worse than no operator at all: on held-out tokens an output errs by more than its energy.

    Each attempt has ten times the prior of the attempt before, and the least held-out error decides. A damping that a
    user chose is left alone. The report has the attempts as the fact `repairs`.
    """

    def __call__(self, stacks: Sequence[Stack]) -> None:
        settings = stacks[0].settings
        with solving_in(settings.solve_precision), certifying_in(settings.certificate_precision):
            for stack in stacks:
                damping = stack.edit.damping
                if damping is not None and damping.prior and _worst(stack) > 1:
                    _repair(stack)


def _repair(stack: Stack) -> None:
    best, least, damping = stack.edit, _worst(stack), stack.edit.damping
    for attempt in range(1, ATTEMPTS + 1):
        assert damping is not None
        damping = replace(damping, prior=STRONGER * damping.prior)
        quadratic, mask = damped(stack.problem, damping), stack.edit.mask
        weight, solutions = refitted(quadratic, mask, stack.weight, ConjugateGradient())
        facts = stack.edit.facts | {"repairs": attempt}
        stack.put(replace(stack.edit, weight=weight, damping=damping, facts=facts, solutions=solutions))
        if (error := _worst(stack)) < least:
            best, least = stack.edit, error
    stack.put(best)


def _worst(stack: Stack) -> float:
    errors = errors_elsewhere(stack.problem, stack.statistics.held_out.rows(stack.rows), stack.edit.weight)
    return max((error for error in errors if error is not None), default=0.0)


@dataclass(frozen=True)
class Quantize(AbstractStackStep):
    """Quantize stacks whose patterns have a grid, by the quantizer of their settings."""

    def __call__(self, stacks: Sequence[Stack]) -> None:
        settings = stacks[0].settings
        for stack in stacks:
            if any(pattern.grid is not None for pattern in stack.patterns):
                with solving_in(settings.solve_precision), certifying_in(settings.certificate_precision):
                    edit = settings.quantizer.quantize(stack.problem, stack.edit)
                stack.put(edit)
