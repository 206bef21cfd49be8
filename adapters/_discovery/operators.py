"""Linear maps as views of the parameters that hold them, and the layout of a kind of decoder layer by such maps."""

from collections.abc import Container, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from convexprune._layerwise.model import AbstractOperator, DecoderLayer, Group, ModuleInput
from convexprune.errors import ModelError

from .experts import ExpertInput, FusedExperts, fused_parameters

LINEAR_MODULES = (nn.Linear, Conv1D)
"""The modules that are one linear map each."""
UNKNOWN = "no known linear map"
"""Ends the reason for matrices that are left because what is done with them is not known."""


@dataclass(frozen=True)
class Place:
    """The place of an operator's weight in a decoder layer; equal layers have equal places.

    The parameter `parameter` of the submodule `module` holds W [m n]; or W' [n m] if `transposed` (GPT-2's Conv1D); or
    several matrices, of which W is number `index` (the experts of transformers 5).
    """

    module: str
    parameter: str = "weight"
    index: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Relative to the layer: "self_attn.q_proj", or "mlp.experts.down_proj.3"."""
        return self.module if self.index is None else f"{self.path}.{self.index}"

    @property
    def path(self) -> str:
        return f"{self.module}.{self.parameter}".removeprefix(".")


@dataclass(frozen=True, eq=False)
class ParameterOperator(AbstractOperator):
    """The operator at a place of a submodule, without a reference to a tensor, so that weights may come and go."""

    module: nn.Module
    place: Place

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.place.name

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.get_parameter(self.place.parameter).shape[-2:]
        return (columns, rows) if self.place.transposed else (rows, columns)

    def read(self) -> Tensor:
        return self._view(held(self.module, self.place.parameter))

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        whole = held(self.module, self.place.parameter)
        view = self._view(whole)
        view.copy_(weight)
        if offloaded(self.module) is not None:
            _hand_back(self.module, self.place.parameter, whole)
            if not torch.equal(self.read(), view):
                raise ModelError(
                    f"{self.name} was offloaded, and what is written to it is lost. Load the model onto one device."
                )

    def _view(self, whole: Tensor) -> Tensor:
        matrix = whole if self.place.index is None else whole[self.place.index]
        return matrix.T if self.place.transposed else matrix


def held(module: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter or buffer; offloaded values come from accelerate."""
    kept = offloaded(module)
    if kept is not None and name in kept:
        return kept[name]  # a forward pass that was ended early leaves a copy behind, which is not to be used
    return _own(module, name).detach()


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a tensor of any module by name, as `held` does."""
    path, _, last = name.rpartition(".")
    return held(model.get_submodule(path), last)


@torch.no_grad()
def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the values of a parameter or buffer, in memory or at accelerate's place."""
    kept = offloaded(module)
    if kept is not None and name in kept:
        _hand_back(module, name, value)
    else:
        _own(module, name).copy_(value)


def _own(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name) if name in module._parameters else module.get_buffer(name)


def offloaded(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Return accelerate's mapping of a `module`'s offloaded weights; None without offloading."""
    kept = [getattr(hook, "weights_map", None) for hook in _hooks(module)]
    return next((weights for weights in kept if weights is not None), None)


def computes_on(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate brings weights and inputs of a module; None without accelerate."""
    devices = [getattr(hook, "execution_device", None) for hook in _hooks(module)]
    return next((torch.device(device) for device in devices if device is not None), None)


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks; read and not imported, because most models are loaded without accelerate."""
    hook: Any = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [hook]))


def _hand_back(module: nn.Module, parameter: str, value: Tensor) -> None:
    """Give accelerate the new value to load before every forward pass; a file is never written to.

    accelerate's store is nested: prefixes around a mapping, or around a loader whose `state_dict` goes before files.
    """
    kept: Any = offloaded(module)
    name = parameter
    while not isinstance(kept, MutableMapping):
        inner = getattr(kept, "dataset", None)
        if inner is None:
            kept = kept.state_dict
        else:
            kept, name = inner, f"{kept.prefix}{name}"
    kept[name] = value


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

    def bind(self, name: str, module: nn.Module, left_alone: Container[str] = ()) -> DecoderLayer:
        """Return a layer of this kind, by its name, without operators that are `left_alone`."""
        watched = {path: FusedExperts(inner) for path, inner in module.named_modules() if fused_parameters(inner)}

        def group(spec: GroupSpec, kept: tuple[Place, ...]) -> Group:
            operators = tuple(ParameterOperator(module.get_submodule(place.module), place) for place in kept)
            if kept[0].index is None:
                return Group(operators, ModuleInput(operators[0].module), spec.token_aligned)
            input_hook = ExpertInput(watched[kept[0].module], (kept[0].parameter, kept[0].index))
            return Group(operators, input_hook, spec.token_aligned)

        stages = []
        for stage in self.stages:
            kept = [(spec, tuple(p for p in spec.places if f"{name}.{p.name}" not in left_alone)) for spec in stage]
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
