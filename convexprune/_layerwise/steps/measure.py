"""The last step: errors, gaps, bounds and counts of the model's current weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from convexprune._layerwise.pipeline import AbstractStackStep, Stack
from convexprune._layerwise.stages import stack_of
from convexprune._layerwise.steps.bounds import sampled_bounds_of_all
from convexprune.core import Moments
from convexprune.errors import PruningError
from convexprune.pruners import Damping, LayerEdit, LayerProblem
from convexprune.report import OnOperator, OperatorReport


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
    """Return the certificates of a stack's convex solves for a report."""
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
