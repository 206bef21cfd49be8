"""The step that refits weights which fitted the noise of the calibration tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.pipeline import AbstractStackStep, Stack
from convexprune._layerwise.steps.measure import errors_elsewhere
from convexprune.pruners._damped import damped
from convexprune.pruners._refit import refitted
from convexprune.solvers._cg import ConjugateGradient

ATTEMPTS, STRONGER = 3, 10


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
    """Return the largest error of the stack's operators on held-out tokens, relative to the output's energy."""
    errors = errors_elsewhere(stack.problem, stack.statistics.held_out.rows(stack.rows), stack.edit.weight)
    return max((error for error in errors if error is not None), default=0.0)
