"""The pipeline of steps on a decoder layer, and the stacks of operators that steps share in a pass."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import Group
from convexprune._layerwise.processes import of_first_rank
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.stages import Statistics, height, stack_of, stage_statistics, width
from convexprune._layerwise.statistics import CalibrationStatistics, at_once
from convexprune._storage.batches import Batches
from convexprune.constraints import Constraint, Stacked
from convexprune.errors import PruningError
from convexprune.pruners import AbstractPruner, LayerEdit, LayerProblem


@dataclass(eq=False)
class Stack:
    """Operators of a group with a common pruner: weights [m n], below each other."""

    context: LayerContext
    settings: LayerSettings
    group: Group
    rows: slice  # of the operators among all rows on the input
    statistics: CalibrationStatistics  # of the input, after the present earlier stages
    closes: bool
    began: float = 0.0

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.context.layer.name}.{operator.name}" for operator in self.group.operators)

    @property
    def shape(self) -> tuple[int, int]:
        return height(self.group), width(self.group)

    @property
    def pruner(self) -> AbstractPruner:
        return self.settings.pruner_of(self.names[0])

    @property
    def patterns(self) -> tuple[Constraint, ...]:
        return tuple(self.settings.pattern_of(name) for name in self.names)

    @property
    def facts(self) -> dict[str, float]:
        borrowed = self.statistics.borrowed
        return ({"corrects_layer": 1.0} if self.closes else {}) | ({"borrowed_tokens": borrowed} if borrowed else {})

    def begin(self, began: float) -> None:
        """Read the dense weights, before a step moves them; work on the stack started at `began`."""
        self.began, _ = began, self.weight

    def seconds(self, count: int) -> float:
        """Return the seconds spent on the stack, one of `count` that are solved together."""
        return self.context.seconds.get(self.names, 0.0) + (time.perf_counter() - self.began) / count

    @cached_property
    def weight(self) -> Tensor:
        with self.context.with_dense([self.group]):
            return stack_of(self.group)

    @cached_property
    def problem(self) -> LayerProblem:
        pattern = Stacked(self.patterns, tuple(operator.shape[0] for operator in self.group.operators))
        halves = self.statistics.halves if all(half.tokens for half in self.statistics.halves) else ()
        moments = self.statistics.total.rows(self.rows)
        return LayerProblem(self.weight, moments, pattern, self.settings.correction, halves, self._importance())

    def _importance(self) -> Tensor | None:
        columns = self.settings.columns
        if not columns:
            return None
        operators = zip((columns[name] for name in self.names), self.group.operators, strict=True)
        blocks = [each.repeat_interleave(o.shape[1] // len(each)).expand(o.shape) for each, o in operators]
        return torch.cat(blocks).to(self.weight)

    @cached_property
    def edit(self) -> LayerEdit:
        """Return the last step's edit; after a step in an earlier pass, with the model's current weights."""
        weight, before = stack_of(self.group), self.context.edits.get(self.names)
        if before is None:
            return LayerEdit(weight, (weight != 0) | (weight == self.weight))
        return replace(before, weight=weight)

    def put(self, edit: LayerEdit) -> None:
        edit = of_first_rank(edit, self.context.ranks)
        if not bool(edit.weight.isfinite().all()):
            raise PruningError(f"{self.names[0]}: the pruned weight is not finite. Raise the damping.")
        operators = self.group.operators
        heights, blocks = [operator.shape[0] for operator in operators], edit.blocks or [None] * len(operators)
        rows = (whole.split(heights) for whole in (edit.weight, edit.mask, self.weight))
        for operator, block, weight, mask, before in zip(operators, blocks, *rows, strict=True):
            self.context.blocks[operator.name] = block
            stay = before if block is None else torch.zeros_like(before)
            operator.write(in_dtype(weight, mask, stay, operator.read().dtype))
        self.edit = edit


def in_dtype(weight: Tensor, mask: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight to a dtype, and mask; a kept entry that was not zero `before` never rounds to zero."""
    rounded, smallest = weight.to(dtype), torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    vanished = mask & (rounded == 0) & (before != 0)
    rounded = torch.where(vanished, torch.copysign(torch.full_like(rounded, smallest), before), rounded)
    return rounded.masked_fill(~mask, 0)  # no negative zeros in the file


def stacks_of(
    context: LayerContext, settings: LayerSettings, group: Group, statistics: CalibrationStatistics
) -> Iterator[Stack]:
    corrects = (
        settings.error_target == "residual_stream" and settings.correction > 0 and settings.quantizer.corrects_last
    )
    closes, name, first = corrects and group is context.observed.last_branch, context.layer.name, 0
    for _, alike in groupby(group.operators, lambda operator: id(settings.pruner_of(f"{name}.{operator.name}"))):
        part = replace(group, operators=tuple(alike))
        rows = slice(first, first := first + height(part))
        yield Stack(context, settings, part, rows, statistics, closes)


class AbstractLayerStep(ABC):
    """A step on a whole decoder layer."""

    edits: ClassVar[bool] = True  # whether it moves weights away from those that reports call dense

    @abstractmethod
    def __call__(self, context: LayerContext) -> None:
        """Work on the layer of the context."""


class AbstractStackStep(ABC):
    """A step on operators that share an input, with the statistics of that input."""

    edits: ClassVar[bool] = True  # whether it moves weights
    reports: ClassVar[bool] = False  # whether it says what the weights are, so that no step may come after it

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
        together = list[AbstractStackStep]()
        for number, step in enumerate(self.steps, 1):
            following = self.steps[number:]
            goes_on = any(isinstance(later, AbstractStackStep) for later in following)
            if isinstance(step, AbstractLayerStep):
                _on_layer(context, step, goes_on)
                continue
            together.append(step)
            if not following or isinstance(following[0], AbstractLayerStep):
                self._pass(context, together, goes_on)
                together = []

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
            count = at_once(waiting[0].shape, waiting[0].pruner, waiting[0].group.device)
            while waiting:
                yield [waiting.pop(0) for _ in range(min(count, len(waiting)))]


def run_steps(steps: Sequence[AbstractStackStep], stacks: Sequence[Stack], began: float) -> None:
    """Run all steps on stacks that are worked on since `began`, by `time.perf_counter`."""
    for stack in stacks:
        stack.begin(began)
    for step in steps:
        step(stacks)


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
