"""The loop over decoder layers; it exists once, for every model and every method."""

from collections.abc import Callable

import torch
from torch import Tensor

from convexprune.errors import PatternError
from convexprune.model import AbstractModel, Call
from convexprune.pipeline.layer import LayerSettings, prune_layer
from convexprune.report import OperatorReport


def check_patterns(model: AbstractModel, settings: LayerSettings) -> None:
    """Refuse, before any work, a pattern that some operator does not fit.

    Raises:
        PatternError: the operator is named.
    """
    for layer in model.layers:
        for name in (name for stage in layer.stages for name in stage):
            rows, columns = layer.operator(name).weight.shape
            try:
                settings.pattern.check(rows, columns)
            except PatternError as error:
                raise PatternError(f"{layer.name}.{name}: {error}") from error


@torch.no_grad()
def prune_layers(
    model: AbstractModel,
    tokens: Tensor,
    batch_size: int,
    settings: LayerSettings,
    tell: Callable[[OperatorReport], None],
) -> None:
    """Prune every decoder layer in place on `tokens` [samples length]; `tell` hears of each operator as it is done.

    Each layer is fed by the dense network, so only the dense hidden states are carried along.
    """
    batches = list(tokens.split(batch_size))
    recorded = {len(batch): model.calls(batch) for batch in {len(b): b for b in batches}.values()}
    hidden = [model.first_inputs(batch) for batch in batches]
    for number, layer in enumerate(model.layers):

        def calls(batch: Tensor, number: int = number) -> Call:
            return recorded[len(batch)][number]

        hidden = prune_layer(layer, calls, hidden, settings, tell)
