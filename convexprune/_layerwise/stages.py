"""The statistics of a decoder layer's stage, after the present earlier stages, and the errors to correct there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from convexprune._device.precision import summing_in
from convexprune._layerwise.capture import Observed, Recorded, inputs_by_sample, put_away, replaying, split_last_branch
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.statistics import CalibrationStatistics, in_parts
from convexprune.core import ErrorMoments
from convexprune.errors import ModelError


class CorrectionTargets:
    """Errors that `groups` of a stage, whose inputs the pruned layer changes, have to correct, by batch.

    `observed` has the observations of the dense `layer`, in which these groups still have dense weights. See
    `LayerSettings.error_target`.
    """

    def __init__(
        self, groups: Iterable[Group], layer: DecoderLayer, observed: Observed, settings: LayerSettings
    ) -> None:
        spared = () if settings.quantizer.corrects_last else layer.stages[-1]
        corrected = [g for g in groups if g.token_aligned and g not in spared] if settings.correction > 0 else []
        self._closing = observed.last_branch if settings.error_target == "residual_stream" else None
        self._last_branch = self._closing if self._closing in corrected else None
        self._outputs = observed.outputs
        self._inputs = {group: observed.inputs[group] for group in corrected if group is not self._last_branch}
        cheaper = () if settings.quantizer.input_errors else self._inputs
        self._weights = {g: stack_of(g) for g in cheaper if ErrorMoments.cheaper_in_output_space(height(g), width(g))}

    def in_output_space(self, group: Group) -> bool:
        """Return True if errors are of the group's outputs [samples tokens m], not of its inputs [samples tokens n]."""
        return group is self._last_branch or group in self._weights

    def is_last_branch(self, stage: Sequence[Group]) -> bool:
        return self._last_branch is not None and self._last_branch in stage

    def of(self, group: Group, i: int, x: Tensor, output: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x* of batch i and the error there [samples tokens n], or [samples tokens m] in output space, if any.

        `output` is the layer's with x* and W, if the group is its last residual branch. The group that closes the
        layer counts massive tokens less.
        """
        if group is self._closing:
            assert (output is None) == (self._last_branch is None)
            stream = self._outputs[i].to(x.device).float()
            return without_massive(stream, x, None if output is None else stream - output.float())
        if group not in self._inputs:
            return x, None
        change = self._inputs[group][i].to(x.device).float() - x.float()
        return x, change @ self._weights[group].to(change).T if group in self._weights else change


MASSIVE = 10.0  # times the energy of a sample's median token


def without_massive(stream: Tensor, x: Tensor, error: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return inputs [samples tokens n] and errors, less where a token of the stream [samples tokens hidden] is massive.

    Such a token counts as `MASSIVE` median tokens of its sample. A norm follows the stream, so the loss sees errors
    relative to a token's energy. The first token of a window can have 60,000 times the energy of the others: without
    this, the outputs that make it fit nothing else (lab/tried.md).
    """
    weights = massive_token_weights(stream)
    if weights is None:
        return x, error
    factors = weights.sqrt()[..., None]
    return x.float() * factors, None if error is None else error.float() * factors


def massive_token_weights(stream: Tensor) -> Tensor | None:
    """Return weights [samples tokens], below 1 for massive tokens, if a stream [samples tokens hidden] has any."""
    energy = stream.square().mean(-1)
    typical = energy.where(energy > 0, torch.nan).nanmedian(1, keepdim=True).values  # padding may be zero
    is_massive = energy > MASSIVE * typical
    return (MASSIVE * typical / energy).where(is_massive, 1.0) if bool(is_massive.any()) else None


def width(group: Group) -> int:
    return group.operators[0].shape[1]


def height(group: Group) -> int:
    return sum(operator.shape[0] for operator in group.operators)


def weighted_parts(
    layer: str, group: Group, weights: Mapping[str, Tensor]
) -> Iterator[tuple[Group, slice, Tensor | None]]:
    """Divide a group into runs of operators with equal token weights, with rows and weights."""
    first = 0
    each = [(operator, weights.get(f"{layer}.{operator.name}")) for operator in group.operators]
    for _, alike in groupby(each, lambda pair: id(pair[1])):
        operators, same = zip(*alike, strict=True)
        part = group if len(operators) == len(each) else replace(group, operators=operators)
        yield part, slice(first, first := first + height(part)), same[0]


def stack_of(group: Group) -> Tensor:
    """Return the weights W [m n] of operators with a common input: their rows, in float32."""
    return torch.cat([operator.read().float() for operator in group.operators])


Statistics = Mapping[Group, CalibrationStatistics]


@torch.no_grad()
def stage_statistics(context: LayerContext, settings: LayerSettings, number: int) -> Iterator[Statistics]:
    """Yield the statistics of the groups of stage `number`, in parts.

    The experts of a stage come in parts, as many as have room for their moments. An expert with fewer tokens than
    inputs borrows tokens of all experts (`shrink_towards`); its report says so. Groups with known inputs need no pass
    through the layer. Inputs of this stage are added, if a later pass can be replayed.
    """
    if number == 0 and context.first:
        yield context.first
        return
    stage, cached = context.layer.stages[number], context.observed.cached
    kept = {group: context.record() for group in stage if group in cached and group not in context.seen}
    experts = [group for group in stage if not group.token_aligned]
    shared = {width(group): CalibrationStatistics(width(group), group.device) for group in experts}
    for part_number, part in enumerate(in_parts(stage, width)):
        with context.with_dense(part):
            statistics = _gather(context, settings, number, part, {} if part_number else shared, kept)
        for group, folds in statistics.items():
            if not group.token_aligned:
                folds.shrink_towards(shared[width(group)])
            _require_usable(folds, f"{context.layer.name}.{group.operators[0].name}")
        yield statistics
    context.seen |= kept


def _gather(
    context: LayerContext,
    settings: LayerSettings,
    number: int,
    part: Sequence[Group],
    shared: Mapping[int, CalibrationStatistics],
    kept: Mapping[Group, Recorded],
) -> Statistics:
    """Run the layer up to a part of a stage; add up its inputs, and those of all experts in `shared` by width."""
    layer, calls, inputs, observed = context.layer, context.calls, context.seen, context.observed
    batches = context.inputs[settings.prefix]
    before = [group for group in chain(*layer.stages[:number]) if group in observed.cached and group in inputs]
    watched = layer.stages[number] if shared else part
    known = {group: inputs[group] for group in part if group in inputs}
    changed = [g for g in part if g not in observed.inputs or known.get(g) is not observed.inputs[g]]
    lacking = CorrectionTargets(changed, layer, observed, settings)
    by_group = {group: _empty(layer.name, group, lacking.in_output_space(group), settings) for group in part}
    with summing_in(settings.gram_precision):
        for i, batch in enumerate(batches):
            held_out = i >= len(batches) - context.held_out
            seen: dict[Group, Any] = {group: x[i].to(batch.device) for group, x in known.items()}
            replayed, output = {observed.cached[g]: inputs[g][i].to(batch.device) for g in before}, None
            if lacking.is_last_branch(part):
                with replaying(replayed):
                    last = split_last_branch(layer, part[0], calls(batch), batch)
                seen, output = {part[0]: last.x}, last.output
            elif asked := [group for group in watched if group not in seen]:
                seen |= inputs_by_sample(layer, asked, calls, batch, replayed)
            for group, x in seen.items():
                if group in by_group:
                    counted, d = lacking.of(group, i, x, output)
                    for rows, folds in by_group[group].values():
                        of_rows = d if d is None or not lacking.in_output_space(group) else d[..., rows]
                        folds.add(counted, of_rows, held_out)
                if group in kept:
                    put_away(x, kept[group])
                if shared and not group.token_aligned:
                    shared[width(group)].add(x, None, held_out)
        statistics = {group: folds for parts in by_group.values() for group, (_, folds) in parts.items()}
        for folds in (*statistics.values(), *shared.values()):
            folds.add_up(context.ranks)
    return statistics


def _empty(
    layer: str, group: Group, in_output_space: bool, settings: LayerSettings
) -> dict[Group, tuple[slice, CalibrationStatistics]]:
    """Divide a group by the token weights of its operators, into rows and empty statistics."""
    empty = {}
    for part, rows, weights in weighted_parts(layer, group, settings.token_weights):
        outputs = height(part) if in_output_space else None
        empty[part] = rows, CalibrationStatistics(width(part), part.device, outputs, weights)
    return empty


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
