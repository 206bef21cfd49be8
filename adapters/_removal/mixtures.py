"""Mixtures of experts: the entries of tensors that belong to an expert, and blocks that run without some experts."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .cut import Cut

Tensors = dict[str, Tensor]
"""Parameters and buffers of a module, by their names in the model."""
STACKED = 3  # dimensions of a tensor that has a matrix for each expert


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of a decoder layer."""

    layer: str
    block: str  # name of the smallest module with all experts and their router
    size: int
    dims: Mapping[str, int]  # by name of an expert's or router's tensor, the dimension that counts experts
    stacked: tuple[str, ...]  # tensors among them with weights and biases of experts
    lists: tuple[str, ...]  # names of lists of modules, a module for an expert

    def cuts(self, numbers: Collection[int]) -> dict[str, Cut]:
        """Return the cuts of tensors that count experts, without experts of these `numbers`."""
        return {name: Cut(dim, {None: tuple(sorted(numbers))}, reads=True) for name, dim in self.dims.items()}

    def renamed(self, name: str, numbers: Collection[int]) -> str | None:
        """Return the name of a tensor in the model without experts; None for a tensor of a removed expert."""
        if (place := _in_list(name, self.lists)) is None:
            return name
        path, number, rest = place
        return None if number in numbers else f"{path}.{number - sum(gone < number for gone in numbers)}.{rest}"

    def tensors(self, block: nn.Module) -> Tensors:
        held = dict[str, Tensor](block.named_parameters()) | dict(block.named_buffers())
        return {f"{self.block}.{name}": tensor for name, tensor in held.items()}

    def of_expert(self, name: str, tensor: Tensor, number: int) -> Tensor | None:
        """Return a view of the part of a tensor that makes an expert's output; None without such a part."""
        if name in self.stacked:
            return tensor[number]
        return tensor if any(name.startswith(f"{path}.{number}.") for path in self.lists) else None

    def is_emptied(self, block: nn.Module, numbers: Collection[int]) -> bool:
        """Return True if the weights of some experts are all zero."""
        own = (self.of_expert(name, t, n) for name, t in self.tensors(block).items() for n in numbers)
        return not any(bool(each.any()) for each in own if each is not None)

    def graft(self, small: nn.Module, whole: nn.Module) -> None:
        """Give a block with fewer experts all submodules, with their hooks, that do not depend on the number of
        experts.
        """
        changed = (*self.dims, *(f"{path}." for path in self.lists))

        def descend(few: nn.Module, all_: nn.Module, path: str) -> None:
            for name, child in list(few.named_children()):
                inside = f"{path}.{name}"
                if not any(each.startswith(f"{inside}.") for each in changed):
                    setattr(few, name, all_.get_submodule(name))
                elif inside not in self.lists:
                    descend(child, all_.get_submodule(name), inside)

        descend(small, whole, self.block)

    def without(self, small: nn.Module, whole: nn.Module, numbers: Collection[int]) -> Callable[..., Any]:
        """Return a forward pass without some experts: a grafted `small` block with its part of the whole block's
        weights.
        """
        cuts, start = self.cuts(numbers), len(self.block) + 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            left = Tensors()
            for name, tensor in self.tensors(whole).items():
                if (renamed := self.renamed(name, numbers)) is not None:
                    left[renamed[start:]] = cuts[name].of(tensor) if name in cuts else tensor
            return functional_call(small, left, args, kwargs)

        return forward

    def swapped(self, layer: nn.Module, one: int, other: int) -> Tensors:
        """Return the changed tensors of a decoder layer after two experts exchange places."""
        order, found = list(range(self.size)), Tensors()
        order[one], order[other] = other, one
        held = dict[str, Tensor](layer.named_parameters()) | dict(layer.named_buffers())
        for inside, tensor in held.items():
            name = f"{self.layer}.{inside}"
            if name in self.dims:
                found[inside] = tensor.index_select(self.dims[name], torch.tensor(order, device=tensor.device))
            elif (place := _in_list(name, self.lists)) is not None:
                path, number, rest = place
                found[f"{path}.{order[number]}.{rest}".removeprefix(f"{self.layer}.")] = tensor
        return found


def find_mixtures(layers: Iterable[str], whole: nn.Module, smaller: nn.Module, size: int) -> list[Mixture]:
    """Return the mixtures of a model, by differences from a model built with one expert less."""
    before = {name: tuple(t.shape) for name, t in whole.state_dict().items()}
    after = {name: tuple(t.shape) for name, t in smaller.state_dict().items()}
    if not after.keys() <= before.keys():
        return []
    dims, lists, left = dict[str, int](), set[str](), set[str]()
    for name, shape in before.items():
        if name not in after:
            found = re.fullmatch(rf"(.+)\.{size - 1}\..+", name)
            if found is None or f"{name.replace(f'{found[1]}.{size - 1}.', f'{found[1]}.0.')}" not in after:
                return []
            lists.add(found[1])
        elif after[name] != shape:
            differing = [i for i, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
            if len(differing) != 1 or (shape[differing[0]], after[name][differing[0]]) != (size, size - 1):
                return []
            dims[name] = differing[0]
    changed, mixtures = {*dims, *(f"{path}." for path in lists)}, list[Mixture]()
    for layer in layers:
        here = sorted(name for name in changed if name.startswith(f"{layer}."))
        left |= set(here)
        if here:
            mixtures.append(_mixture(layer, size, {n: dims[n] for n in here if n in dims}, before, here, lists))
    experts = all(mixture.stacked or mixture.lists for mixture in mixtures)
    return mixtures if experts and left == changed else []


def _mixture(
    layer: str,
    size: int,
    dims: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    changed: Iterable[str],
    lists: Collection[str],
) -> Mixture:
    matrices = [name for name, dim in dims.items() if dim == 0 and len(shapes[name]) == STACKED]
    holders = {name.rpartition(".")[0] for name in matrices}
    stacked = tuple(name for name, dim in dims.items() if dim == 0 and name.rpartition(".")[0] in holders)
    parts = [name.rpartition(".")[0].split(".") for name in changed]
    shared = next(n for n in range(len(min(parts, key=len)), 0, -1) if len({tuple(p[:n]) for p in parts}) == 1)
    own = tuple(path for path in lists if path.startswith(f"{layer}."))
    return Mixture(layer, ".".join(parts[0][:shared]), size, dims, stacked, own)


def _in_list(name: str, lists: Iterable[str]) -> tuple[str, int, str] | None:
    for path in lists:
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            return path, int(number), rest
    return None
