"""One decoder layer: watch its inputs, prune its operators stage by stage, hand its output on."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convexprune.errors import ModelError, PruningError
from convexprune.model import Call, DecoderLayer, Group
from convexprune.pattern import AbstractPattern, Stacked
from convexprune.pipeline.folds import Folds
from convexprune.pruners import AbstractPruner, Pruned, PruningProblem
from convexprune.report import OperatorReport

Tell = Callable[[OperatorReport], None]
Calls = Callable[[Tensor], Call]


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """How every layer of a run is pruned: by what, to what, and what its operators see and aim at.

    `prefix` says which network feeds a decoder layer with x*: "dense", so that layers are independent of each other
    (FISTAPruner), or "pruned", the layers before it as they are by now (SparseGPT, Wanda, ALPS). The target is
    W (x* + a (x - x*)) with a = `correction`, where x is what the dense network sees (arXiv 2408.03728, section 3.3).
    """

    pruner: AbstractPruner
    pattern: AbstractPattern
    correction: float = 1.0
    prefix: Literal["dense", "pruned"] = "dense"


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The batches [batch tokens hidden] that enter a decoder layer; the last `held_out` of them judge, and never fit.

    `dense` are those of the dense network, `fed` those that the layer gets while it is pruned.
    """

    dense: Sequence[Tensor]
    fed: Sequence[Tensor]
    held_out: int = 0


@dataclass(frozen=True, eq=False)
class Observed:
    """What the dense decoder layer makes of each batch: its outputs, and each paired group's inputs on the CPU."""

    outputs: list[Tensor]
    inputs: dict[Group, list[Tensor]]


@torch.no_grad()
def prune_layer(
    layer: DecoderLayer, calls: Calls, hidden: HiddenStates, settings: LayerSettings, tell: Tell
) -> HiddenStates:
    """Prune the operators of `layer` in place; return what enters the next layer.

    `calls` gives the other arguments for a batch. The recorded inputs stay on the CPU: tokens times the widths of the
    stages, for one layer.

    Raises:
        ModelError: an activation is not finite; the operator is named.
        PruningError: the pruned weight is not what was asked; the operator is named.
    """
    observed = observe(layer, calls, hidden.dense)
    prune_observed(layer, calls, hidden, observed, settings, tell)
    if settings.prefix == "dense":
        return HiddenStates(observed.outputs, observed.outputs, hidden.held_out)
    return HiddenStates(observed.outputs, [calls(b)(layer.module, b) for b in hidden.fed], hidden.held_out)


@torch.no_grad()
def observe(layer: DecoderLayer, calls: Calls, batches: Sequence[Tensor]) -> Observed:
    """One pass of the dense layer over all batches."""
    inputs: dict[Group, list[Tensor]] = {group: [] for group in layer.groups if group.paired}
    outputs = []
    for batch in batches:
        with ExitStack() as taps:
            for group, seen in inputs.items():

                def keep(x: Tensor, seen: list[Tensor] = seen, samples: int = len(batch)) -> None:
                    seen.append(_by_sample(x, samples).cpu())

                taps.enter_context(group.tap(keep))
            outputs.append(calls(batch)(layer.module, batch))
    return Observed(outputs, inputs)


@torch.no_grad()
def prune_observed(
    layer: DecoderLayer,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    settings: LayerSettings,
    tell: Tell,
    first: Mapping[Group, Folds] | None = None,
) -> None:
    """Prune stage by stage: x* is what the already pruned stages make of what the layer is fed with.

    `first` are the moments of the first stage, if they are known: with a dense prefix nothing changes them.
    """
    for number, stage in enumerate(layer.stages):
        began = time.perf_counter()
        known = first if number == 0 and first is not None else {}
        folds = {g: known.get(g) or Folds(g.operators[0].shape[1], g.operators[0].read().device) for g in stage}
        sees_dense = number == 0 and settings.prefix == "dense"
        for i, batch in enumerate([] if known else hidden.fed):
            seen = {} if sees_dense else stage_inputs(layer, stage, calls(batch), batch)
            for group in stage:
                dense = observed.inputs[group][i].to(batch.device) if group.paired else None
                corrects = not sees_dense and settings.correction > 0
                x = dense if sees_dense else seen.get(group)
                if x is not None:  # an expert to which no token of the batch was sent has no input
                    folds[group].add(x, dense if corrects else None, i >= len(hidden.fed) - hidden.held_out)
        for group in stage:
            _require_finite(folds[group], f"{layer.name}.{group.operators[0].name}")
            _prune_group(layer.name, group, folds[group], settings, tell, began)
            began = time.perf_counter()


