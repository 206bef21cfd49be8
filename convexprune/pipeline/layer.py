"""One decoder layer: watch its inputs, prune its operators stage by stage, hand its dense output on."""

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
    arguments for a batch. One dense pass records what every stage sees, x; then, stage by stage, x* is what the already
    pruned stages make of it (arXiv 2408.03728, section 3.3: error correction inside the layer, layers independent of
    each other). The recorded inputs stay on the CPU: tokens times the widths of the stages, for one layer.

    Raises:
        ModelError: an activation is not finite; the operator is named.
        PruningError: the pruned weight is not what was asked; the operator is named.
    """
    outputs, inputs = _dense_pass(layer, calls, hidden)
    for number, names in enumerate(layer.stages):
        began = time.perf_counter()
        folds = _new_folds(layer, names[0])
        for batch, dense in zip(hidden, inputs.pop(names[0]), strict=True):
            x = dense.to(batch.device)
            corrects = number > 0 and settings.correction > 0
            pruned = operator_input(layer.module, names[0], calls(batch), batch) if number else x
            _deal(folds, pruned, x if corrects else None)
        _require_finite(folds, f"{layer.name}.{names[0]}")
        _prune_stage(layer, names, folds, settings, tell, began)
    return outputs


def _dense_pass(
    layer: DecoderLayer, calls: Callable[[Tensor], Call], hidden: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The layer's outputs, and for the first operator of each stage its inputs [batch tokens n] on the CPU."""
    inputs: dict[str, list[Tensor]] = {names[0]: [] for names in layer.stages}

    def keep(name: str, batch: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs[name].append(args[0].reshape(batch, -1, args[0].shape[-1]).cpu())

    outputs = []
    for batch in hidden:
        hooks = [layer.operator(name).register_forward_pre_hook(keep(name, len(batch))) for name in inputs]
        outputs.append(calls(batch)(layer.module, batch))
        for hook in hooks:
            hook.remove()
    return outputs, inputs


def operator_input(module: nn.Module, name: str, call: Call, batch: Tensor) -> Tensor:
    """What the operator `name` of `module` sees [batch tokens n]; the layer is run no further than that."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    with module.get_submodule(name).register_forward_pre_hook(stop), suppress(_Reached):
        call(module, batch)
    return seen[0].reshape(len(batch), -1, seen[0].shape[-1])


class _Reached(Exception):
    """Ends a forward pass."""


def _new_folds(layer: DecoderLayer, name: str) -> tuple[Moments, Moments]:
    weight = layer.operator(name).weight
    return Moments(weight.shape[1], device=weight.device), Moments(weight.shape[1], device=weight.device)


def _deal(folds: tuple[Moments, Moments], pruned: Tensor, dense: Tensor | None) -> None:
    """Give each sample of a batch, in turn, to one of the two folds: the one that has seen less."""
    for i in range(len(pruned)):
        fold = folds[0] if folds[0].tokens <= folds[1].tokens else folds[1]
        fold.add(pruned[i], None if dense is None else dense[i])


def _require_finite(folds: tuple[Moments, Moments], name: str) -> None:
    if not all(fold.is_finite() for fold in folds):
        raise ModelError(
            f"The input of {name} is not finite on the calibration tokens. "
            f"Load the model in a wider dtype (dtype='float32'), or look for a damaged weight before it."
        )


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
    if pattern.zeros(*stack.shape):
        pruned = settings.pruner.prune(problem)
    else:  # nothing was asked, so nothing is touched
        pruned = Pruned(stack, torch.ones_like(stack, dtype=torch.bool))
    if not bool(pruned.weight.isfinite().all()):
        raise PruningError(f"{layer.name}.{names[0]}: the pruned weight is not finite. Raise the damping.")
    clean = pruned.weight.masked_fill(~pruned.mask, 0)  # no negative zeros in the file
    for operator, weight in zip(operators, clean.split(heights), strict=True):
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
