"""Operators whose outputs reach other tokens, as attention reads keys and values: found by experiment."""

from typing import Any

import torch
from torch import Tensor, nn

from convexprune._layerwise.model import Call, DecoderLayer

from .kinds import ProbedModel, of_each_kind


@torch.no_grad()
def read_by_other_tokens(model: ProbedModel) -> list[str]:
    """Name the operators whose outputs at the first token of a window move the layer's outputs at later tokens."""
    found = of_each_kind(model, _mixing)
    return [f"{layer.name}.{name}" for layer, names in zip(model.layers, found, strict=True) for name in names]


def _mixing(layer: DecoderLayer, call: Call, hidden: Tensor) -> list[str]:
    before, again = call(layer.module, hidden), call(layer.module, hidden)
    if not torch.equal(before, again):
        return []  # no pass is like another, so differences show nothing
    aligned = [operator for group in layer.groups if group.token_aligned for operator in group.operators]
    found = []
    for operator in aligned:
        with layer.module.get_submodule(operator.name).register_forward_hook(_change_first):
            after = call(layer.module, hidden)
        if not torch.equal(before[:, 1:], after[:, 1:]):
            found.append(operator.name)
    return found


def _change_first(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Replace the output of the first token by a new order of its entries, plus 1."""
    changed = output.clone(memory_format=torch.contiguous_format)
    first = changed.flatten(0, -2)[0]
    first.copy_(first.roll(1, -1) + 1)
    return changed
