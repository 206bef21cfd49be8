"""Remove attention heads for good, by KV group: the parts of parameters that belong to a group, and the settings.

A KV group is a key/value head with all query heads that attend to it. Its columns are columns of a single operator, the
reader of the heads' outputs. All further parts follow from the parameters that shrink in a model with fewer groups, and
from experiments: entries that are doubled change inputs of the reader, and these have to be of a single group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convexprune._layerwise.model import Call, DecoderLayer, Group
from convexprune.constraints import Constraint
from convexprune.errors import ModelError

from .._channels.channels import Axis, Channels, close, columns
from .._channels.inner_channels import changed_inputs, half, inner_channels, same_in_another_order
from .._discovery.family import decoder_layers, head_size
from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel
from .base import Place, Shapes, built, candidates, parameter_shapes, settings_of, shapes_of
from .narrowing import Narrowing

DIM = "head_dim"
"""The setting that says how wide heads are, which else follows from their number."""


@dataclass(frozen=True)
class _Values:
    """Facts on a model's heads that follow from the way of their values."""

    readers: frozenset[str]  # names of the operators that read the values
    touched: frozenset[str]  # names of parameters that certainly belong to the heads
    groups: int  # number of KV groups by reader
    heads: int
    width: int
    operator: str  # name, in its layer, of the first reader
    layers: tuple[str, ...]  # prefixes of parameters in the layers of the readers


@torch.no_grad()
def find_heads(model: HuggingFaceModel, pattern: Constraint) -> Narrowing:
    """Find the KV groups of heads of a dense model that a pattern removes."""
    values = _values(model)
    pattern.check(1, values.groups)
    found, dims = _said(model, values, pattern.width(values.groups))
    sets = of_each_kind(model, partial(_of_layer, dims=dims, values=values, head=head_size(model.model.config)))
    named = zip(model.layers, sets, strict=True)
    found = replace(found, sets=tuple(one.of_layer(layer.name) for layer, one in named if one is not None))
    found.without_first().require_configured(model, found.configured(settings_of(model)))
    _require_same(model, found)
    return found


