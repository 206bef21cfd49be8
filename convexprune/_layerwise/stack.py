"""Operators with a common input and pruner: a problem, and the edit by steps."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, repeat

import torch
from torch import Tensor

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import Group
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics
from convexprune._layerwise.targets import height, stack_of, width
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
    def device(self) -> torch.device:
        return self.group.operators[0].read().device

    @property
    def pruner(self) -> AbstractPruner:
        return self.settings.pruner_of(self.names[0])

    @property
    def patterns(self) -> tuple[Constraint, ...]:
        return tuple(self.settings.pattern_of(name) for name in self.names)

    @property
    def facts(self) -> dict[str, float]:
        """Numbers for the reports of all operators, by name."""
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
        """The dense weights [m n], in float32."""
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
        """The weights of the last step; for a step in an earlier pass, the model's current weights."""
        weight, before = stack_of(self.group), self.context.edits.get(self.names)
        if before is None:
            return LayerEdit(weight, (weight != 0) | (weight == self.weight))
        return replace(before, weight=weight)

    def put(self, edit: LayerEdit) -> None:
        """Store an edit in the model.

        A kept weight that the model's dtype would round to zero is stored as the smallest number: counts stay exact.
        """
        if not bool(edit.weight.isfinite().all()):
            raise PruningError(f"{self.names[0]}: the pruned weight is not finite. Raise the damping.")
        heights, blocks = [operator.shape[0] for operator in self.group.operators], edit.blocks or repeat(None)
        parts = zip(edit.weight.split(heights), edit.mask.split(heights), self.weight.split(heights), strict=True)
        for operator, own, (weight, mask, before) in zip(self.group.operators, blocks, parts):  # noqa: B905
            self.context.blocks[operator.name] = own
            dtype = operator.read().dtype
            rounded = weight.to(dtype)
            smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            vanished = mask & (rounded == 0) & (before != 0) if own is None else torch.zeros_like(mask)
            rounded = torch.where(vanished, torch.copysign(torch.full_like(rounded, smallest), before), rounded)
            operator.write(rounded.masked_fill(~mask, 0))  # no negative zeros in the file
        self.edit = edit


def stacks_of(
    context: LayerContext, settings: LayerSettings, group: Group, statistics: CalibrationStatistics
) -> Iterator[Stack]:
    """Divide a group by pruner."""
    corrects = (
        settings.error_target == "residual_stream" and settings.correction > 0 and settings.quantizer.corrects_last
    )
    closes, name, first = corrects and group is context.observed.last_branch, context.layer.name, 0
    for _, alike in groupby(group.operators, lambda operator: id(settings.pruner_of(f"{name}.{operator.name}"))):
        part = replace(group, operators=tuple(alike))
        rows = slice(first, first := first + height(part))
        yield Stack(context, settings, part, rows, statistics, closes)
