"""Find the operators of a decoder layer by watching forward passes: no architecture is known here.

An operator is a linear map that a forward pass calls once. Operators with a common input tensor form a group. The
stages of the groups follow from experiments: everything that changes with a group's outputs depends on the group.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from posixpath import commonpath, dirname
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from convexprune._layerwise.model import Call

from .experts import FusedExperts, Product, fused_parameters
from .operators import (
    LINEAR_MODULES,
    UNKNOWN,
    ExpertFamily,
    GroupSpec,
    Layout,
    ParameterOperator,
    Place,
    canonical_name,
    held,
)


@dataclass
class Seen:
    """The calls of a forward pass, in order."""

    inputs: dict[Place, Tensor] = field(default_factory=dict)
    # the input tensor of a call, identified in memory
    tensors: dict[Place, tuple[object, ...]] = field(default_factory=dict)
    times: Counter[Place] = field(default_factory=Counter)
    other: set[Place] = field(default_factory=set)  # places whose output was not W x + b

    def add(self, place: Place, x: Tensor) -> None:
        """Count a call on x [... n]. Inputs are kept, so that no two tensors of the pass lie in the same memory."""
        if x.numel():  # an expert that is called without a token is not called
            self.inputs.setdefault(place, x)
            self.tensors[place] = place.index is None, x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x._version
            self.times[place] += 1


def watch(layer: nn.Module, call: Call, hidden: Tensor, changed: frozenset[Place] = frozenset()) -> Seen:
    """Observe a forward pass of a layer on hidden states [batch tokens n], with other outputs at `changed` places."""
    seen = Seen()
    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            if isinstance(module, LINEAR_MODULES):
                hooks.enter_context(_watch_module(module, place_of(path, module), seen, changed))
            elif fused_parameters(module):

                def hook(product: Product, path: str = path) -> Callable[[Tensor], Tensor] | None:
                    place = Place(path, *product.expert, product.transposed)
                    seen.add(place, product.inputs)
                    return _other if place in changed else None

                hooks.enter_context(FusedExperts(module).hooked(hook))
        call(layer, hidden)
    return seen


@contextmanager
def _watch_module(module: nn.Module, place: Place, seen: Seen, changed: frozenset[Place]) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:  # the input hooks read the first argument, so an input that comes by name is none
            seen.add(place, args[0])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if args and not _is_linear(module, place, args[0], output):
            seen.other.add(place)
        return _other(output) if place in changed else None

    with module.register_forward_pre_hook(before), module.register_forward_hook(after):
        yield


def _is_linear(module: nn.Module, place: Place, x: Tensor, output: Any) -> bool:
    """Return True if a module has computed W x + b: subclasses of `nn.Linear` may differ."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(output, Tensor):
        return False
    bias = None if module.bias is None else held(module, "bias").to(x)
    expected = functional.linear(x, ParameterOperator(module, place).read().to(x), bias)
    noise = 8 * torch.finfo(x.dtype).eps * expected.float().norm()
    return expected.shape == output.shape and bool((output - expected).float().norm() <= noise)


def _other(output: Tensor) -> Tensor:
    """Return changed outputs: the order differs, which no norm hides, and so does the sum."""
    return output.roll(1, -1) + 1


def place_of(path: str, module: nn.Module) -> Place:
    return Place(path, transposed=not isinstance(module, nn.Linear))


@torch.no_grad()
def discover(layer: nn.Module, call: Call, hidden: Tensor) -> Layout:
    """Return the layout of a layer, from a few forward passes on inputs [batch tokens n].

    1. Record the called linear maps: number of calls, order, input tensor. 2. Experts are alike: an expert without
    tokens is laid out like its siblings. An expert gets some tokens only, so its group is not token-aligned. A map
    beside experts that is as narrow as their number is a router. 3. Change the outputs of a group and watch the
    inputs of all groups. The groups of an expert family are tried together.
    """
    seen = watch(layer, call, hidden)

    def moved_by(family: ExpertFamily) -> Callable[[GroupSpec], bool]:
        now = watch(layer, call, hidden, frozenset(place for spec in family for place in spec.places))
        return lambda spec: _differ(seen, now, spec.places[0])

    return lay_out(layer, seen, hidden[..., 0].numel(), moved_by)


def lay_out(
    layer: nn.Module, seen: Seen, tokens: int, moved_by: Callable[[ExpertFamily], Callable[[GroupSpec], bool]]
) -> Layout:
    """Return the layout by a pass's calls; `moved_by` tells by expert family if it moves a group's inputs."""
    every = _every_place(layer, seen)
    reasons = {p.name: f"called {n} times in one pass of its layer" for p, n in seen.times.items() if n > 1}
    reasons |= {p.name: f"in a {type(layer.get_submodule(p.module)).__name__}, {UNKNOWN}" for p in seen.other}
    families = _families(layer, every, seen, tokens, reasons)
    reasons |= _routers(layer, every, families)
    families = [family for family in (_without(family, reasons) for family in families) if family]
    stages = _stages(families, seen, moved_by)
    placed = {place.name for stage in stages for spec in stage for place in spec.places}
    for place in every:
        if place.name not in placed:
            reasons.setdefault(place.name, "not called in a forward pass")
    return Layout(stages, reasons | _unsupported_parameters(layer, families, every))


def _every_place(layer: nn.Module, seen: Seen) -> list[Place]:
    """Return all linear maps of the layer, called or not; of used fused experts, all experts."""
    every = [place_of(path, module) for path, module in layer.named_modules() if isinstance(module, LINEAR_MODULES)]
    used = {(p.module, p.parameter, p.transposed): None for p in seen.inputs if p.index is not None}
    for path, parameter, transposed in used:
        number = len(layer.get_submodule(path).get_parameter(parameter))
        every += [Place(path, parameter, index, transposed) for index in range(number)]
    return every


