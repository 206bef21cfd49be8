"""One decoder layer: its operators are pruned stage by stage, each on what the pruned stages before it make."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from convexprune.errors import ModelError, PruningError
from convexprune.model import DecoderLayer, Group
from convexprune.pattern import AbstractPattern, Stacked
from convexprune.pipeline.bounding import sampled_bounds
from convexprune.pipeline.folds import Folds, in_parts
from convexprune.pipeline.lacking import Lacking, height, stack_of, width
from convexprune.pipeline.passes import Calls, Correct, Observed, Recorded, closing_inputs, stage_inputs
from convexprune.pipeline.shortcut import Shortcut, taking
from convexprune.pipeline.team import ALONE, Team
from convexprune.pipeline.tensors import Batches
from convexprune.pruners import AbstractPruner, Pruned, PruningProblem
from convexprune.pruners.damped import Damping
from convexprune.report import OperatorReport

Tell = Callable[[OperatorReport], None]


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """How every layer of a run is pruned: by what, to what, and what its operators see and aim at.

    `prefix` says which network feeds a decoder layer with x*: "dense", so that layers are independent of each other
    (FISTAPruner), or "pruned", the layers before it as they are by now (SparseGPT, Wanda, ALPS). The target is
    W x* + a d with a = `correction`, where d = W (x - x*) is what the operator's outputs lack, with x what it sees in
    the dense network (arXiv 2408.03728, section 3.3). If `correct` is "layer", not "operator", d is what the outputs of
    the decoder layer lack, for the operator that closes it (`passes.closes`): what reached them by other ways, too.
    `patterns` holds operators that differ in their pattern. `bound_rows` of every operator are compared with what no
    pruning can beat; it changes no weight. `row_weights` say how the outputs [m] of every operator count, if not alike.
    """

    pruner: AbstractPruner
    pattern: AbstractPattern
    correction: float = 1.0
    prefix: Literal["dense", "pruned"] = "dense"
    correct: Correct = "operator"
    patterns: Mapping[str, AbstractPattern] = field(default_factory=dict)
    bound_rows: int = 0
    row_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def pattern_of(self, operator: str) -> AbstractPattern:
        """The pattern of the operator "layer.operator": its own in `patterns`, else that of all."""
        return self.patterns.get(operator, self.pattern)

    def row_factors(self, operators: Sequence[str]) -> Tensor | None:
        """What the rows [m] of a stack of operators are multiplied by while it is pruned; None if all count alike."""
        return torch.cat([self.row_weights[name] for name in operators]).sqrt() if self.row_weights else None


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The batches [batch tokens hidden] that enter a decoder layer; the last `held_out` of them judge, and never fit.

    `dense` are those of the dense network, `fed` those that the layer gets while it is pruned. Of a `team` they are
    this rank's share.
    """

    dense: Sequence[Tensor]
    fed: Sequence[Tensor]
    held_out: int = 0
    team: Team = ALONE


@torch.no_grad()
def prune_observed(
    layer: DecoderLayer,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    settings: LayerSettings,
    tell: Tell,
    first: Mapping[Group, Folds] | None = None,
    record: Callable[[], Recorded] = list,
) -> dict[Shortcut, Recorded]:
    """Prune the operators of `layer` in place, stage by stage: x* is what the pruned stages make of what feeds it.

    `first` are the moments of the first stage, if they are known: with a dense prefix nothing changes them. `record`
    makes a place to keep what the shortcuts begin with: tokens times the widths of their operators. That is returned,
    for later passes of what feeds the layer.

    Raises:
        ModelError: an activation is not finite; the operator is named.
        PruningError: the pruned weight is not what was asked; the operator is named.
    """
    inputs: dict[Group, Recorded] = {}
    if settings.prefix == "dense":
        inputs |= {g: observed.inputs[g] for g in chain(*layer.stages[:1]) if g in observed.inputs}
    for number in range(len(layer.stages)):
        began = time.perf_counter()
        parts = [first] if number == 0 and first is not None else None
        for folds in parts or stage_folds(layer, number, calls, hidden, observed, settings, inputs, record):
            _prefetch(hidden.fed, *(observed.read_for(g) for g in chain(*layer.stages[number + 1 : number + 2])))
            for group, fold in folds.items():
                _require_usable(fold, f"{layer.name}.{group.operators[0].name}")
                closes = group is observed.closing and settings.correct == "layer" and settings.correction > 0
                facts = {"corrects_layer": 1.0} if closes else {}
                _prune_group(layer.name, group, fold, settings, tell, began, facts, hidden.team)
                began = time.perf_counter()
    return {observed.shortcuts[group]: x for group, x in inputs.items() if group in observed.shortcuts}


