"""The first steps: the pass of the dense layer, and removals before pruning."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from convexprune._layerwise.capture import ErrorTarget
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.pipeline import AbstractLayerStep
from convexprune._layerwise.settings import Emptied


@dataclass(frozen=True)
class Observe(AbstractLayerStep):
    """Run the dense layer. Its outputs enter the next layer, which a second worker can then begin."""

    error_targets: Collection[ErrorTarget] = ("operator",)
    edits: ClassVar[bool] = False

    def __call__(self, context: LayerContext) -> None:
        context.observe(self.error_targets)
        if not context.is_last:
            context.hand_on(context.observed.outputs)


@dataclass(frozen=True, eq=False)
class Remove(AbstractLayerStep):
    """Put zeros in place of parts removed for good. Later comparisons are with these weights."""

    emptied: Emptied
    edits: ClassVar[bool] = False

    def __call__(self, context: LayerContext) -> None:
        model, layer = context.model, context.layer
        own = {name for name, _ in layer.module.named_parameters()}
        parameters = {name: tensor for name, tensor in model.state(layer).items() if name in own}
        model.load_state(layer, self.emptied(layer.name, parameters))
