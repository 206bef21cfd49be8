"""What runs inside decoder layers whose weights are nowhere: the flow of data, followed on tensors without memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from convexprune.model import computing

from .discovery import ExpertFamily, GroupSpec, Layout, canonical_name, lay_out, signature
from .experts import fused_parameters
from .operators import LINEAR_MODULES, ParameterOperator, Place
from .watching import Seen, place_of

PROBE_TOKENS = 16

Key = tuple[object, ...]


def trace(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> tuple[dict[str, Layout], str | None]:
    """The layout of each layer by its name, from one pass of fake tensors (torch's FakeTensorMode has to be on).

    Where a family looks at values to decide what to compute, as routers do, each linear map counts by itself, after
    all before it; the second result is then the reason, else None.
    """
    model.set_attn_implementation("eager")  # which asks no mask for its values, as sdpa does in transformers 4
    flow = _Flow()
    first = {signature(layer): layer for layer in reversed(list(layers.values()))}  # one of each make
    found: dict[int, Seen] = {}
    refused = None
    with ExitStack() as hooks:
        for layer in first.values():
            hooks.enter_context(_watch(layer, flow, found))
        last = max(first.values(), key=list(layers.values()).index)
        hooks.enter_context(_end_after(last))
        hooks.enter_context(flow)
        decoder = model.get_decoder()
        try:
            with suppress(_Reached), torch.no_grad():
                tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
                (decoder if isinstance(decoder, nn.Module) else model.base_model)(input_ids=tokens, use_cache=False)
        except RuntimeError as cause:  # what torch raises where a value is asked of a tensor that has none
            refused = (
                f"what its layers compute depends on values ({type(cause).__name__}: {str(cause).splitlines()[0]})"
            )
    layouts = {}
    for make, layer in first.items():
        layouts[make] = _one_by_one(layer) if refused else _layout(layer, flow, found[id(layer)])
    return {name: layouts[signature(layer)] for name, layer in layers.items()}, refused


@dataclass(eq=False)
class _Flow(TorchDispatchMode):
    """Which places the values in each storage depend on. Storages are kept, so that none is taken for another."""

    places: dict[int, frozenset[Place]] = field(default_factory=dict)
    inputs: dict[Place, frozenset[Place]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def of(self, x: Tensor) -> frozenset[Place]:
        """The places behind the values of a tensor."""
        return self.places.get(_storage(x), frozenset())

    def add(self, x: Tensor, places: frozenset[Place]) -> None:
        """The values of a tensor depend on these, too."""
        self.kept.append(x)
        self.places[_storage(x)] = self.of(x) | places

    def forget(self) -> None:
        """A new layer begins: what is before it does not count."""
        self.places.clear()
        self.kept.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        behind = [self.of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self.add(x, frozenset().union(*behind))
        return output


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@contextmanager
def _watch(layer: nn.Module, flow: _Flow, found: dict[int, Seen]) -> Iterator[None]:
    seen = found[id(layer)] = Seen()
    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(lambda *_: flow.forget()).remove)
        for path, module in layer.named_modules():
            if isinstance(module, LINEAR_MODULES):
                hooks.enter_context(
                    _watch_module(module, Place(path, transposed=not isinstance(module, nn.Linear)), flow, seen)
                )
            elif fused_parameters(module):
                hooks.enter_context(_in_place_of_experts(module, path, flow, seen))
        yield


@contextmanager
def _watch_module(module: nn.Module, place: Place, flow: _Flow, seen: Seen) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:
            _note(place, args[0], flow.of(args[0]), flow, seen)

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        flow.add(output, frozenset([place]))

    with module.register_forward_pre_hook(before), module.register_forward_hook(after):
        yield


@contextmanager
def _in_place_of_experts(module: nn.Module, path: str, flow: _Flow, seen: Seen) -> Iterator[None]:
    """Who is sent where is not known without values: every expert counts as called, its matrices one after another."""

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        behind = flow.of(hidden)
        for places in _expert_places(module, path, hidden.shape[-1]):
            for place in places:
                _note(place, hidden, behind, flow, seen)
            behind |= frozenset(places)
        output = torch.empty_like(hidden)
        flow.add(output, behind)
        return output

    with computing(module, forward):
        yield


def _expert_places(module: nn.Module, path: str, width: int) -> list[list[Place]]:
    """The matrices of each pile; the first pile takes inputs of that `width`, and all are stored the same way round."""
    found = fused_parameters(module)
    transposed = next(iter(found.values())).shape[-1] != width
    return [[Place(path, name, i, transposed) for i in range(len(pile))] for name, pile in found.items()]


def _note(place: Place, x: Tensor, behind: frozenset[Place], flow: _Flow, seen: Seen) -> None:
    seen.inputs.setdefault(place, x)
    seen.tensors[place] = place.index is None, _storage(x), x.storage_offset(), x.shape, x.stride(), x._version
    if place.index is not None:
        seen.tensors[place] = place.path, place.index  # each expert gets tokens of its own
    seen.times[place] += 1
    flow.inputs[place] = behind
    flow.kept.append(x)


def _layout(layer: nn.Module, flow: _Flow, seen: Seen) -> Layout:
    def moved_by(kind: ExpertFamily) -> Callable[[GroupSpec], bool]:
        changed = frozenset(place for party in kind for place in party.places)
        return lambda party: bool(flow.inputs.get(party.places[0], frozenset()) & changed)

    return lay_out(layer, seen, PROBE_TOKENS, moved_by)


def _one_by_one(layer: nn.Module) -> Layout:
    """Each linear map called once, with inputs of its own, after all before it; equal ones in a list are experts."""
    seen, rank = Seen(), dict[str, int]()
    for place in _places(layer):
        make, number = canonical_name(layer, place)
        rank.setdefault(make, len(rank))
        width = ParameterOperator(layer.get_submodule(place.module), place).shape[1]
        seen.inputs[place] = torch.empty(1 if number else PROBE_TOKENS, width)
        seen.tensors[place] = (place,)
        seen.times[place] += 1

    def when(party: GroupSpec) -> int:
        return rank[canonical_name(layer, party.places[0])[0]]

    def moved_by(kind: ExpertFamily) -> Callable[[GroupSpec], bool]:
        own = max(map(when, kind), default=len(rank))
        return lambda party: when(party) > own

    return lay_out(layer, seen, PROBE_TOKENS, moved_by)


def _places(layer: nn.Module) -> Iterator[Place]:
    for path, module in layer.named_modules():
        if isinstance(module, LINEAR_MODULES):
            yield place_of(path, module)
        elif fused_parameters(module):
            width = next(iter(fused_parameters(module).values())).shape[-1]
            yield from chain(*_expert_places(module, path, width))


class _Reached(Exception):
    """Ends the pass."""


@contextmanager
def _end_after(layer: nn.Module) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _Reached

    with layer.register_forward_hook(end):
        yield
