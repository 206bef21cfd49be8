"""The first steps: the pass of the dense layer, and what is taken out of it before the rest is pruned."""

from dataclasses import dataclass
from typing import ClassVar

from convexprune._layerwise.capture import ErrorTarget
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.pipeline import AbstractLayerStep
from convexprune._layerwise.settings import Emptied


@dataclass(frozen=True)
class Observe(AbstractLayerStep):
    """Runs the dense layer. Its outputs enter the next layer, which another worker can begin with from then on."""

    error_target: ErrorTarget = "operator"
    edits: ClassVar[bool] = False

    def __call__(self, context: LayerContext) -> None:
        context.observe((self.error_target,))
        if not context.is_last:
            context.hand_on(context.observed.outputs)


@dataclass(frozen=True, eq=False)
class Remove(AbstractLayerStep):
    """Puts zeros in place of what is removed for good. Operators are compared with what they are then."""

    emptied: Emptied
    edits: ClassVar[bool] = False

    def __call__(self, context: LayerContext) -> None:
        model, layer = context.model, context.layer
        own = {name for name, _ in layer.module.named_parameters()}
        parameters = {name: tensor for name, tensor in model.state(layer).items() if name in own}
        model.load_state(layer, self.emptied(layer.name, parameters))