@torch.no_grad()
def stage_folds(
    layer: DecoderLayer,
    number: int,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    settings: LayerSettings,
    inputs: dict[Group, Recorded],
    record: Callable[[], Recorded] = list,
) -> Iterator[dict[Group, Folds]]:
    """The moments of the groups of a stage, with the stages before it as they are by now, in parts.

    `inputs` are the x* that are known already, of whichever groups: they need no pass through the layer, and where a
    shortcut begins with them a pass takes it. Those of this stage are added, where `record` makes a place.

    The experts of a stage come a few at a time, as many as have room for their moments. One that was sent fewer tokens
    than it has inputs borrows from what all of them were sent (`Folds.borrow`); its report says so.
    """
    stage = layer.stages[number]
    before = [group for group in chain(*layer.stages[:number]) if group in observed.shortcuts and group in inputs]
    kept = {group: record() for group in stage if group in observed.shortcuts and group not in inputs}
    shared = {width(group): _folds(group, False) for group in stage if not group.paired}
    for part_number, part in enumerate(in_parts(stage, width)):
        watched = part if part_number else stage  # the first pass is for what the experts share, too
        known = {group: inputs[group] for group in part if group in inputs}
        same = [g for g in part if g in observed.inputs and known.get(g) is observed.inputs[g]]
        wanting = [g for g in part if g.paired and g not in same] if settings.correction > 0 else []
        lacking = Lacking(wanting, observed, settings.correct)
        folds = {group: _folds(group, lacking.of_outputs(group)) for group in part}
        for i, batch in enumerate(hidden.fed):
            held_out = i >= len(hidden.fed) - hidden.held_out
            seen = {group: x[i].to(batch.device) for group, x in known.items()}
            output = None
            with taking({observed.shortcuts[g]: inputs[g][i].to(batch.device) for g in before}):
                if lacking.closes(part):
                    last = closing_inputs(layer, part[0], calls(batch), batch)
                    seen, output = {part[0]: last.x}, last.output
                else:
                    seen |= stage_inputs(layer, [g for g in watched if g not in seen], calls(batch), batch)
            for group, x in seen.items():
                if group in folds:
                    folds[group].add(x, lacking.of(group, i, x, output), held_out)
                if group in kept:
                    kept[group].append(x.cpu())
                if not group.paired and watched is stage:
                    shared[width(group)].add(x, None, held_out)
        for counted in (*folds.values(), *(() if part_number else shared.values())):
            counted.add_up(hidden.team)
        for group in part:
            if not group.paired:
                folds[group].borrow(shared[width(group)])
        del lacking  # it holds weights
        yield folds
    inputs |= kept


def _prefetch(*wanted: Sequence[Tensor]) -> None:
    """What the next stage reads comes from the disk while this one is solved."""
    for batches in wanted:
        if isinstance(batches, Batches):
            batches.prefetch()


def _folds(group: Group, of_outputs: bool) -> Folds:
    """To be filled."""
    return Folds(width(group), group.operators[0].read().device, height(group) if of_outputs else None)


def _require_usable(folds: Folds, name: str) -> None:
    if not any(half.tokens for half in folds.halves):
        raise ModelError(
            f"No calibration token was sent to {name}, nor to another expert beside it. Calibrate with more tokens, "
            "or leave these operators out (ignore=)."
        )
    if not folds.is_finite():
        raise ModelError(
            f"The input of {name} is not finite on the calibration tokens. "
            f"Load the model in a wider dtype (dtype='float32'), or look for a damaged weight before it."
        )


