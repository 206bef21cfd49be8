"""Networks that differ from a pruned one by a step of some operators, sent along in the pass of a survey."""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from convexprune._layerwise.capture import through
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractOperator
from convexprune.constraints import Constraint

Weights = Mapping[Constraint, Mapping[AbstractOperator, Tensor]]
PRUNED = "pruned"


class Trials:
    """The hidden states of the dense network, the `PRUNED` network, and networks with a step further.

    A step is from the first of two `patterns` to the second, in all operators of a group: of a layer, or of a kind, the
    name inside of the layer without numbers, so that experts are of one kind. `groups` has both by "layer.operator".
    The last `windows` batches of the walk are sent through. After the last layer the states are those that enter the
    head.
    """

    def __init__(self, patterns: tuple[Constraint, Constraint], windows: int) -> None:
        self.patterns, self._windows = patterns, windows
        self.groups = dict[str, tuple[str, str]]()
        self.dense: Sequence[Tensor] = ()
        self.states = dict[str, Sequence[Tensor]]()

    def visit(self, context: LayerContext, weights: Weights) -> None:
        """Send all networks through a layer with its `weights`, and leave the layer dense."""
        layer, every = context.layer, context.inputs["dense"]
        last = [every[i] for i in range(max(0, len(every) - self._windows), len(every))]
        dense = {operator: operator.read().clone() for operator in layer.operators}
        pruned = {**dense, **weights[self.patterns[0]]}  # where a pattern does not fit, nothing changes
        further = {**pruned, **weights[self.patterns[1]]}

        def leaving(states: Sequence[Tensor], stepped: Collection[AbstractOperator]) -> list[Tensor]:
            for operator in layer.operators:
                operator.write((further if operator in stepped else pruned)[operator])
            return [y.cpu() for y in through(layer, context.calls, [x.to(context.model.device) for x in states])]

        self.dense = [y.cpu() for y in through(layer, context.calls, [x.to(context.model.device) for x in last])]
        kinds = {operator: re.sub(r"\.\d+(?![^.])", "", operator.name) for operator in layer.operators}
        self.groups |= {f"{layer.name}.{operator.name}": (layer.name, kind) for operator, kind in kinds.items()}
        before = self.states.get(PRUNED, last)
        entering = {PRUNED: before, **dict.fromkeys(kinds.values(), before), **self.states}
        self.states = {name: leaving(x, [o for o in kinds if kinds[o] == name]) for name, x in entering.items()}
        if kinds:
            self.states[layer.name] = leaving(before, kinds)
        for operator, weight in dense.items():
            operator.write(weight)
