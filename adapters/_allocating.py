"""The calibration decides, by a survey and gradients: zeros of operators and rows, and weights of tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._layerwise.allocation import (
    LOOKING,
    SURVEYED,
    WEIGHED,
    ModelAllocation,
    Unit,
    allocate_by_rule,
    candidates,
    further,
    measured,
)
from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.settings import LayerSettings, TokenWeighting, loss_weights, sink_weights
from convexprune._layerwise.steps.survey import survey
from convexprune._layerwise.steps.trials import PRUNED, Trials
from convexprune._layerwise.store import AbstractStore, MemoryStore
from convexprune._progress import begin
from convexprune.constraints import Constraint

from ._data.likelihood import likelihoods
from ._discovery.probing import ProbedModel, of_each_kind
from ._gradients import loss_fisher
from ._huggingface import HuggingFaceModel

WINDOWS = 16  # of the calibration text are enough for the shape of a curve (lab/tried.md)
GRADIENTS = 4  # of those are enough for its weight, and for those of rows; they cost four passes of the model
MEASURED = 2048  # tokens that predictions are compared on
TOGETHER = 8  # networks whose logits are in memory at once
CHOOSING = 32768  # tokens that choose whole columns: with a quarter of them, the choice fits other texts less


def gradient_windows(rule: str, length: int) -> int:
    """Return the number of calibration windows whose gradients a rule needs."""
    if rule == "columns":
        return max(WINDOWS, ceil(CHOOSING / length))
    return min(GRADIENTS, WINDOWS) if rule in WEIGHED else 0


Asked = tuple[str, LayerSettings]
"""A rule, and the settings of a run that it is for."""


@torch.no_grad()
def allocate_each(
    model: HuggingFaceModel,
    calibration: Tensor,
    held_out: Tensor,
    asked: Sequence[Asked],
    batch_size: int = 1,
    record: Callable[[], Recorded] = list,
) -> list[ModelAllocation]:
    """Return an allocation for every requested rule and run, from windows [windows length].

    The dense model is surveyed once for all, on the first 16 windows of `calibration` and all of `held_out`, with
    SparseGPT's weights, so that an allocation does not depend on the method. Only the rules with curves prune for
    the survey; curves, "rows" and "columns" need gradients, on the first windows. Both go layer by layer.
    """
    if all(rule == "uniform" for rule, _ in asked):
        return [ModelAllocation({}) for _ in asked]
    every, calibration = calibration, calibration[:WINDOWS]
    validation_batches = list(held_out.split(batch_size)) if len(held_out) else []
    batches = [*calibration.split(batch_size), *validation_batches]
    outputs, needs = _gradients(model, every, asked, batch_size, record)
    curves = [settings.pattern for rule, settings in asked if rule in SURVEYED]
    patterns = list({candidate: None for pattern in curves for candidate in candidates(pattern)})
    trials = {
        settings.pattern: trial((settings.pattern, further(settings.pattern)), batch_size, every.shape[1])
        for rule, settings in asked
        if rule == "measured"
    }
    is_surveyed = any(rule in LOOKING for rule, _ in asked)
    count = len(validation_batches)
    units = (
        survey(model, batches, count, patterns, outputs, record=record, trials=[*trials.values()])
        if is_surveyed
        else []
    )
    units_of = {pattern: followed(model, units, batches, steps) for pattern, steps in trials.items()}
    return [
        ModelAllocation({}, columns={key[0]: _rounded(needs[key]) for key in _blocks(model, settings)})
        if rule == "columns"
        else allocate_by_rule(
            units_of[settings.pattern] if rule == "measured" else units, rule, settings.pattern, outputs
        )
        for rule, settings in asked
    ]


def _gradients(
    model: HuggingFaceModel,
    every: Tensor,
    asked: Sequence[Asked],
    batch_size: int,
    record: Callable[[], Recorded],
) -> tuple[Mapping[str, Tensor], Mapping[tuple[str, int], Tensor]]:
    """Return squared gradients by output, and the needs of whole columns, for the rules that use them."""
    outputs, needs = dict[str, Tensor](), dict[tuple[str, int], Tensor]()
    length = every.shape[1]
    blocks = {block for rule, settings in asked if rule == "columns" for block in _blocks(model, settings)}
    if blocks:
        windows = every[: gradient_windows("columns", length)]
        needs = loss_fisher(model, windows, batch_size, record, blocks).inputs
    weighed = {rule for rule, _ in asked}.intersection(WEIGHED).difference({"columns"})
    if weighed:  # whatever else is asked, on the same windows
        windows = every[: gradient_windows(weighed.pop(), length)]
        outputs = loss_fisher(model, windows, batch_size, record).outputs
    return outputs, needs


def trial(steps: tuple[Constraint, Constraint], batch_size: int, length: int) -> Trials:
    """Return networks that differ by a step, to be sent along on the last batches of windows of some `length`."""
    return Trials(steps, max(1, MEASURED // (batch_size * length)))


def followed(model: HuggingFaceModel, units: Sequence[Unit], batches: Sequence[Tensor], steps: Trials) -> list[Unit]:
    """Return units whose costs follow the divergence of a trial."""
    return measured(units, steps.patterns, added_divergences(model, batches[-steps.windows :], steps), steps.groups)


def added_divergences(model: HuggingFaceModel, batches: Sequence[Tensor], trial: Trials) -> dict[str, float]:
    """Return the divergence that the step of every group adds to that of the pruned network, in nats."""
    found, names = dict[str, float](), [*trial.states]
    step = begin("measuring steps", len(names))
    for first in range(0, len(names), TOGETHER):
        part = names[first : first + TOGETHER]
        each = likelihoods(model, batches, trial.dense, {name: trial.states[name] for name in part})
        for name in part:
            found[name] = fmean(each[name].kl)
            step(f"{name}: {found[name]:.4f} nats from dense")
    pruned = found.pop(PRUNED)
    return {name: divergence - pruned for name, divergence in found.items()}


def _blocks(model: HuggingFaceModel, settings: LayerSettings) -> Iterator[tuple[str, int]]:
    """Yield the operators with chosen columns, and the columns of a block."""
    for layer in model.layers:
        for operator in layer.operators:
            name = f"{layer.name}.{operator.name}"
            pattern = settings.pattern_of(name)
            if pattern.by_column:
                yield name, pattern.block


def _rounded(weights: Tensor) -> list[float]:
    """Round weights for a file."""
    return [float(f"{w:.3g}") for w in weights.tolist()]


def allocate(
    model: HuggingFaceModel,
    calibration: Tensor,
    held_out: Tensor,
    asked: Asked,
    batch_size: int,
    store: AbstractStore,
) -> ModelAllocation:
    """Return the allocation of a run, computed once for all processes that share the store and for resumed runs."""

    def find() -> dict[str, Any]:
        with store.scratch(0) as record:
            return asdict(allocate_each(model, calibration, held_out, [asked], batch_size, record)[0])

    return ModelAllocation(**store.compute_once("allocation", find))


def token_weights(
    model: HuggingFaceModel,
    asked: TokenWeighting,
    calibration: Tensor,
    batch_size: int = 1,
    store: AbstractStore | None = None,
) -> Mapping[str, Tensor]:
    """Return weights [windows length] of the `calibration` tokens by "layer.operator"; the others count all alike."""
    if asked.kind == "attention_sink":
        weights = sink_weights(len(calibration), calibration.shape[1], asked.share)
        return {name: weights for name in read_by_other_tokens(model)}
    if asked.kind == "none":
        return {}
    store = store or MemoryStore(())

    def find() -> dict[str, Tensor]:
        with store.scratch(0) as record:
            squares = loss_fisher(model, calibration, batch_size, record, by_token=True).tokens
        return {name: loss_weights(each, asked.share) for name, each in squares.items()}

    return store.tensors_once("token_weights", find)


@torch.no_grad()
def read_by_other_tokens(model: ProbedModel) -> list[str]:
    """Name the operators whose outputs at the first token of a window move the layer's outputs at later tokens."""
    found = of_each_kind(model, _mixing)
    return [f"{layer.name}.{name}" for layer, names in zip(model.layers, found, strict=True) for name in names]


def _mixing(layer: DecoderLayer, call: Call, hidden: Tensor) -> list[str]:
    before, again = call(layer.module, hidden), call(layer.module, hidden)
    if not torch.equal(before, again):
        return []  # no pass is like another, so differences show nothing
    aligned = [operator for group in layer.groups if group.token_aligned for operator in group.operators]
    found = []
    for operator in aligned:
        with layer.module.get_submodule(operator.name).register_forward_hook(_change_first):
            after = call(layer.module, hidden)
        if not torch.equal(before[:, 1:], after[:, 1:]):
            found.append(operator.name)
    return found


def _change_first(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Replace the output of the first token by a new order of its entries, plus 1."""
    changed = output.clone(memory_format=torch.contiguous_format)
    first = changed.flatten(0, -2)[0]
    first.copy_(first.roll(1, -1) + 1)
    return changed
