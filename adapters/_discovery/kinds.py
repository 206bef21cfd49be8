"""Facts on a decoder layer that hold for all layers of equal structure."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk

from .layout import signature

if TYPE_CHECKING:
    from .._huggingface import HuggingFaceModel

T = TypeVar("T")


def of_each_kind(model: "HuggingFaceModel", find: Callable[[DecoderLayer, Call, Tensor], T]) -> list[T]:
    """Determine a fact for every decoder layer; of layers with equal structure, on the first.

    Args:
        find: takes a layer in memory, its call, and a few hidden states [1 tokens n].

    Returns:
        By layer the result of `find`, with the names of the tried layer.
    """
    tokens, kinds, found = model.probe_tokens(), [signature(layer.module) for layer in model.layers], {}
    hidden = model.first_inputs(tokens)

    def look(context: LayerContext) -> None:
        found[kinds[context.number]] = find(context.layer, context.calls(hidden), hidden)

    first = MemoryStore(sorted(kinds.index(kind) for kind in set(kinds)))
    LayerWalk(model, [tokens], first, streams=()).run(look)
    return [found[kind] for kind in kinds]
