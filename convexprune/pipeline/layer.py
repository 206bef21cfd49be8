"""One decoder layer: watch its inputs, prune its operators stage by stage, hand its dense output on."""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convexprune.errors import ModelError, PruningError
from convexprune.model import Call, DecoderLayer
from convexprune.moments import Moments
from convexprune.pattern import AbstractPattern, Stacked
from convexprune.pruners import AbstractPruner, Pruned, PruningProblem
from convexprune.report import OperatorReport


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """How every layer of a run is pruned."""

    pruner: AbstractPruner
    pattern: AbstractPattern
    correction: float = 1.0


@torch.no_grad()
def prune_layer(
    layer: DecoderLayer,
    calls: Callable[[Tensor], Call],
    hidden: Sequence[Tensor],
    settings: LayerSettings,
    tell: Callable[[OperatorReport], None],
) -> list[Tensor]:
    """Prune the operators of `layer` in place; return its dense outputs, the inputs of the next layer.

    `hidden` are the batches [batch tokens width] that enter the layer in the dense network, `calls` gives the other
    arguments for a batch. The operators of the first stage see the dense input x; those of a later stage see x*, what
    the already pruned stages make of it, while x is taken from a copy of the layer that stays dense (arXiv 2408.03728,
    section 3.3: error correction inside the layer, layers independent of each other).

    Raises:
        ModelError: an activation is not finite; the operator is named.
        PruningError: the pruned weight is not what was asked; the operator is named.
    """
    dense = copy.deepcopy(layer.module)
    outputs = [calls(batch)(dense, batch) for batch in hidden]
    for number, names in enumerate(layer.stages):
        began = time.perf_counter()
        corrects = number > 0 and settings.correction > 0
        folds = _watch(layer, dense if corrects else None, names[0], calls, hidden)
        _prune_stage(layer, names, folds, settings, tell, began)
    return outputs


def _watch(
    layer: DecoderLayer, dense: nn.Module | None, name: str, calls: Callable[[Tensor], Call], hidden: Sequence[Tensor]
) -> tuple[Moments, Moments]:
    """The moments of an operator's input, samples dealt in turn to two folds."""
    weight = layer.operator(name).weight
    folds = (Moments(weight.shape[1], device=weight.device), Moments(weight.shape[1], device=weight.device))
    sample = 0
    for batch in hidden:
        call = calls(batch)
        pruned = operator_input(layer.module, name, call, batch)
        x = None if dense is None else operator_input(dense, name, call, batch)
        for i in range(len(batch)):
            folds[sample % 2].add(pruned[i], None if x is None else x[i])
            sample += 1
    if not all(f.is_finite() for f in folds):
        raise ModelError(
            f"The input of {layer.name}.{name} is not finite on the calibration tokens. "
            f"Load the model in a wider dtype (dtype='float32'), or look for a damaged weight before it."
        )
    return folds


def operator_input(module: nn.Module, name: str, call: Call, batch: Tensor) -> Tensor:
    """What the operator `name` of `module` sees [batch tokens n]; the layer is run no further than that."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = module.get_submodule(name).register_forward_pre_hook(stop)
    with hook, suppress(_Reached):
        call(module, batch)
    return seen[0].reshape(len(batch), -1, seen[0].shape[-1])


class _Reached(Exception):
    """Ends a forward pass."""


def _prune_stage(
    layer: DecoderLayer,
    names: Sequence[str],
    folds: tuple[Moments, Moments],
    settings: LayerSettings,
    tell: Callable[[OperatorReport], None],
    began: float,
) -> None:
    """Operators that share an input are one stack of rows, solved as one problem."""
    operators = [layer.operator(name) for name in names]
    heights = tuple(o.weight.shape[0] for o in operators)
    stack = torch.cat([o.weight.float() for o in operators])
    moments = folds[0] + folds[1]
    pattern = Stacked(settings.pattern, heights)
    halves = folds if all(f.tokens for f in folds) else ()
    problem = PruningProblem(stack, moments, pattern, settings.correction, halves)
    pruned = settings.pruner.prune(problem)
    if not bool(pruned.weight.isfinite().all()):
        raise PruningError(f"{layer.name}.{names[0]}: the pruned weight is not finite. Raise the damping.")
    for operator, weight in zip(operators, pruned.weight.split(heights), strict=True):
        operator.weight.copy_(weight)
    stored = torch.cat([o.weight.float() for o in operators])
    errors = problem.squared_error(stored).split(heights)
    energies = problem.energy.split(heights)
    for i, (name, part) in enumerate(zip(names, stored.split(heights), strict=True)):
        expected = settings.pattern.zeros(*part.shape)
        zeros = int((part == 0).sum())
        if zeros < expected:
            raise PruningError(
                f"{layer.name}.{name}: {zeros} zeros where the pattern {settings.pattern} asks {expected}."
            )
        error = float(errors[i].sum() / energies[i].sum())
        tell(_report(f"{layer.name}.{name}", part, zeros, expected, error, pruned, moments.tokens, began))


def _report(
    name: str, weight: Tensor, zeros: int, expected: int, error: float, pruned: Pruned, tokens: int, began: float
) -> OperatorReport:
    certificates = [s.certificate for s in pruned.solutions]
    last = pruned.solutions[-1] if pruned.solutions else None
    return OperatorReport(
        name=name,
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        zeros=zeros,
        expected_zeros=expected,
        relative_error=error,
        gap=last.certificate.relative_gap if last else None,
        largest_gap=max((c.relative_gap for c in certificates), default=None),
        kkt_residual=last.certificate.kkt_residual if last else None,
        status=last.status.name if last else None,
        solves=len(certificates),
        products=sum(s.products for s in pruned.solutions),
        facts=dict(pruned.facts),
        tokens=tokens,
        seconds=time.perf_counter() - began,
    )
