"""Remove experts for good: smaller mixtures, and a configuration with their number."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convexprune._layerwise.model import Call, DecoderLayer, computing
from convexprune.constraints import Constraint, check_some
from convexprune.errors import ModelError, PatternError
from convexprune.pruners import Score

from .._channels.channels import close
from .._discovery.experts import fused_parameters
from .._discovery.operators import signature
from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel
from .base import REFUSALS, AbstractRemoval, Cut, Making, Place, built, candidates, renumbered, settings_of, with_values
from .mixtures import Mixture, experts_to_remove, find_mixtures


@dataclass(frozen=True, eq=False)
class ExpertRemoval(AbstractRemoval):
    """The removal of experts: `removed` are their numbers, by the name of the layer."""

    chosen_first: ClassVar[bool] = True
    mixtures: tuple[Mixture, ...]
    count: int
    place: Place  # of the setting with the number of experts

    @property
    def size(self) -> int:
        return self.mixtures[0].size

    def choose(self, model: HuggingFaceModel) -> tuple[str, ...]:
        """See `AbstractRemoval.choose`: operators that every token reaches, in the layers behind the first mixture."""
        first = next(n for n, layer in enumerate(model.layers) if layer.name == self.mixtures[0].layer)
        behind = model.layers[first + 1 :] or model.layers[-1:]
        names = tuple(
            f"{layer.name}.{operator.name}"
            for layer in behind
            for group in layer.groups
            for operator in group.operators
            if group.token_aligned
        )
        model.choose(names, because="an expert's, or no mixture is before it")
        return names

    def choose_by(self, score: Score, model: HuggingFaceModel, windows: Tensor, record: Making) -> dict[str, list[int]]:
        blocks = small_blocks(model, self.place, self.mixtures, self.size - self.count)
        pairs = list(zip(self.mixtures, blocks, strict=True))
        return experts_to_remove(model, windows, score, pairs, self.count, record)

    def without(self, removed: Mapping[str, Collection[int]]) -> Self:
        for mixture in self.mixtures:
            found = set(removed.get(mixture.layer, ()))
            if len(found) != self.count or not found <= set(range(mixture.size)):
                raise ModelError(
                    f"{mixture.layer}: experts {sorted(found)} cannot go: it should be {self.count} of {mixture.size}."
                )
        return replace(self, removed={mixture.layer: sorted(removed[mixture.layer]) for mixture in self.mixtures})

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        return {".".join(self.place): (self.size, self.size - self.count)}

    @cached_property
    def cuts(self) -> Mapping[str, Cut]:
        every = (mixture.cuts(self.removed[mixture.layer]) for mixture in self.mixtures)
        return {name: cut for cuts in every for name, cut in cuts.items()}

    def renamed(self, name: str) -> str | None:
        for mixture in self.mixtures:
            if name.startswith(f"{mixture.layer}."):
                return renumbered(name, mixture.lists, self.removed[mixture.layer])
        return name

    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return with_values(settings, {self.place: self.size - self.count})

    def stand_in(self, model: HuggingFaceModel) -> None:
        """See `AbstractRemoval.stand_in`: a router sends tokens to experts of zeros, too."""
        blocks = small_blocks(model, self.place, self.mixtures, self.size - self.count)
        for mixture, small in zip(self.mixtures, blocks, strict=True):
            block, numbers = model.model.get_submodule(mixture.block), self.removed[mixture.layer]
            block.forward = _either(mixture, block, mixture.without(small, block, numbers), numbers)


def _either(mixture: Mixture, block: nn.Module, fewer: Callable[..., Any], numbers: list[int]) -> Callable[..., Any]:
    """Return the forward pass of a block that skips experts once their weights are all zero."""
    dense = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fewer if mixture.is_emptied(block, numbers) else dense)(*args, **kwargs)

    return forward


def find_experts(model: HuggingFaceModel, pattern: Constraint) -> ExpertRemoval:
    """Find the removable experts of a dense model's mixtures.

    The setting with their number is found by its value, and tried: a model built without memory with one expert less
    may differ only in tensors with a part per expert. That the parts are experts is tried, too: two experts in
    exchanged places compute the same.
    """
    sizes = _numbers(model)
    if not sizes:
        raise ModelError(f"{model.name} has no mixture of experts. Patterns 'channels' and 'layers' make it smaller.")
    for size in sizes:
        for place in candidates(model, size):
            if mixtures := _said_by(model, place, size):
                check_some(pattern.sparsity, size, "experts")
                left = pattern.width(size)
                _require_runs(model, place, mixtures, left)
                return ExpertRemoval(tuple(mixtures), size - left, place)
    raise ModelError(
        f"{model.name}: no setting of its configuration says how many experts its mixtures have ({sizes[0]}), and "
        "nothing else, so that a model with fewer cannot be written. Pattern 'channels' makes every expert narrower."
    )


def _numbers(model: HuggingFaceModel) -> list[int]:
    found = dict[int, None]()
    for layer in model.layers:
        for module in layer.module.modules():
            found |= dict.fromkeys(len(stack) for stack in fused_parameters(module).values())
            if isinstance(module, nn.ModuleList) and len({signature(each) for each in module}) == 1:
                found[len(module)] = None
    return [number for number in found if number > 1]


def _said_by(model: HuggingFaceModel, place: Place, size: int) -> list[Mixture]:
    """Return the mixtures whose number of experts a setting declares; empty if it declares anything else as well."""
    try:
        smaller = built(model.model, with_values(settings_of(model), {place: size - 1}))
    except REFUSALS:
        return []
    mixtures = find_mixtures((layer.name for layer in model.layers), model.model, smaller, size)
    by_layer = {mixture.layer: mixture for mixture in mixtures}

    def alike(layer: DecoderLayer, call: Call, hidden: Tensor) -> bool:
        if (mixture := by_layer.get(layer.name)) is None:
            return True
        swapped = mixture.swapped(layer.module, 0, 1)
        expected = call(layer.module, hidden)
        found = call(lambda *args, **kwargs: functional_call(layer.module, swapped, args, kwargs), hidden)
        return close(expected, found, hidden.dtype)

    return mixtures if all(of_each_kind(model, alike)) else []


def small_blocks(model: HuggingFaceModel, place: Place, mixtures: Sequence[Mixture], number: int) -> list[nn.Module]:
    """Return blocks by mixture with a new number of experts without memory; further parts are the model's."""
    small = built(model.model, with_values(settings_of(model), {place: number})).eval().requires_grad_(False)
    blocks = list[nn.Module]()
    for mixture in mixtures:
        blocks.append(small.get_submodule(mixture.block))
        mixture.graft(blocks[-1], model.model.get_submodule(mixture.block))
    return blocks