def _prune_group(
    layer: str,
    group: Group,
    folds: Folds,
    settings: LayerSettings,
    tell: Tell,
    began: float,
    facts: dict[str, float],
    team: Team,
) -> None:
    """Operators that share an input are one stack of rows, solved as one problem; `facts` are for its report."""
    heights = tuple(operator.shape[0] for operator in group.operators)
    stack = stack_of(group)
    names = [f"{layer}.{operator.name}" for operator in group.operators]
    asked = tuple(settings.pattern_of(name) for name in names)
    pattern, factors = Stacked(asked, heights), settings.row_factors(names)
    halves = folds.halves if all(half.tokens for half in folds.halves) else ()
    problem = PruningProblem(stack, folds.total, pattern, settings.correction, halves)
    posed = problem if factors is None else problem.scaled(factors)
    if pattern.zeros(*stack.shape):
        pruned = team.prune(settings.pruner, posed, team.part(posed))
        weight = pruned.weight if factors is None else problem.unscaled(pruned.weight, factors)
        pruned = replace(pruned, weight=_where_asked(pattern, weight, stack))
    else:
        pruned = Pruned(stack, torch.ones_like(stack, dtype=torch.bool))
    if not bool(pruned.weight.isfinite().all()):
        raise PruningError(f"{names[0]}: the pruned weight is not finite. Raise the damping.")
    stored = _store(group, pruned, stack)
    errors = _relative_errors(team.part(problem), stored, heights, team)
    held_out: list[float] | list[None] = [None] * len(heights)
    if folds.held_out.tokens:
        unseen = PruningProblem(stack, folds.held_out, pattern, settings.correction)
        held_out = _relative_errors(team.part(unseen), stored, heights, team)
    bound_rows = 0 if team.rank else settings.bound_rows  # the first one reports
    scaled = stored if factors is None else stored * factors.to(stored)[:, None]
    bounds = sampled_bounds(posed, scaled, bound_rows, Damping.of(pruned.facts))
    for i, (operator, weight) in enumerate(zip(group.operators, stored.split(heights), strict=True)):
        expected, zeros = asked[i].zeros(*operator.shape), int((weight == 0).sum())
        if zeros < expected:  # more are only what was zero before
            raise PruningError(f"{names[i]}: {zeros} zeros where the pattern {asked[i]} asks {expected}.")
        seconds = time.perf_counter() - began
        report = OperatorReport(
            name=names[i],
            outputs=operator.shape[0],
            inputs=operator.shape[1],
            zeros=zeros,
            expected_zeros=expected,
            pattern=str(asked[i]),
            relative_error=errors[i],
            held_out_error=held_out[i],
            **_certified(pruned),
            facts=pruned.facts | ({"borrowed_tokens": folds.borrowed} if folds.borrowed else {}) | facts,
            tokens=folds.tokens,
            held_out_tokens=folds.held_out.tokens,
            seconds=seconds,
            bound=bounds[i],
        )
        tell(report)


def _where_asked(pattern: Stacked, pruned: Tensor, dense: Tensor) -> Tensor:
    """Of which operator no zeros are asked, that is not touched: its rows [m n] are the dense ones."""
    parts = zip(pattern.patterns, pruned.split(pattern.heights), dense.split(pattern.heights), strict=True)
    return torch.cat([after if own.zeros(*after.shape) else before for own, after, before in parts])


def _certified(pruned: Pruned) -> dict[str, Any]:
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
    }


def _store(group: Group, pruned: Pruned, dense: Tensor) -> Tensor:
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


def _relative_errors(part: PruningProblem, weight: Tensor, heights: Sequence[int], team: Team) -> list[float]:
    """mean |V x* - target|^2 over mean |W x|^2, of each operator of the stack [m n], of which a rank has its `part`."""
    count = len(weight)
    mine = team.share(count)
    errors = team.whole(part.squared_error(weight[mine]), count).split(heights)
    energies = team.whole(part.energy, count).split(heights)
    return [float(error.sum() / energy.sum()) for error, energy in zip(errors, energies, strict=True)]