# ---- groups


def _families(
    layer: nn.Module, every: list[Place], seen: Seen, tokens: int, reasons: Mapping[str, str]
) -> list[ExpertFamily]:
    """Return the groups in the order of their first calls, with groups of equal experts together."""
    together: dict[tuple[object, ...], list[Place]] = {}
    for place, tensor in seen.tensors.items():
        if place.name not in reasons:
            together.setdefault(tensor, []).append(place)
    named = {place: canonical_name(layer, place) for place in every}
    found: dict[tuple[str, ...], dict[str, tuple[Place, ...]]] = {}
    for group in together.values():
        names = tuple(named[place][0] for place in group)
        numbers = {named[place][1] for place in group}
        # Experts that all get one tensor are one group, which shares its name with no other.
        key = names if len(numbers) == 1 else tuple(place.name for place in group)
        found.setdefault(key, {})[min(numbers)] = tuple(group)
    for names, groups in found.items():
        siblings = {number: p for p, (name, number) in named.items() if name == names[0]}
        for number in siblings.keys() - groups.keys():
            places = tuple(p for name in names for p, n in named.items() if n == (name, number))
            if not any(place in seen.inputs for place in places):
                groups[number] = places

    def whole(places: tuple[Place, ...]) -> bool:
        x = seen.inputs.get(places[0])
        return x is not None and x.numel() == tokens * x.shape[-1] and places[0].index is None

    def by_number(number: str) -> list[int]:
        return [int(part) for part in number.split(".") if part]

    families = []
    for groups in found.values():
        token_aligned = all(whole(places) for places in groups.values())
        families.append(tuple(GroupSpec(groups[number], token_aligned) for number in sorted(groups, key=by_number)))
    return families


def _blocks(layer: nn.Module, families: list[ExpertFamily]) -> dict[str, int]:
    """Return the number of experts by module with experts."""
    held = {path: len(p) for path, module in layer.named_modules() for p in fused_parameters(module).values()}
    blocks = {path.rpartition(".")[0]: number for path, number in held.items()}
    for family in families:
        if len(family) > 1 and not family[0].token_aligned:
            experts = commonpath([spec.places[0].module.replace(".", "/") for spec in family])
            blocks[dirname(experts).replace("/", ".")] = len(family)
    return blocks


def _routers(layer: nn.Module, every: list[Place], families: list[ExpertFamily]) -> dict[str, str]:
    """Return the linear maps that choose experts: beside experts, and no wider than their number."""
    experts = {place for family in families if len(family) > 1 for spec in family for place in spec.places}
    found = {}
    for block, number in _blocks(layer, families).items():
        for place in every:
            rows = ParameterOperator(layer.get_submodule(place.module), place).shape[0]
            if place not in experts and _inside(place.module, block) and rows <= number:
                found[place.name] = "routes tokens to experts"
    return found


def _unsupported_parameters(layer: nn.Module, families: list[ExpertFamily], every: list[Place]) -> dict[str, str]:
    """Return the matrices of a layer that are no known linear map, such as the routers of transformers 5."""
    known = {place.path for place in every}
    blocks = _blocks(layer, families)
    found = {}
    for path, module in layer.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            name = f"{path}.{parameter}".removeprefix(".")
            if value.dim() < 2 or name in known or "bias" in parameter:
                continue
            narrow = [_inside(path, block) and value.shape[0] <= number for block, number in blocks.items()]
            routes = value.dim() == 2 and any(narrow)
            found[name] = "routes tokens to experts" if routes else f"in a {type(module).__name__}, {UNKNOWN}"
    return found


def _inside(path: str, block: str) -> bool:
    return not block or path.startswith(f"{block}.")


def _without(family: ExpertFamily, reasons: Mapping[str, str]) -> ExpertFamily:
    kept = (GroupSpec(tuple(p for p in spec.places if p.name not in reasons), spec.token_aligned) for spec in family)
    return tuple(spec for spec in kept if spec.places)


# ---- stages


def _stages(
    families: list[ExpertFamily], seen: Seen, moved_by: Callable[[ExpertFamily], Callable[[GroupSpec], bool]]
) -> tuple[ExpertFamily, ...]:
    """Return as few stages as the dependencies allow."""
    nothing = moved_by(())
    if any(nothing(spec) for family in families for spec in family):
        return tuple(families)  # no pass is like another, so differences show nothing: one after the other, as called
    levels = [0] * len(families)
    for i, family in enumerate(families):
        moves = moved_by(family)
        moved = [any(moves(spec) for spec in other) for other in families]
        if any(moved[: i + 1]) and any(len(k) > 1 for k in families):
            # These "experts" feed each other: take each group by itself, in the order of the calls.
            order = {place: number for number, place in enumerate(seen.inputs)}
            specs = [spec for k in families for spec in k if spec.places[0] in order]
            single = [(spec,) for spec in sorted(specs, key=lambda spec: order[spec.places[0]])]
            return _stages(single, seen, moved_by)
        for j in range(i + 1, len(families)):
            if moved[j]:
                levels[j] = max(levels[j], levels[i] + 1)
    stages = []
    for level in sorted(set(levels)):
        stages.append(
            tuple(spec for family, own in zip(families, levels, strict=True) if own == level for spec in family)
        )
    return tuple(stages)


def _differ(first: Seen, second: Seen, place: Place) -> bool:
    a, b = first.inputs.get(place), second.inputs.get(place)
    if a is None or b is None:
        return a is not b
    return a.shape != b.shape or not torch.equal(a, b)
