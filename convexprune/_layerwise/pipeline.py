"""The pipeline of steps on a decoder layer. Consecutive steps on stacks of operators share a pass."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, takewhile
from typing import ClassVar

import torch

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.stack import Stack, stacks_of
from convexprune._layerwise.stages import Statistics, stage_statistics
from convexprune._layerwise.statistics import at_once
from convexprune._storage.batches import Batches


class AbstractLayerStep(ABC):
    """A step on a whole decoder layer."""

    edits: ClassVar[bool] = True
    """Whether it moves weights away from those that reports call dense."""

    @abstractmethod
    def __call__(self, context: LayerContext) -> None:
        """Work on the layer of the context."""


class AbstractStackStep(ABC):
    """A step on operators that share an input, with the statistics of that input."""

    edits: ClassVar[bool] = True
    """Whether it moves weights."""
    reports: ClassVar[bool] = False
    """Whether it says what the weights are, so that no step may come after it."""

    @abstractmethod
    def __call__(self, stacks: Sequence[Stack]) -> None:
        """Work on stacks of equal shape and pruner, which are solved side by side."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The steps of a decoder layer, in order.

    A pass over the stages gathers statistics of a stage after the present earlier stages. Consecutive steps on
    stacks share a pass, which holds statistics of a single stage. A step on the whole layer may move any weight, so
    the next pass gathers new statistics.
    """

    settings: LayerSettings
    steps: Sequence[AbstractLayerStep | AbstractStackStep]

    def __post_init__(self) -> None:
        if any(isinstance(step, AbstractStackStep) and step.reports for step in self.steps[:-1]):
            raise ValueError("The step that reports has to be the last: another step may move weights.")

    @torch.no_grad()
    def __call__(self, context: LayerContext) -> None:
        """Run all steps."""
        left = list(self.steps)
        while left:
            together = [s for s in takewhile(_is_on_stacks, left) if isinstance(s, AbstractStackStep)]
            left = left[len(together) :]
            if together:
                self._pass(context, together, goes_on=any(map(_is_on_stacks, left)))
            else:
                step = left.pop(0)
                assert isinstance(step, AbstractLayerStep)
                _on_layer(context, step, goes_on=any(map(_is_on_stacks, left)))

    def _pass(self, context: LayerContext, steps: Sequence[AbstractStackStep], goes_on: bool) -> None:
        """Run steps on all stacks of the layer, by stage; keep the needs of a following pass."""
        if goes_on:
            context.keep_dense()
        context.begin_pass(self.settings.prefix, any(step.edits for step in steps))
        for number in range(len(context.layer.stages)):
            began = time.perf_counter()
            for statistics in stage_statistics(context, self.settings, number):
                _prefetch(context, self.settings, number + 1)
                for stacks in self._stacks(context, statistics):
                    run_steps(steps, stacks, began)
                    if goes_on:
                        _keep_edits(stacks)
                    began = time.perf_counter()

    def _stacks(self, context: LayerContext, statistics: Statistics) -> Iterator[list[Stack]]:
        """Yield the stacks of a stage: several of equal shape at once only if a device waits for the host."""
        stacks = (s for group, own in statistics.items() for s in stacks_of(context, self.settings, group, own))
        for _, alike in groupby(stacks, lambda stack: (stack.shape, id(stack.pruner))):
            waiting = list(alike)
            count = at_once(waiting[0].shape, waiting[0].pruner, waiting[0].device)
            while waiting:
                yield [waiting.pop(0) for _ in range(min(count, len(waiting)))]


def run_steps(steps: Sequence[AbstractStackStep], stacks: Sequence[Stack], began: float) -> None:
    """Run all steps on stacks that are worked on since `began`, by `time.perf_counter`."""
    for stack in stacks:
        stack.begin(began)
    for step in steps:
        step(stacks)


def _is_on_stacks(step: AbstractLayerStep | AbstractStackStep) -> bool:
    return isinstance(step, AbstractStackStep)


def _on_layer(context: LayerContext, step: AbstractLayerStep, goes_on: bool) -> None:
    if step.edits and goes_on:
        context.keep_dense()
    step(context)
    if step.edits:
        context.note_edit()


def _keep_edits(stacks: Sequence[Stack]) -> None:
    """Keep the edits without weights, which are in the model, for a later pass."""
    for stack in stacks:
        nothing, solutions = stack.edit.weight[:, :0], tuple(solution.record() for solution in stack.edit.solutions)
        stack.context.edits[stack.names] = replace(stack.edit, weight=nothing, solutions=solutions)
        stack.context.seconds[stack.names] = stack.seconds(len(stacks))


def _prefetch(context: LayerContext, settings: LayerSettings, number: int) -> None:
    """Fetch the next stage's inputs from the disk during the solve of this stage."""
    following = chain(*context.layer.stages[number : number + 1])
    for batches in (context.inputs[settings.prefix], *map(context.observed.read_for, following)):
        if isinstance(batches, Batches):
            batches.prefetch()
