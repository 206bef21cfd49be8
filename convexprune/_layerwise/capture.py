"""Passes through a decoder layer: observations, inputs of a stage, and submodules that need not run again."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from convexprune._layerwise.model import Call, DecoderLayer, Group, ModuleInput, computing
from convexprune._storage.batches import Batches


@dataclass(frozen=True, eq=False)
class CachedSubmodule:
    """A `module` that returns the very output of `linear` inside, so that later passes can skip all before the map."""

    module: nn.Module
    linear: nn.Module
    beside: tuple[None, ...] | None

    @contextmanager
    def replayed(self, x: Tensor) -> Iterator[None]:
        """Run only the linear map, with its current weight, on its inputs x [samples tokens n] during the context."""

        def forward(*_: Any, **__: Any) -> Any:
            y = self.linear(x)
            return y if self.beside is None else (y, *self.beside)

        with computing(self.module, forward):
            yield


@contextmanager
def replaying(cached: Mapping[CachedSubmodule, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for cached_submodule, x in cached.items():
            stack.enter_context(cached_submodule.replayed(x))
        yield


@contextmanager
def find_cached_submodules(layer: DecoderLayer, samples: int, found: dict[Group, CachedSubmodule]) -> Iterator[None]:
    """Find cached submodules during a pass of the dense layer with `samples` windows, and fill `found` afterwards.

    No architecture is assumed: the output of the module has to be the output of the linear map, as an object and
    unwritten, and both have to be called once. The outermost such module is taken.
    """
    looks = {group: _Look(linear, around, samples) for group, linear, around in _candidates(layer)}
    with ExitStack() as hooks:
        for look in looks.values():
            hooks.callback(look.linear.register_forward_hook(look.at_linear).remove)
            for module in look.around:
                hooks.callback(module.register_forward_hook(look.at_module).remove)
        yield
    for group, look in looks.items():
        for outermost in look.cached()[:1]:
            found[group] = outermost


def _candidates(layer: DecoderLayer) -> Iterator[tuple[Group, nn.Module, list[nn.Module]]]:
    """Yield groups that are one map of all tokens, the map, and the modules around it without later stages' hooks."""
    parts = {module: set(module.modules()) for module in layer.module.modules()}
    for number, stage in enumerate(layer.stages[:-1]):
        later = {group.input_hook.module for after in layer.stages[number + 1 :] for group in after}
        for group in stage:
            if group.token_aligned and len(group.operators) == 1 and isinstance(group.input_hook, ModuleInput):
                linear = group.input_hook.module
                around = [m for m, inside in parts.items() if linear in inside and not later & inside]
                yield group, linear, [m for m in around if m not in (layer.module, linear)]