def stage_inputs(layer: DecoderLayer, stage: Sequence[Group], call: Call, batch: Tensor) -> dict[Group, Tensor]:
    """What the groups of a stage see [samples tokens n]; the layer is run no further than that.

    Of a group that is not paired all tokens count as one sample; one that no token reaches is left out.
    """
    seen: dict[Group, Tensor] = {}
    with ExitStack() as taps:
        for group in stage:

            def keep(x: Tensor, group: Group = group) -> None:
                seen[group] = _by_sample(x, len(batch) if group.paired else 1)
                if len(seen) == len(stage):
                    raise _Reached

            taps.enter_context(group.tap(keep))
        with suppress(_Reached):
            call(layer.module, batch)
    return seen


class _Reached(Exception):
    """Ends a forward pass."""


def _by_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])


def _require_finite(folds: Folds, name: str) -> None:
    if not folds.is_finite():
        raise ModelError(
            f"The input of {name} is not finite on the calibration tokens. "
            f"Load the model in a wider dtype (dtype='float32'), or look for a damaged weight before it."
        )


def _prune_group(layer: str, group: Group, folds: Folds, settings: LayerSettings, tell: Tell, began: float) -> None:
    """Operators that share an input are one stack of rows, solved as one problem."""
    heights = tuple(operator.shape[0] for operator in group.operators)
    stack = torch.cat([operator.read().float() for operator in group.operators])
    pattern = Stacked(settings.pattern, heights)
    halves = folds.halves if all(half.tokens for half in folds.halves) else ()
    problem = PruningProblem(stack, folds.total, pattern, settings.correction, halves)
    if pattern.zeros(*stack.shape):
        pruned = settings.pruner.prune(problem)
    else:  # nothing was asked, so nothing is touched
        pruned = Pruned(stack, torch.ones_like(stack, dtype=torch.bool))
    if not bool(pruned.weight.isfinite().all()):
        raise PruningError(f"{layer}.{group.operators[0].name}: the pruned weight is not finite. Raise the damping.")
    clean = pruned.weight.masked_fill(~pruned.mask, 0)  # no negative zeros in the file
    for operator, weight in zip(group.operators, clean.split(heights), strict=True):
        operator.write(weight)
    stored = torch.cat([operator.read().float() for operator in group.operators])
    errors = _relative_errors(problem, stored, heights)
    held_out: list[float] | list[None] = [None] * len(heights)
    if folds.held_out.tokens:
        unseen = PruningProblem(stack, folds.held_out, pattern, settings.correction)
        held_out = _relative_errors(unseen, stored, heights)
    for i, (operator, weight) in enumerate(zip(group.operators, stored.split(heights), strict=True)):
        expected = settings.pattern.zeros(*operator.shape)
        zeros = int((weight == 0).sum())
        if zeros < expected:
            raise PruningError(
                f"{layer}.{operator.name}: {zeros} zeros where the pattern {settings.pattern} asks {expected}."
            )
        certificates = [s.certificate for s in pruned.solutions]
        last = pruned.solutions[-1] if pruned.solutions else None
        report = OperatorReport(
            name=f"{layer}.{operator.name}",
            outputs=operator.shape[0],
            inputs=operator.shape[1],
            zeros=zeros,
            expected_zeros=expected,
            relative_error=errors[i],
            held_out_error=held_out[i],
            gap=last.certificate.relative_gap if last else None,
            largest_gap=max((c.relative_gap for c in certificates), default=None),
            kkt_residual=last.certificate.kkt_residual if last else None,
            status=last.status.name if last else None,
            solves=len(certificates),
            products=sum(s.products for s in pruned.solutions),
            facts=dict(pruned.facts),
            tokens=problem.moments.tokens,
            held_out_tokens=folds.held_out.tokens,
            seconds=time.perf_counter() - began,
        )
        tell(report)


def _relative_errors(problem: PruningProblem, weight: Tensor, heights: Sequence[int]) -> list[float]:
    """mean |V x* - target|^2 over mean |W x|^2, of each operator of the stack."""
    errors, energies = problem.squared_error(weight).split(heights), problem.energy.split(heights)
    return [float(error.sum() / energy.sum()) for error, energy in zip(errors, energies, strict=True)]
