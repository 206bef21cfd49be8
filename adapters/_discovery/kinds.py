"""Facts on a decoder layer that hold for all layers of equal structure."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractModel, Call, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk

from .layout import signature

T = TypeVar("T")


class ProbedModel(AbstractModel):
    """A model of transformers with a few tokens for experiments."""

    model: PreTrainedModel

    @abstractmethod
    def probe_tokens(self) -> Tensor:
        """Return token ids [1 tokens], all different."""

    @abstractmethod
    def forward(self, batch: Tensor) -> Tensor:
        """Send token ids [batch tokens] through the decoder."""


def of_each_kind(model: ProbedModel, find: Callable[[DecoderLayer, Call, Tensor], T]) -> list[T]:
    """Return by decoder layer the result of `find`, called with the first layer in memory of each structure.

    `find` takes the layer, its call, and a few hidden states [1 tokens n].
    """
    tokens, kinds, found = model.probe_tokens(), [signature(layer.module) for layer in model.layers], {}
    hidden = model.first_inputs(tokens)

    def look(context: LayerContext) -> None:
        found[kinds[context.number]] = find(context.layer, context.calls(hidden), hidden)

    first = MemoryStore(sorted(kinds.index(kind) for kind in set(kinds)))
    LayerWalk(model, [tokens], first, streams=()).run(look)
    return [found[kind] for kind in kinds]