def _values(model: HuggingFaceModel) -> _Values:
    """Return the facts of all decoder layers, which have to be alike: by KV head, the columns of its values."""
    found = dict[str, list[Channels]]()
    for one in inner_channels(model):
        name, inside, _ = one.name.partition("[")
        if inside:
            found.setdefault(name, []).append(one)
    readers = {f"{y.name}.{o.name}": o for y in model.layers for o in y.operators if f"{y.name}.{o.name}" in found}
    numbers = {(len(found[n]), sum(len(o.consumers) for o in found[n]), r.shape[1]) for n, r in readers.items()}
    (groups, heads, inputs), *others = numbers or {(0, 0, 0)}
    size = next((one.size for sets in found.values() for one in sets), 0)
    if others or not 0 < inputs == heads * size:
        what = "its layers do not have as many heads each" if others else "no attention heads are to be found in it"
        raise ModelError(f"{model.name}: {what}, so that none can be removed. Pattern 'channels' may do.")
    touched = {axis.parameter for sets in found.values() for one in sets for axis in (*one.axes, *one.consumers)}
    operator = next(iter(readers.values())).name
    layers = tuple(f"{y.name}." for y in model.layers if any(f"{y.name}.{o.name}" in found for o in y.operators))
    return _Values(frozenset(found), frozenset(touched), groups, heads, inputs // groups, operator, layers)


def _said(model: HuggingFaceModel, values: _Values, left: int) -> tuple[Narrowing, dict[str, int]]:
    """Return settings that declare the remaining groups, and by shrunk parameter its dimension."""
    shapes, settings = parameter_shapes(model.model), settings_of(model)
    number, nearest = left, None
    for number in sorted(range(1, values.groups), key=lambda number: (abs(number - left), -number)):
        tried = [(one, shapes_of(model.model, one.configured(settings))) for one in _candidates(model, values, number)]
        each = ((one, _smaller(shapes, new, values.groups, number)) for one, new in tried)
        # All certain parameters of the heads shrink, and none in further layers.
        all_of_heads = ((one, dims) for one, dims in each if values.touched <= dims.keys())
        nearest = next((pair for pair in all_of_heads if all(n.startswith(values.layers) for n in pair[1])), None)
        if nearest is not None and number == left:
            return nearest
        if nearest is not None or not tried or tried[0][1]:  # there is such a model, and it is another
            break
    instead = "no other number" if nearest is None else f"{number}, with sparsity={1 - number / values.groups:g}"
    raise ModelError(
        f"{model.name}: its configuration cannot say that {left} of the {values.groups} KV groups of heads are left, "
        f"each as wide as before. It can say {instead}. Pattern 'channels' makes the MLP narrower, and "
        f"'columns:{values.width}' with targets=[{values.operator!r}] (--targets) zeroes heads in place."
    )


def _candidates(model: HuggingFaceModel, values: _Values, left: int) -> Iterator[Narrowing]:
    """Yield settings that may declare the remaining groups: as many as possible of those with the present numbers."""
    text = model.model.config.get_text_config()
    places: dict[Place, int] = {
        place: number
        for number in dict.fromkeys((values.heads, values.groups))
        for place in candidates(model, number)
        if "head" in place[-1] and "dim" not in place[-1]
    }
    width = getattr(text, DIM, None) or text.hidden_size // values.heads
    said = {} if isinstance(getattr(type(text), DIM, None), property) else {DIM: width}
    for count in range(len(places), 0, -1):
        for chosen in combinations(places, count):
            widths = {place: (places[place], places[place] * left // values.groups) for place in chosen}
            yield Narrowing((), widths, {(*chosen[0][:-1], name): value for name, value in said.items()})


def _smaller(shapes: Shapes, built: Shapes, groups: int, left: int) -> dict[str, int]:
    """Return the dimension of every parameter that loses the expected entries; empty if anything else differs."""
    found = dict[str, int]()
    for name, shape in shapes.items() if shapes.keys() == built.keys() else ():
        different = [dim for dim, pair in enumerate(zip(shape, built[name], strict=True)) if pair[0] != pair[1]]
        if not different:
            continue
        if len(different) > 1 or shape[different[0]] * left != built[name][different[0]] * groups:
            return {}
        found[name] = different[0]
    return found


def _of_layer(
    layer: DecoderLayer, call: Call, hidden: Tensor, dims: Mapping[str, int], values: _Values, head: int
) -> Channels | None:
    read = {f"{layer.name}.{o.name}": (group, o) for group in layer.groups for o in group.operators}
    (group, operator) = next((read[name] for name in read if name in values.readers), (None, None))
    if group is None or operator is None:
        return None
    consumer = replace(columns(operator), block=values.width)
    modules = dict[tuple[str, int], list[Axis]]()  # a weight and its bias are of the same heads
    for name, parameter in layer.module.named_parameters():
        dim = dims.get(f"{layer.name}.{name}")
        if dim is not None and name != consumer.parameter:
            modules.setdefault((name.rpartition(".")[0], parameter.shape[dim]), []).append(Axis(name, dim))
    axes = list[Axis]()
    for (path, size), whole in modules.items():
        for unit in (size // values.groups, head):
            runs = _runs(_groups(layer, group, whole, range(0, size, unit), call, hidden, values.width), values.groups)
            if runs is not None:
                axes += [replace(axis, start=start * unit, block=n * unit) for start, n in runs for axis in whole]
                break
        else:
            raise ModelError(
                f"{layer.name}.{path}: some of its {size} rows change no KV group of heads, or several, as where a "
                "norm is over all of them, so that no group can be removed. Pattern 'channels' makes the MLP narrower."
            )
    found = Channels(operator.name, values.groups, tuple(axes), (consumer,))
    if not same_in_another_order(layer, group, [found], call, hidden):
        raise ModelError(f"{layer.name}: its heads depend on their number, so that none can be removed.")
    return found


def _groups(
    layer: DecoderLayer, group: Group, axes: Sequence[Axis], starts: range, call: Call, hidden: Tensor, width: int
) -> list[int]:
    """Return the KV group of every block of entries, after doubling half of the blocks; -1: not a single group."""
    found = list[int]()
    for start in starts:
        each = [replace(axis, start=start) for axis in axes]
        changed = changed_inputs(layer, group, each, half(starts.step, start), call, hidden).view(-1, width).any(1)
        reached = changed.nonzero().flatten().tolist()
        found.append(reached[0] if len(reached) == 1 else -1)
    return found


def _runs(found: Sequence[int], count: int) -> list[tuple[int, int]] | None:
    """Return begin and length of runs of blocks, one for every KV group in turn: three of fused q, k and v."""
    runs, at = list[tuple[int, int]](), 0
    while at < len(found):
        each = next((i for i, number in enumerate(found[at:]) if number != 0), 0)
        if list(found[at : at + each * count]) != [number for number in range(count) for _ in range(each)]:
            return None
        if each == 0:
            return None
        runs.append((at, each))
        at += each * count
    return runs


def _require_same(model: HuggingFaceModel, found: Narrowing) -> None:
    """Check that smaller layers compute what dense ones with zeros do: settings decide more than shapes."""
    narrowed = found.without_first()
    smaller = built(model.model, found.configured(settings_of(model))).eval()
    left, (_, layers) = [layer.name for layer in model.layers], decoder_layers(smaller)

    def same(layer: DecoderLayer, call: Call, hidden: Tensor) -> bool:
        state = {f"{layer.name}.{name}": tensor for name, tensor in layer.module.state_dict().items()}
        cuts = {name: cut for name, cut in narrowed.cuts.items() if name in state}
        zeros = state | {name: cut.back(cut.of(state[name]), state[name]) for name, cut in cuts.items()}
        before = _with(layer.module, zeros, layer.name)
        after = _with(layers[left.index(layer.name)], narrowed.state(state), layer.name)
        return close(call(before, hidden), call(after, hidden), hidden.dtype)

    if not all(each := of_each_kind(model, same)):
        raise ModelError(
            f"{model.name}: {left[each.index(False)]} of a model with fewer heads computes something else than with "
            "zeros in place of them, so that none can be removed. Pattern 'channels' makes the MLP narrower."
        )


def _with(module: nn.Module, state: Mapping[str, Tensor], layer: str) -> Callable[..., Any]:
    """Return the function of a module with replaced tensors, whose names begin with the layer's."""
    own = {name.removeprefix(f"{layer}."): tensor for name, tensor in state.items()}
    device = next(iter(own.values())).device
    buffers = {name: buffer.to(device) for name, buffer in module.named_buffers()}
    return lambda *args, **kwargs: functional_call(module, buffers | own, args, kwargs)
