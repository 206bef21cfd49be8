"""One decoder layer: its operators are pruned stage by stage, each on what the pruned stages before it make."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from convexprune._device.precision import summing_in
from convexprune._device.transfer import sending
from convexprune._layerwise.capture import Calls, Observed, Recorded, put_away, split_last_branch, stage_inputs
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._layerwise.replay import CachedSubmodule, replaying
from convexprune._layerwise.settings import HiddenStates, LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics, in_parts
from convexprune._layerwise.steps.group import prune_groups
from convexprune._layerwise.targets import CorrectionTargets, height, weighted_parts, width
from convexprune._storage.batches import Batches
from convexprune.errors import ModelError
from convexprune.report import OnOperator


@torch.no_grad()
def prune_observed(
    layer: DecoderLayer,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    settings: LayerSettings,
    on_operator: OnOperator,
    first: Mapping[Group, CalibrationStatistics] | None = None,
    record: Callable[[], Recorded] = list,
) -> dict[CachedSubmodule, Recorded]:
    """Prune the operators of a layer in place, stage by stage: x* is what the pruned stages make of what feeds it.

    Args:
        first: the moments of the first stage, if they are known: with a dense prefix nothing changes them.
        record: makes a place to keep what the shortcuts begin with: tokens times the widths of their operators.
    """
    inputs: dict[Group, Recorded] = {}
    if settings.prefix == "dense":
        inputs |= {g: observed.inputs[g] for g in chain(*layer.stages[:1]) if g in observed.inputs}

    def facts(group: Group) -> dict[str, float]:
        corrects = settings.error_target == "residual_stream" and settings.correction > 0
        return {"corrects_layer": 1.0} if group is observed.last_branch and corrects else {}

    for number in range(len(layer.stages)):
        began = time.perf_counter()
        parts = [first] if number == 0 and first is not None else None
        for folds in parts or stage_folds(layer, number, calls, hidden, observed, settings, inputs, record):
            _prefetch(hidden.pruned, *(observed.read_for(g) for g in chain(*layer.stages[number + 1 : number + 2])))
            for group, fold in folds.items():
                _require_usable(fold, f"{layer.name}.{group.operators[0].name}")
            prune_groups(layer.name, folds, settings, on_operator, began, facts)
            began = time.perf_counter()
    return {observed.cached[group]: x for group, x in inputs.items() if group in observed.cached}


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
) -> Iterator[dict[Group, CalibrationStatistics]]:
    """The moments of the groups of a stage, with the stages before it as they are by now, in parts.

    The experts of a stage come a few at a time, as many as have room for their moments. One that was sent fewer tokens
    than it has inputs borrows from what all of them were sent (`shrink_towards`); its report says so.

    Args:
        inputs: the x* that are known already, of whichever groups: they need no pass through the layer, and where a
            shortcut begins with them a pass takes it. Those of this stage are added.
    """
    stage = layer.stages[number]
    before = [group for group in chain(*layer.stages[:number]) if group in observed.cached and group in inputs]
    kept = {group: record() for group in stage if group in observed.cached and group not in inputs}
    shared = {
        width(group): CalibrationStatistics(width(group), _device_of(group))
        for group in stage
        if not group.token_aligned
    }
    for part_number, part in enumerate(in_parts(stage, width)):
        watched = part if part_number else stage  # the first pass is for what the experts share, too
        known = {group: inputs[group] for group in part if group in inputs}
        changed = [g for g in part if g not in observed.inputs or known.get(g) is not observed.inputs[g]]
        lacking = CorrectionTargets(changed, layer, observed, settings)
        by_group = {group: _folds(layer, group, lacking.in_output_space(group), settings) for group in part}
        with sending(), summing_in(settings.gram_precision):
            for i, batch in enumerate(hidden.pruned):
                held_out = i >= len(hidden.pruned) - hidden.held_out
                seen = {group: x[i].to(batch.device) for group, x in known.items()}
                output = None
                with replaying({observed.cached[g]: inputs[g][i].to(batch.device) for g in before}):
                    if lacking.is_last_branch(part):
                        last = split_last_branch(layer, part[0], calls(batch), batch)
                        seen, output = {part[0]: last.x}, last.output
                    else:
                        seen |= stage_inputs(layer, [g for g in watched if g not in seen], calls(batch), batch)
                for group, x in seen.items():
                    if group in by_group:
                        d = lacking.of(group, i, x, output)
                        for rows, folds in by_group[group].values():
                            of_rows = d if d is None or not lacking.in_output_space(group) else d[..., rows]
                            folds.add(x, of_rows, held_out)
                    if group in kept:
                        put_away(x, kept[group])
                    if not group.token_aligned and watched is stage:
                        shared[width(group)].add(x, None, held_out)
            counted = {group: folds for parts in by_group.values() for group, (_, folds) in parts.items()}
            for folds in (*counted.values(), *(() if part_number else shared.values())):
                folds.add_up(hidden.process_group)
        for group, folds in counted.items():
            if not group.token_aligned:
                folds.shrink_towards(shared[width(group)])
        del lacking  # it holds weights
        yield counted
    inputs |= kept


def _prefetch(*wanted: Sequence[Tensor]) -> None:
    """What the next stage reads comes from the disk while this one is solved."""
    for batches in wanted:
        if isinstance(batches, Batches):
            batches.prefetch()


def _folds(
    layer: DecoderLayer, group: Group, in_output_space: bool, settings: LayerSettings
) -> dict[Group, tuple[slice, CalibrationStatistics]]:
    """Divide a group by the token weights of its operators: rows and statistics, to be filled, of each part."""
    found = {}
    for part, rows, weights in weighted_parts(layer.name, group, settings.token_weights):
        outputs = height(part) if in_output_space else None
        found[part] = rows, CalibrationStatistics(width(part), _device_of(part), outputs, weights)
    return found


def _device_of(group: Group) -> torch.device:
    return group.operators[0].read().device


def _require_usable(folds: CalibrationStatistics, name: str) -> None:
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
