"""The loop over decoder layers; it exists once, for every model and every method."""

import torch
from torch import Tensor

from convexprune.errors import PatternError
from convexprune.model import AbstractModel, Call
from convexprune.pipeline.layer import HiddenStates, LayerSettings, Tell, prune_layer


def check_patterns(model: AbstractModel, settings: LayerSettings) -> None:
    """Refuse, before any work, a pattern that some operator does not fit.

    Raises:
        PatternError: the operator is named.
    """
    for layer in model.layers:
        for operator in layer.operators:
            try:
                settings.pattern_of(f"{layer.name}.{operator.name}").check(*operator.shape)
            except PatternError as error:
                raise PatternError(f"{layer.name}.{operator.name}: {error}") from error


@torch.no_grad()
def prune_layers(
    model: AbstractModel, tokens: Tensor, held_out: Tensor, batch_size: int, settings: LayerSettings, tell: Tell
) -> None:
    """Prune every decoder layer in place on `tokens` [samples length]; `tell` hears of each operator as it is done.

    The errors of the result are measured on `held_out` [samples length] as well, which may be empty.
    """
    judges = list(held_out.split(batch_size)) if len(held_out) else []
    batches = [*tokens.split(batch_size), *judges]
    recorded = {len(batch): model.calls(batch) for batch in {len(b): b for b in batches}.values()}
    first = [model.first_inputs(batch) for batch in batches]
    hidden = HiddenStates(first, first, len(judges))
    for number, layer in enumerate(model.layers):

        def calls(batch: Tensor, number: int = number) -> Call:
            return recorded[len(batch)][number]

        hidden = prune_layer(layer, calls, hidden, settings, tell)
