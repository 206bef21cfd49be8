"""Experiments with a model: facts on kinds of layers, layers that equal the model, tokens that see no later ones."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.model import AbstractModel, Call, DecoderLayer
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls, LayerWalk
from convexprune.errors import ModelError

from .operators import signature

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
    """Return by layer the result of `find` (layer, call, hidden [1 tokens n]) on the first of equal structure."""
    tokens, kinds, found = model.probe_tokens(), [signature(layer.module) for layer in model.layers], {}
    hidden = model.first_inputs(tokens)

    def look(context: LayerContext) -> None:
        found[kinds[context.number]] = find(context.layer, context.calls(hidden), hidden)

    first = MemoryStore(sorted(kinds.index(kind) for kind in set(kinds)))
    LayerWalk(model, [tokens], first, streams=()).run(look)
    return [found[kind] for kind in kinds]


TOLERANCE = 1e-3
"""Relative; replays are bit for bit the same where the kernels are, so this only has to tell noise from nonsense."""


def refuse_other_replays(model: ProbedModel) -> None:
    """Refuse a model that differs from its decoder layers. For a streamed model only the calls are compared."""
    batch = model.probe_tokens()
    if (shape := model.first_inputs(batch).shape)[:-1] != batch.shape:  # Gemma 3n has four vectors a token
        raise ModelError(
            f"The decoder layers are called with hidden states {list(shape)} for {list(batch.shape)} tokens; "
            "accepted: [batch tokens hidden]. Such a model cannot be pruned layer by layer."
        )
    if model.streams:
        error = 0.0 if _same(model.calls(batch), model.calls(batch.flip(-1))) else inf
    else:
        error = replay_error(model, batch)
    if isnan(error):
        raise ModelError(
            f"{model.name}: hidden states are NaN or infinite in {model.model.dtype}. Take another dtype (--dtype "
            "float32, or bfloat16)."
        )
    if not error <= TOLERANCE:
        raise ModelError(
            f"{model.name}: its decoder layers, called one by one, do not give what the model gives (relative "
            f"error {error:.1e}). Something happens between them, or what they are called with depends on the "
            "tokens; such a model cannot be pruned layer by layer."
        )


@torch.no_grad()
def refuse_looking_ahead(model: ProbedModel) -> None:
    """Refuse a model whose first layer changes a token's output with the last token, as an encoder does."""
    batch, layer = model.probe_tokens(), model.layers[0]
    other = torch.cat([batch[:, :-1], batch[:, :1]], dim=1)
    call = model.calls(batch)[0]
    with model.resident(layer):
        before, after = (call(layer.module, model.first_inputs(tokens))[:, :-1].float() for tokens in (batch, other))
    noise = max(TOLERANCE, 8 * torch.finfo(model.model.dtype).eps)  # experts multiply in other batches
    if (after - before).norm() > noise * before.norm():
        raise ModelError(
            f"{model.name} is an encoder: what {layer.name} gives for a token depends on those behind it. convexprune "
            "prunes models that only decode."
        )


@torch.no_grad()
def replay_error(model: ProbedModel, batch: Tensor) -> float:
    """Return the relative difference between the model and its layers in turn, with the calls of another batch."""
    own: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        own.append(output if isinstance(output, Tensor) else output[0])

    with model.layers[-1].module.register_forward_hook(keep):
        model.forward(batch)
    count = len(model.layers)
    states, calls = MemoryStore(range(count)), LayerCalls(model, [batch.flip(-1)])
    LayerWalk(model, [batch], states, calls=calls).run(propagate)
    hidden = states.take(count)[0]
    return float((hidden - own[0]).float().norm() / own[0].float().norm().clamp_min(1e-30))


def _same(first: Sequence[Call], second: Sequence[Call]) -> bool:
    pairs = zip(tree_leaves([vars(c) for c in first]), tree_leaves([vars(c) for c in second]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