@dataclass(eq=False)
class _Look:
    """Observations of a linear map and of the modules around it; `ends` are modules that return the map's output."""

    linear: nn.Module
    around: list[nn.Module]
    samples: int
    times: Counter[nn.Module] = field(default_factory=Counter)
    ends: dict[nn.Module, tuple[None, ...] | None] = field(default_factory=dict)
    output: Tensor | None = None
    version: int = 0

    def at_linear(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Require inputs in the form of the record, [samples tokens n] in a single piece."""
        self.times[linear] += 1
        x = args[0]
        if x.dim() == 3 and len(x) == self.samples and x.is_contiguous():
            self.output, self.version = output, output._version

    def at_module(self, module: nn.Module, _: Any, output: Any) -> None:
        """Note a module whose output is the map's, with nothing beside that a shortcut could not give."""
        self.times[module] += 1
        first, *others = output if type(output) is tuple and output else (output,)
        same = isinstance(first, Tensor) and first is self.output and first._version == self.version
        if same and all(other is None for other in others):
            self.ends[module] = tuple(None for _ in others) if type(output) is tuple else None

    def cached(self) -> list[CachedSubmodule]:
        once = [m for m in self.around if m in self.ends and self.times[m] == self.times[self.linear] == 1]
        return [CachedSubmodule(module, self.linear, self.ends[module]) for module in once]


Calls = Callable[[Tensor], Call]
Recorded = list[Tensor] | Batches
ErrorTarget = Literal["residual_stream", "operator"]


@dataclass(frozen=True, eq=False)
class Observed:
    """Outputs and inputs of the dense decoder layer, recorded by batch on the CPU."""

    outputs: Recorded  # [batch tokens hidden]
    inputs: Mapping[Group, Recorded]  # of token-aligned groups [samples tokens n]
    cached: Mapping[Group, CachedSubmodule] = field(default_factory=dict)  # submodules that later passes may skip
    last_branch: Group | None = None  # the group that closes the layer, on request

    def read_for(self, group: Group) -> Sequence[Tensor]:
        """Return the recorded tensors that a `group` is compared with, if any."""
        return self.inputs.get(group, self.outputs if group is self.last_branch else ())


@torch.no_grad()
def observe(
    layer: DecoderLayer,
    calls: Calls,
    batches: Sequence[Tensor],
    record: Callable[[], Recorded] = list,
    error_targets: Collection[ErrorTarget] = ("operator",),
) -> Observed:
    """Run the dense layer over all batches [batch tokens hidden]; the first also shows the shortcuts.

    The record takes tokens times the widths of the stages. For the error target "residual_stream" alone, the inputs
    of the closing group are not kept.
    """
    closing = layer.groups[-1:] if "residual_stream" in error_targets else []
    last_branch = next((group for group in closing if is_last_branch(layer, group, calls, batches)), None)
    asked = [g for g in layer.groups if g.token_aligned and (g is not last_branch or "operator" in error_targets)]
    inputs = {group: record() for group in asked}
    outputs, cached = record(), dict[Group, CachedSubmodule]()
    for number, batch in enumerate(batches):
        with ExitStack() as hooks:
            if number == 0:
                hooks.enter_context(find_cached_submodules(layer, len(batch), cached))
            for group, seen in inputs.items():

                def keep(x: Tensor, seen: Recorded = seen, samples: int = len(batch)) -> None:
                    put_away(_by_sample(x, samples), seen)

                hooks.enter_context(group.input_hook(keep))
            output = calls(batch)(layer.module, batch)
            outputs.append(output)
    return Observed(outputs, inputs, cached, last_branch)


def put_away(tensor: Tensor, place: Recorded) -> None:
    """Keep a tensor on the host, or as batches keep tensors."""
    place.append(tensor if isinstance(place, Batches) else tensor.cpu())


def is_last_branch(layer: DecoderLayer, group: Group, calls: Calls, batches: Sequence[Tensor]) -> bool:
    """Return True if the layer's output is the output of `group`, alone in the last stage, added to the rest.

    No architecture is assumed: with zeros in place of the group's output the layer has to give a rest that adds up
    with the output to the layer's output, bit for bit, on the first batch. False if a norm follows the group (Gemma
    2).
    """
    if layer.stages[-1] != (group,) or len(group.operators) > 1 or not group.token_aligned or not batches:
        return False
    call, batch = calls(batches[0]), batches[0]
    last = split_last_branch(layer, group, call, batch)
    return last.branch.numel() == last.residual.numel() and torch.equal(last.output, call(layer.module, batch))


def through(
    layer: DecoderLayer,
    calls: Calls,
    batches: Sequence[Tensor],
    known: Mapping[CachedSubmodule, Recorded] | None = None,
) -> Iterator[Tensor]:
    """Yield the outputs [batch tokens hidden] of the layer in its current state, by batch."""
    for i, batch in enumerate(batches):
        with replaying({cached_submodule: x[i].to(batch.device) for cached_submodule, x in (known or {}).items()}):
            output = calls(batch)(layer.module, batch)
        yield output


class LastBranch(NamedTuple):
    """Inputs and outputs of the last group, and the layer's output without the group."""

    x: Tensor  # [samples tokens n]
    branch: Tensor
    residual: Tensor  # [batch tokens hidden]

    @property
    def output(self) -> Tensor:
        return self.residual + self.branch.reshape(self.residual.shape)


def split_last_branch(layer: DecoderLayer, group: Group, call: Call, batch: Tensor) -> LastBranch:
    """Run the layer with zeros in place of the last group's output."""
    seen, made = list[Tensor](), list[Tensor]()

    def zero_branch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made.append(output)
        return torch.zeros_like(output)

    with group.input_hook(seen.append), group.input_hook.module.register_forward_hook(zero_branch):
        residual = call(layer.module, batch)
    return LastBranch(_by_sample(seen[0], len(batch)), made[0], residual)


def stage_inputs(layer: DecoderLayer, stage: Sequence[Group], call: Call, batch: Tensor) -> dict[Group, Tensor]:
    """Run the layer up to a stage: inputs [samples tokens n] of groups with tokens, one sample if not aligned."""
    seen: dict[Group, Tensor] = {}
    if not stage:
        return seen
    with ExitStack() as hooks:
        for group in stage:

            def keep(x: Tensor, group: Group = group) -> None:
                seen[group] = _by_sample(x, len(batch) if group.token_aligned else 1)
                if len(seen) == len(stage):
                    raise Reached

            hooks.enter_context(group.input_hook(keep))
        with suppress(Reached):
            call(layer.module, batch)
    return seen


def inputs_by_sample(
    layer: DecoderLayer, stage: Sequence[Group], calls: Calls, batch: Tensor, replayed: Mapping[CachedSubmodule, Tensor]
) -> Mapping[Group, Tensor | list[Tensor]]:
    """Run the layer up to a stage: inputs [samples tokens n], of experts a list with the tokens [tokens n] of a sample.

    With experts samples run one by one: inside, a routed token does not say whose it is.
    """
    if all(group.token_aligned for group in stage):
        with replaying(replayed):
            return stage_inputs(layer, stage, calls(batch), batch)
    seen: dict[Group, list[Tensor]] = {group: [] for group in stage}
    for i, sample in enumerate(batch.split(1)):
        with replaying({cached_submodule: x[i : i + 1] for cached_submodule, x in replayed.items()}):
            for group, x in stage_inputs(layer, stage, calls(sample), sample).items():
                seen[group].append(x[0])
    return {group: torch.stack(each) if group.token_aligned else each for group, each in seen.items()}


class Reached(Exception):
    """Ends a forward pass."""


def _by_sample(x: Tensor, samples: int) -> Tensor:
    return x.reshape(samples, -1, x.shape[-1])
