"""The channels of the hidden states, through the whole model, by experiment: layers are tried with another order."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune._layerwise.capture import stage_inputs
from convexprune._layerwise.model import Call, DecoderLayer, Group

from .._discovery.kinds import of_each_kind
from .._huggingface import HuggingFaceModel
from .channels import HIDDEN, Axis, Channels, NotPermutable, canonical_name_of, close, columns, rows

Inputs = Mapping[Group, Tensor]
"""The inputs of groups."""


@torch.no_grad()
def hidden_channels(model: HuggingFaceModel) -> Channels:
    """The channels of the hidden states, from the embedding to the head.

    What lies outside of the decoder layers is not tried here: the outputs of the whole model show whether it is right.
    """
    outside = _outside(model)
    found = zip(model.layers, of_each_kind(model, _through), strict=True)
    every = [channels.of_layer(layer.name) for layer, channels in found]
    size = every[0].size
    axes = [Axis(name, p.dim() - 1) for name, p in outside.items() if p.shape[-1] == size]
    axes += [Axis(name, 0) for name, p in outside.items() if p.dim() > 1 and p.shape[0] == size != p.shape[-1]]
    axes += chain.from_iterable(one.axes for one in every)
    return Channels(HIDDEN, size, tuple(axes), tuple(chain.from_iterable(one.consumers for one in every)))


def _outside(model: HuggingFaceModel) -> dict[str, nn.Parameter]:
    """The parameters outside of the decoder layers, all of which have to be used for text."""
    within = tuple(f"{layer.name}." for layer in model.layers)
    outside = {name: p for name, p in model.model.named_parameters() if not name.startswith(within)}
    used = set[str]()
    with ExitStack() as hooks:
        for path in {name.rpartition(".")[0] for name in outside}:
            called = partial(lambda path, *_: used.add(path), path)
            hook = model.model.get_submodule(path).register_forward_pre_hook(called)
            hooks.callback(hook.remove)
        model.logits(model.probe_tokens(), model.probe()[0])  # the layers pass these hidden states on
    for name in outside:
        if name.rpartition(".")[0] not in used:
            raise NotPermutable(f"text does not pass {name}, and what does may become hidden states, too")
    return outside


def _through(layer: DecoderLayer, call: Call, hidden: Tensor) -> Channels:
    """The axes of the hidden states in a layer; of its vectors either all that are as long, or those of its own
    norms.
    """
    size = hidden.shape[-1]
    known = {axis.parameter for operator in layer.operators for axis in (*rows(operator, 0), columns(operator, 0))}
    others = {n: p for n, p in layer.module.named_parameters() if n not in known and p.shape[-1] == size}
    for depth in (max((name.count(".") for name in others), default=0), 1):  # OLMo's norms of q and k are deeper
        vectors = [Axis(n, p.dim() - 1) for n, p in others.items() if p.dim() > 1 or n.count(".") <= depth]
        found = _with_vectors(layer, call, hidden, vectors)
        if found is not None:
            return found
    raise NotPermutable(f"{layer.name} computes something else with them in another order")


def _with_vectors(layer: DecoderLayer, call: Call, hidden: Tensor, vectors: Sequence[Axis]) -> Channels | None:
    """The axes found stage by stage, with the hidden states and what is found of the layer in another order.

    What a group then sees is in that order too, so its columns have to be; or as before, so its rows have to be if
    they are as many, for their outputs are added to the hidden states. None if neither, or if the layer then computes
    something else.
    """
    size = hidden.shape[-1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    expected = call(layer.module, hidden)
    before = {g: x for stage in layer.stages for g, x in stage_inputs(layer, stage, call, hidden).items()}
    found = [Channels(HIDDEN, size, tuple(vectors), ())]  # norms, and routers
    with ExitStack() as stack:
        stack.enter_context(found[0].ordered(layer.module, order))
        for stage in layer.stages:
            seen = stage_inputs(layer, stage, call, hidden[..., order])
            one = _of_stage(layer, stage, before, seen, order)
            if one is None:
                return None
            stack.enter_context(one.ordered(layer.module, order))
            found.append(one)
        same = close(expected[..., order], call(layer.module, hidden[..., order]), hidden.dtype)
    axes = tuple(chain.from_iterable(one.axes for one in found))
    return Channels(HIDDEN, size, axes, tuple(chain.from_iterable(one.consumers for one in found))) if same else None


def _of_stage(
    layer: DecoderLayer, stage: Sequence[Group], before: Inputs, seen: Inputs, order: Tensor
) -> Channels | None:
    """The axes of the groups of a stage, by what they saw before, and see now."""
    axes, consumers = list[Axis](), list[Axis]()
    roles: dict[str, bool | None] = {}  # of an expert that no token reaches, its siblings'
    for group in sorted(stage, key=lambda group: group not in seen):
        name, _ = canonical_name_of(layer, group.operators[0])
        if group in seen and group in before:
            roles[name] = _reads(before[group], seen[group], order)
        reads = roles.get(name)
        if reads is None:
            return None
        if reads:
            consumers += [columns(operator, 0) for operator in group.operators]
        else:
            axes += chain.from_iterable(rows(o, 0) for o in group.operators if o.shape[0] == len(order))
    return Channels(HIDDEN, len(order), tuple(axes), tuple(consumers))


def _reads(before: Tensor, now: Tensor, order: Tensor) -> bool | None:
    """Whether what was seen before is now in this order, or (false) as it was; None if neither."""
    if before.shape != now.shape:
        return None
    if before.shape[-1] == len(order) and close(before[..., order], now, before.dtype):
        return True
    return False if close(before, now, before.dtype) else None
