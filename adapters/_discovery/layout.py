"""The layout of a kind of decoder layer: operators in groups and stages, to be bound to any layer of the kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from convexprune._layerwise.model import DecoderLayer, Group, ModuleInput

from .experts import ExpertIndex, ExpertInput, FusedExperts, fused_parameters
from .operators import ParameterOperator, Place


@dataclass(frozen=True)
class GroupSpec:
    """The places of a group's operators."""

    places: tuple[Place, ...]
    token_aligned: bool


ExpertFamily = tuple[GroupSpec, ...]
"""The groups of one canonical name: one for each expert; a single one of what is not in experts."""


@dataclass(frozen=True)
class Layout:
    """The layout of a kind of decoder layer, shared by all layers of equal structure."""

    stages: tuple[tuple[GroupSpec, ...], ...]
    left_alone: Mapping[str, str]  # reasons by matrix that is no operator

    @property
    def places(self) -> list[Place]:
        return [place for stage in self.stages for spec in stage for place in spec.places]

    def bind(self, name: str, module: nn.Module, wanted: Callable[[Place], bool]) -> DecoderLayer:
        watched = {path: FusedExperts(inner) for path, inner in module.named_modules() if fused_parameters(inner)}

        def group(spec: GroupSpec, kept: tuple[Place, ...]) -> Group:
            operators = tuple(ParameterOperator(module.get_submodule(place.module), place) for place in kept)
            if kept[0].index is None:
                return Group(operators, ModuleInput(operators[0].module), spec.token_aligned)
            input_hook = ExpertInput(watched[kept[0].module], ExpertIndex(kept[0].parameter, kept[0].index))
            return Group(operators, input_hook, spec.token_aligned)

        stages = []
        for stage in self.stages:
            kept = [(spec, tuple(place for place in spec.places if wanted(place))) for spec in stage]
            stages.append(tuple(group(spec, places) for spec, places in kept if places))
        return DecoderLayer(name, module, tuple(stage for stage in stages if stage))


def signature(layer: nn.Module) -> tuple[object, ...]:
    """Return a key that is equal for layers of equal structure: class, and names and shapes of parameters."""
    return type(layer), *((name, tuple(p.shape)) for name, p in layer.named_parameters())


def canonical_name(layer: nn.Module, place: Place) -> tuple[str, str]:
    """Split the numbers of equal modules in lists from the name of a place."""
    parts, numbers, module = [], [], layer
    for part in place.module.split("."):
        alike = isinstance(module, nn.ModuleList) and len({signature(child) for child in module}) == 1
        numbers += [part] if alike else []
        parts.append("*" if alike else part)
        module = module.get_submodule(part)
    if place.index is not None:
        return ".".join([*parts, place.parameter]), str(place.index)
    return ".".join(parts), ".".join(numbers)
