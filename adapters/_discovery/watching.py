"""Watch a forward pass of a decoder layer: the called linear maps, their order, and their inputs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from convexprune._layerwise.model import Call

from .experts import FusedExperts, Product, fused_parameters
from .operators import LINEAR_MODULES, ParameterOperator, Place, held


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
                    place = Place(path, product.slice.parameter, product.slice.index, product.transposed)
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
