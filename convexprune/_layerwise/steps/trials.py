"""Networks that differ from a pruned one by a step of a single operator, sent along in the pass of a survey."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from convexprune._layerwise.capture import through
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractOperator
from convexprune.constraints import Constraint

Weights = Mapping[Constraint, Mapping[AbstractOperator, Tensor]]
PRUNED = "pruned"


class Trials:
    """The hidden states of the dense network, the `PRUNED` network, and by operator the one with a step further.

    The last `windows` batches of the walk are sent through. After the last layer the states are those that enter the
    head. A step is to the `further` pattern, for one operator, "layer.operator".
    """

    def __init__(self, pattern: Constraint, further: Constraint, windows: int) -> None:
        self.patterns, self._windows = (pattern, further), windows
        self.dense: Sequence[Tensor] = ()
        self.states = dict[str, Sequence[Tensor]]()

    def visit(self, context: LayerContext, weights: Weights) -> None:
        """Send all networks through a layer with its `weights`, and leave the layer dense."""
        layer, entering = context.layer, context.inputs["dense"]
        last = range(max(0, len(entering) - self._windows), len(entering))
        dense = {operator: operator.read().clone() for operator in layer.operators}
        pruned, further = (weights[pattern] for pattern in self.patterns)

        def leaving(states: Sequence[Tensor]) -> list[Tensor]:
            return [y.cpu() for y in through(layer, context.calls, [x.to(context.model.device) for x in states])]

        self.dense = leaving([entering[i] for i in last])
        before = self.states.get(PRUNED, [entering[i] for i in last])
        for operator in layer.operators:
            operator.write(pruned[operator])
        self.states = {name: leaving(states) for name, states in {**self.states, PRUNED: before}.items()}
        for operator in layer.operators:
            operator.write(further[operator])
            self.states[f"{layer.name}.{operator.name}"] = leaving(before)
            operator.write(pruned[operator])
        for operator, weight in dense.items():
            operator.write(weight)
