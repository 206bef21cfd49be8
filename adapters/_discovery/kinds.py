"""What is found out of one decoder layer, and holds for all that are built the same."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from convexprune._layerwise.model import Call, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerContext, LayerWalk

from .layout import signature

if TYPE_CHECKING:
    from .._huggingface import HuggingFaceModel

T = TypeVar("T")


def of_each_kind(model: "HuggingFaceModel", find: Callable[[DecoderLayer, Call, Tensor], T]) -> list[T]:
    """Find something out of every decoder layer; of layers that are built the same, out of the first of them.

    Args:
        find: called with a layer that is in memory, how it is called, and a few hidden states [1 tokens n].

    Returns:
        For each layer what `find` returned, with the names of the layer that it was called with.
    """
    tokens, kinds, found = model.probe_tokens(), [signature(layer.module) for layer in model.layers], {}
    hidden = model.first_inputs(tokens)

    def look(context: LayerContext) -> None:
        found[kinds[context.number]] = find(context.layer, context.calls(hidden), hidden)

    first = MemoryStore(sorted(kinds.index(kind) for kind in set(kinds)))
    LayerWalk(model, [tokens], first, streams=()).run(look)
    return [found[kind] for kind in kinds]
