"""The step that prunes operators on the inputs after earlier pruned stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.pipeline import AbstractStackStep, Stack
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem


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
        _as_in_model(problem, next(edits), each)
        if is_changed
        else LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))
        for problem, each, is_changed in zip(problems, factors, changed, strict=True)
    ]


def _as_in_model(problem: LayerProblem, pruned: LayerEdit, factors: Tensor | None) -> LayerEdit:
    """Undo the scaling of rows, and the change of operators that have no zeros to place."""
    dense, weight = problem.weight, problem.unscaled(pruned.weight, factors)
    parts = problem.pattern.parts(len(dense))
    changed = [(weight if own.zeros(*dense[rows].shape) or own.compensates else dense)[rows] for rows, own in parts]
    return replace(pruned, weight=torch.cat(changed))
