"""The weights of calibration tokens, by operator, as the recipe's setting `token_weights` asks for them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.settings import TokenWeighting, loss_weights, sink_weights

from ._discovery.probing import ProbedModel, of_each_kind
from ._gradients import loss_fisher
from ._huggingface import HuggingFaceModel


def token_weights(
    model: HuggingFaceModel,
    asked: TokenWeighting,
    calibration: Tensor,
    batch_size: int = 1,
    store: FolderStore | None = None,
) -> Mapping[str, Tensor]:
    """Return weights [windows length] of the `calibration` tokens by "layer.operator"; the others count all alike."""
    if asked.kind == "attention_sink":
        weights = sink_weights(len(calibration), calibration.shape[1], asked.share)
        return {name: weights for name in read_by_other_tokens(model)}
    if asked.kind == "none":
        return {}

    def find(record: Callable[[], Recorded]) -> dict[str, Tensor]:
        squares = loss_fisher(model, calibration, batch_size, record, by_token=True).tokens
        return {name: loss_weights(each, asked.share) for name, each in squares.items()}

    def keep(store: FolderStore) -> dict[str, Tensor]:
        with store.scratch(0) as record:
            return find(record)

    return find(list) if store is None else store.tensors_once("token_weights", lambda: keep(store))


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
