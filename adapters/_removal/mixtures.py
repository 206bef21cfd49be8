"""Mixtures of experts: the parts of an expert, blocks without some experts, and the experts to remove."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convexprune._device.precision import widened
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.pruners import Score

from .._huggingface import HuggingFaceModel
from .base import Cut, Making, renumbered

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
        """Give a block with fewer experts all submodules, with hooks, that do not depend on the number of experts."""
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
        """Return a forward pass of a grafted `small` block with its part of the whole block's weights."""
        cuts, start = self.cuts(numbers), len(self.block) + 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            left = Tensors()
            for name, tensor in self.tensors(whole).items():
                if (renamed := renumbered(name, self.lists, numbers)) is not None:
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
            for path in self.lists:
                if name.startswith(f"{path}."):
                    number, _, rest = name[len(path) + 1 :].partition(".")
                    found[f"{path}.{order[int(number)]}.{rest}".removeprefix(f"{self.layer}.")] = tensor
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


TOKENS = 4096  # that outputs are compared on
NEXT = 8  # experts that stay are tried in the place of each that is to go
ROUNDS = 4  # of exchanges, if they gain so long

Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
"""The arguments of each call of a block."""


class Judged:
    """The block of a mixture, a `small` block with the remaining number of experts (`Mixture.graft`), and inputs."""

    def __init__(self, mixture: Mixture, block: nn.Module, small: nn.Module, inputs: Inputs) -> None:
        self.mixture, self.block, self.small, self.inputs = mixture, block, small, inputs
        self.dense = self._outputs(block)

    def error(self, gone: Collection[int]) -> float:
        """Return the summed square of the output's change without some experts."""
        found = self._outputs(self.mixture.without(self.small, self.block, gone))
        return sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(found, self.dense, strict=True))

    def reap(self, number: int) -> float:
        """Return the mean of g |f(x)| over the tokens x of an expert (arXiv 2510.13999, equation 9), or 0.

        The expert's output f, times the router's weight g, equals the block's loss if the expert's weights are zero:
        the router does not read these weights, and chooses the same.
        """
        own = [self.mixture.of_expert(n, t, number) for n, t in self.mixture.tensors(self.block).items()]
        held = [(part, part.clone()) for part in own if part is not None]
        try:
            for part, _ in held:
                part.zero_()
            found = self._outputs(self.block)
        finally:
            for part, values in held:
                part.copy_(values)
        sizes = torch.cat([(a - b).norm(dim=-1).flatten() for a, b in zip(self.dense, found, strict=True)])
        return float(sizes[sizes > 0].mean()) if bool(sizes.any()) else 0.0

    def _outputs(self, forward: Callable[..., Any]) -> list[Tensor]:
        found = list[Tensor]()
        for args, named in self.inputs:
            hidden = next(each for each in (*args, *named.values()) if isinstance(each, Tensor))
            with widened(hidden.device, hidden.dtype):
                output = forward(*args, **named)
            found.append((output if isinstance(output, Tensor) else output[0]).float())
        return found


@torch.no_grad()
def experts_to_remove(
    model: HuggingFaceModel,
    windows: Tensor,
    score: Score,
    mixtures: Sequence[tuple[Mixture, nn.Module]],
    count: int,
    record: Making,
) -> dict[str, list[int]]:
    """Return the numbers of the experts to remove by mixture, judged on ids [samples length] in the dense model.

    "reap": the lowest scores of REAP. "output": starting from these, removed and remaining experts are exchanged as
    long as the error of the block's output falls. Beside a mixture stands its block with the remaining number of
    experts.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    here = {mixture.layer: (mixture, small) for mixture, small in mixtures}
    found, report = dict[str, list[int]](), begin("choosing experts", len(here))

    def step(context: LayerContext) -> None:
        if (own := here.get(context.layer.name)) is None:
            context.hand_on(context.outputs())
            return
        mixture, small = own
        block = model.model.get_submodule(mixture.block)
        with recording(block) as inputs:
            context.hand_on(context.outputs())
        judged = Judged(mixture, block, small, inputs)
        found[mixture.layer] = sorted(chosen(judged, score, count))
        report(f"{mixture.layer}: {', '.join(map(str, found[mixture.layer]))}")

    LayerWalk(model, windows.split(1), MemoryStore(range(len(model.layers)), record)).run(step)
    return found


def chosen(judged: Judged, score: Score, count: int) -> list[int]:
    scores = [judged.reap(number) for number in range(judged.mixture.size)]
    order = sorted(range(judged.mixture.size), key=scores.__getitem__)
    gone = order[:count]
    if score == "reap":
        return gone
    best = judged.error(gone)
    for _ in range(ROUNDS):
        before = best
        for number in reversed(list(gone)):
            others = [each for each in order if each not in gone][:NEXT]
            tried = {each: judged.error([*(n for n in gone if n != number), each]) for each in others}
            least = min(tried, key=tried.__getitem__)
            if tried[least] < best:
                best, gone = tried[least], [*(n for n in gone if n != number), least]
        if best == before:
            break
    return gone


@contextmanager
def recording(block: nn.Module) -> Iterator[Inputs]:
    """Keep the arguments of all calls of a block during the context."""
    kept = list[tuple[tuple[Any, ...], Mapping[str, Any]]]()
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    with handle:
        yield kept
