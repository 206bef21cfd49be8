"""The step that puts kept weights on the grids of their patterns."""

from collections.abc import Sequence
from dataclasses import dataclass

from convexprune._device.precision import certifying_in, solving_in
from convexprune._layerwise.pipeline import AbstractStackStep, Stack


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
