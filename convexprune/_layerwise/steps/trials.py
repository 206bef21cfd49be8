"""Networks that differ from a pruned one by a step of some operators, sent along in the pass of a survey."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain

from torch import Tensor

from convexprune._layerwise.capture import through
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractOperator
from convexprune.constraints import Constraint

Weights = Mapping[Constraint, Mapping[AbstractOperator, Tensor]]
PRUNED = "pruned"


class Trials:
    """The hidden states of the dense network, the `PRUNED` network, and by group of operators one with a step there.

    A step is from the first of two `patterns` to the second. The `groups` of an operator, by "layer.operator", are its
    layer and its kind, the name inside of the layer without numbers, so that experts are of one kind. The last
    `windows` batches of the walk are sent through. After the last layer the states are those that enter the head.
    """

    def __init__(self, patterns: tuple[Constraint, Constraint], windows: int) -> None:
        self.patterns, self.windows = patterns, windows
        self.groups = dict[str, tuple[str, str]]()
        self.dense: Sequence[Tensor] = ()
        self.states = dict[str, Sequence[Tensor]]()

    def visit(self, context: LayerContext, weights: Weights) -> None:
        """Send all networks through a layer with its `weights`, and leave the layer dense."""
        layer, every = context.layer, context.inputs["dense"]
        last = [every[i] for i in range(max(0, len(every) - self.windows), len(every))]
        dense = {operator: operator.read().clone() for operator in layer.operators}
        pruned = {**dense, **weights[self.patterns[0]]}  # where a pattern does not fit, nothing changes
        further = {**pruned, **weights[self.patterns[1]]}

        def leaving(states: Sequence[Tensor], changed: Mapping[AbstractOperator, Tensor]) -> list[Tensor]:
            for operator, weight in changed.items():
                operator.write(weight)
            return [y.cpu() for y in through(layer, context.calls, [x.to(context.model.device) for x in states])]

        groups = {o: (layer.name, re.sub(r"\.\d+\b", "", o.name)) for o in layer.operators}
        self.groups |= {f"{layer.name}.{operator.name}": own for operator, own in groups.items()}
        self.dense, before = leaving(last, dense), self.states.get(PRUNED, last)
        entering = {PRUNED: before, **dict.fromkeys(chain(*groups.values()), before), **self.states}
        self.states = {
            name: leaving(x, {o: (further if name in own else pruned)[o] for o, own in groups.items()})
            for name, x in entering.items()
        }
        for operator, weight in dense.items():
            operator.write(weight)