def _require_runs(model: HuggingFaceModel, place: Place, mixtures: Sequence[Mixture], left: int) -> None:
    """Check that mixtures run with so few experts: a router may need more experts, or groups of experts."""
    if (why := _why_not(model, place, mixtures, left)) is None:
        return
    size = mixtures[0].size
    possible = [number for number in range(1, size) if _why_not(model, place, mixtures, number) is None]
    near = sorted(sorted(possible, key=lambda number: abs(number - left))[:2])
    told = " or ".join(f"{1 - number / size:.3g} for {number}" for number in near)
    instead = f"Take sparsity {told}." if near else "No smaller number runs."
    raise PatternError(
        f"{model.name} does not run with {left} of its {size} experts: {why}. Its router may choose more at once, or "
        f"put them into groups of one size. {instead}"
    )


def _why_not(model: HuggingFaceModel, place: Place, mixtures: Sequence[Mixture], left: int) -> str | None:
    try:
        blocks = dict(zip((m.layer for m in mixtures), small_blocks(model, place, mixtures, left), strict=True))
    except REFUSALS as error:
        return str(error)
    by_layer = {mixture.layer: mixture for mixture in mixtures}

    def fault(layer: DecoderLayer, call: Call, hidden: Tensor) -> str | None:
        if (mixture := by_layer.get(layer.name)) is None:
            return None
        block = layer.module.get_submodule(mixture.block[len(layer.name) + 1 :])
        fewer = mixture.without(blocks[layer.name], block, range(left, mixture.size))
        try:
            with computing(block, fewer):
                call(layer.module, hidden)
        except REFUSALS as error:
            return str(error)
        return None

    with torch.no_grad():
        return next((why for why in of_each_kind(model, fault) if why is not None), None)
